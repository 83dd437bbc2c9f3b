"""Models are ordinary modules: copies, pickles, averages and casts of every architecture of the zoo."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import cli_helpers
import pytest
import torch
from torch import Tensor, nn

from lavis_lite.common.config import zoo
from lavis_lite.models import load_model
from lavis_lite.nn.encoders import build_encoder
from lavis_lite.nn.learning import ACCURACIES

ARCHITECTURES = sorted(arch for arch, types in zoo.model_zoo if "tiny" in types)
NEEDED = {"blip_classification": {"num_classes": 3}}
TEXTS = ["a red circle", "what is there to the left of it"]


@pytest.fixture(autouse=True)
def kept_generator() -> Iterator[None]:
    """Leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


def build(arch: str, **settings: Any) -> Any:
    """The tiny type in evaluation mode with seeded weights."""
    torch.manual_seed(0)
    return load_model(arch, "tiny", is_eval=True, **NEEDED.get(arch, {}), **settings)


def pictures(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3)).to(dtype)


class Gallery:
    """Two images and their texts, as a retrieval loader yields them."""

    def __init__(self, image: Tensor) -> None:
        self.image, self.text, self.dataset = image, TEXTS, self

    def __len__(self) -> int:
        return len(self.image)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield {"image": self.image, "index": torch.arange(len(self.image))}


@torch.no_grad()
def answers(model: Any, image: Tensor | None = None) -> dict[str, Any]:
    """What every public method of the model answers."""
    image = pictures() if image is None else image
    samples = {"image": image, "text_input": TEXTS, "label": torch.tensor([0, 1]), "image_id": torch.tensor([0, 1])}
    samples |= {"image0": image, "image1": image.flip(0), "candidates": ["red", "two"]}
    samples |= {"caption": TEXTS}
    samples |= {"answer": ["red", "blue"], "weight": torch.ones(2), "n_answers": torch.tensor([1, 1])}
    torch.manual_seed(1)  # negatives are drawn
    found: dict[str, Any] = {"forward": model(samples)}
    calls: dict[str, dict[str, Any]] = {
        "generate": {"max_length": 12},
        "predict_answers": {"inference_method": "generate", "max_len": 6},
        "predict": {},
        "extract_features": {},
    }
    for name, settings in calls.items():
        if hasattr(model, name):
            found[name] = getattr(model, name)(samples, **settings)
    if hasattr(model, "predict_answers"):
        ranked = {"inference_method": "rank", "answer_list": ["red", "two blue", "left"]}
        found["rank"] = model.predict_answers(samples, **ranked)
    if hasattr(model, "class_losses"):
        found["class_losses"] = model.class_losses({**samples, "prompt": "{}"}, ["red", "two blue"])
    if hasattr(model, "compute_sim_matrix"):
        found["compute_sim_matrix"] = [torch.as_tensor(m) for m in model.compute_sim_matrix(Gallery(image), 1)]
    return found


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model: nn.Module) -> Any:
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    return average.module


COPIES = [copy.deepcopy, pickled, saved]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_copies_answer_alike_and_are_independent(arch: str) -> None:
    model = build(arch)
    before = answers(model)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    twins = [copied(model) for copied in (*COPIES, averaged)]
    for twin in twins:
        cli_helpers.assert_same_state(answers(twin), before)
        assert {name: p.requires_grad for name, p in twin.named_parameters()} == trainable
    part = f"{model.llm_prefix}_model" if model.llm_prefix else ""  # the language model alone, where there is one
    for twin in twins:
        for parameter in (getattr(twin, part) if part else twin).parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        changed = answers(twin)
        assert not any(torch.equal(*pair) for pair in zip(tensors(changed), tensors(before), strict=True))
        assert "generate" not in changed or changed["generate"] != before["generate"]
    cli_helpers.assert_same_state(answers(model), before)


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.slow
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("blip2", {"vit_model": "blip_tiny"}),  # a frozen encoder stays frozen
        ("blip2", {"vit_model": "vit_tiny_patch16_224", "vit": {"width": 48, "depth": 2, "num_heads": 2}}),
        ("blip2", {"use_grad_checkpoint": True, "freeze_vit": False}),
        ("blip_retrieval", {"vit_grad_ckpt": True, "vit_ckpt_layer": 2, "queue_size": 8}),
        ("blip2_opt", {"llm_lora": LORA, "llm_grad_checkpoint": True}),
        ("blip2_t5", {"llm_grad_checkpoint": True}),
    ],
    ids=["blip_encoder", "timm_encoder", "checkpointed", "checkpointed_twin", "lora", "checkpointed_t5"],
)
def test_copies_of_other_builds(arch: str, settings: dict[str, Any], copied: Callable[[Any], Any]) -> None:
    """Their gradients too: what recomputes activations recomputes the copy's."""
    model = build(arch, **settings)
    twin, before = copied(model), answers(model)
    expected = gradients(model)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.zero_()
    cli_helpers.assert_same_state(answers(twin), before)
    cli_helpers.assert_same_state(gradients(twin), expected)
    assert any(gradient.abs().sum() > 0 for gradient in expected.values())


def gradients(model: Any) -> dict[str, Tensor]:
    """Of one training step without dropout; momentum models change by it, so their copy is used."""
    model = copy.deepcopy(model)
    torch.manual_seed(2)
    model({"image": pictures(), "text_input": TEXTS, "image_id": torch.tensor([0, 1])})["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("swin_tiny_patch4_window7_224", {"width": 24}),
        ("resnet18", {}),
        ("vit_base_patch16_siglip_224", {"width": 32, "depth": 2, "num_heads": 2}),
    ],
)
def test_timm_encoders_can_be_pickled(name: str, sizes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=64, sizes=sizes).eval()
    twin = pickled(encoder)
    assert type(twin) is type(encoder)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(twin(image), encoder(image))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(arch, torch.bfloat16) for arch in ARCHITECTURES]
    + [(arch, torch.float16) for arch in ("blip_vqa", "blip2", "blip2_t5", "blip2_vicuna_instruct")],
)
def test_cast_models_answer(arch: str, dtype: torch.dtype) -> None:
    """With an image of their type, and with one of float32, which is cast."""
    model = build(arch)
    expected = answers(model)["forward"]
    model = model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    found = answers(model, pictures(dtype))
    for tensor in tensors(found):
        assert tensor.isfinite().all()
    for one, other in zip(tensors(found["forward"]), tensors(expected), strict=True):
        assert (one.float() - other.float()).norm() < 0.05 * other.float().norm()
    cli_helpers.assert_same_state(answers(model, pictures()), found)


def tensors(found: Any) -> Iterator[Tensor]:
    """Floating-point tensors in nested containers."""
    if isinstance(found, Tensor):
        if found.is_floating_point():
            yield found
    elif isinstance(found, dict):
        for name, value in found.items():
            if name not in ACCURACIES:  # a share of two samples is easily the same
                yield from tensors(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from tensors(value)
