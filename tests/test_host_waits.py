"""Nothing in a training step, and little in decoding, waits for the device: on a simulated device, and on CUDA."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest
import torch
import yaml
from host_waits import DEVICE, simulated
from tiny_trainings import RUN, SHAPES, SIZES, TRAININGS

from lavis_lite.cli import main as cli
from lavis_lite.common import transfer
from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import NonFiniteLoss
from lavis_lite.common.registry import registry
from lavis_lite.models import load_model
from lavis_lite.models.blip.vqa import question_of_answer
from lavis_lite.models.reranking import similarity_matrices
from lavis_lite.runners import train_loop
from lavis_lite.runners.progress import Progress
from lavis_lite.runners.stopping import StopSignals

STEPS = 3
QUICK = ("blip_pretrain", "blip_vqa_rank", "blip2_opt", "blip2_t5")
CLASSES = {"num_classes": 3}
OWN = {
    "blip_classification": ({"arch": "blip_classification", **CLASSES}, cli_helpers.classification_set),
    "blip_image_classification": ({"arch": "blip_image_classification", **CLASSES}, cli_helpers.classification_set),
    "blip_visdial": ({"arch": "blip_visdial"}, cli_helpers.dialog_set),
}
"""Trainings on files: the model, and what writes them."""
NAMES = [*TRAININGS, *OWN]
MANY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
UNTRAINED = {"blip_feature_extractor", "blip_image_text_matching", "blip2_feature_extractor"} | {
    "blip2_image_text_matching",
    "clip_feature_extractor",
}
pytestmark = pytest.mark.usefixtures("shapes_data")


class Enough(Exception):
    """The steps that are looked at are taken."""


def recipe(name: str, folder: Path, device: str) -> Path:
    """Write the YAML of a training without log lines, checkpoints and validations within its first steps."""
    if name in OWN:
        model, write = OWN[name]
        kind = "visual_dialog" if name == "blip_visdial" else "classification"
        task = "instruct" if name == "blip_visdial" else "multimodal_classification"
        datasets, run = {kind: write(folder)}, {"task": task}
        model = {"model_type": "tiny", **model}
    else:
        model, sets, run = TRAININGS[name]
        own = sets if isinstance(sets, dict) else {key: {} for key in sets}
        model = {**SIZES, **model}
        datasets = {f"shapes_{key}": {**SHAPES, **fields} for key, fields in own.items()}
    quiet = {"log_freq": 100, "valid_splits": [], "test_splits": [], "precision": "fp32", "max_iters": 9}
    quiet |= {"device": device, "output_dir": str(folder), "accum_grad_iters": 2, "batch_size_train": 3}
    path = folder / f"{name}.yaml"
    body = {"model": model, "datasets": datasets, "run": {**RUN, **run, **quiet, "grad_clip_norm": 1.0}}
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


@contextlib.contextmanager
def stopping_after(steps: int, monkeypatch: pytest.MonkeyPatch, after_first: Any) -> Iterator[None]:
    """End a training after some steps; `after_first` is called after the first one, which may wait."""
    taken: list[int] = []

    def advance(self: Progress) -> None:
        taken.append(1)
        if len(taken) == 1:
            after_first()
        if len(taken) == steps:
            raise Enough

    monkeypatch.setattr(Progress, "advance", advance)
    with pytest.raises(Enough):
        yield


@pytest.mark.parametrize("name", MANY)
def test_a_step_waits_for_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_loop, "autocast", lambda *_: contextlib.nullcontext())  # the device has none
    path = recipe(name, tmp_path, DEVICE.type)
    with simulated(monkeypatch) as waits, stopping_after(STEPS, monkeypatch, waits.found.clear):
        cli.run(Config.from_file(path), StopSignals())
    assert waits.found == []
    assert waits.num_operations > 1000  # that the steps ran there


def test_losses_are_read_late_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_loop, "MAX_UNREAD", 4)
    guard, values = train_loop.FiniteGuard(), [1.0, float("nan"), 2.0]
    with simulated(monkeypatch) as waits:
        for step, value in enumerate(values):
            guard.update(step, 0.5, ("loss",), transfer.upload(torch.tensor([value]), DEVICE))
        assert waits.found == []
        with pytest.raises(NonFiniteLoss, match=r"at step 2: loss nan; learning rate 0\.5"):
            guard.update(3, 0.5, ("loss",), transfer.upload(torch.tensor([1.0]), DEVICE))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_nothing_on_cuda(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(name, tmp_path, "cuda")
    try:
        with stopping_after(STEPS, monkeypatch, lambda: torch.cuda.set_sync_debug_mode("error")):
            cli.run(Config.from_file(path), StopSignals())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_architecture_that_trains_is_walked() -> None:
    walked = {model["arch"] for model, *_ in [*TRAININGS.values(), *OWN.values()]}
    assert walked == set(registry.list_models()) - UNTRAINED


WAITING = {
    "a value": lambda x: int(x.sum()),
    "a truth": lambda x: bool(x.any()),
    "a list": lambda x: x.tolist(),
    "places": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 1],
    "another number of rows": lambda x: x.repeat_interleave(x.long()),
    "a draw": lambda x: torch.multinomial(x, 1),
    "a list to the device": lambda x: torch.tensor([1, 2], device=x.device),
    "a new tensor": lambda x: x.new_tensor([1, 2]),
    "a copy to the device": lambda x: torch.ones(2).to(x.device),
    "an unpinned copy": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "a copy to the host": lambda x: x.cpu(),
    "a copy into the device": lambda x: x.copy_(torch.ones(3)),
}
FREE = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(0),
    "a pinned copy": lambda x: torch.ones(2).pin_memory().to(x.device, non_blocking=True),
    "rows by number": lambda x: x[torch.arange(2, device=x.device)],
    "a known number of rows": lambda x: x.repeat_interleave(x.long(), output_size=6),
    "the host's own": lambda x: torch.ones(2).tolist(),
}


@pytest.mark.parametrize("what", [*WAITING, *FREE])
def test_the_simulation_knows_what_waits(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch) as waits:
        x = torch.tensor([1.0, 2.0, 3.0]).to(DEVICE)
        waits.found.clear()
        (WAITING | FREE)[what](x)
    assert bool(waits.found) == (what in WAITING), waits.found


def test_the_simulation_computes_what_a_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for device in ("cpu", DEVICE):
        with simulated(monkeypatch):
            torch.manual_seed(0)
            layer = torch.nn.Linear(3, 2).to(device)
            loss = layer(torch.ones(4, 3).to(device)).square().mean()
            loss.backward()
            assert layer.weight.grad is not None
            found[str(device)] = [loss.item(), layer.weight.grad.tolist()]
    assert found["cpu"] == found[str(DEVICE)]


PHOTOS = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
DECODERS = [
    ("blip_caption", "greedy"),
    *(
        pytest.param(arch, search, marks=pytest.mark.slow)
        for arch, search in [("blip2", "beams"), ("blip2_opt", "beams"), ("blip2_opt", "greedy"), ("blip2_t5", "beams")]
    ),
]
SEARCHES: dict[str, dict[str, Any]] = {"greedy": {"num_beams": 1}, "beams": {"num_beams": 3}}


def decoder(arch: str) -> Any:
    torch.manual_seed(0)
    return load_model(arch, "tiny", is_eval=True, device="cpu")


def captions(model: Any, prompts: list[str], **settings: Any) -> list[Any]:
    """Captions of three photos, with their scores."""
    return model.generate({"image": PHOTOS.to(model.device), "prompt": prompts}, return_scores=True, **settings)


@pytest.mark.parametrize(("arch", "search"), DECODERS)
def test_decoding_seldom_waits_and_writes_the_same(arch: str, search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wait per eight tokens, and some per call."""
    prompts = ["a", "a photo of", "a"] if arch.startswith("blip2_") else ["a"] * 3
    settings = {**SEARCHES[search], "min_new_tokens": 2}
    model, numbers, found = decoder(arch), [], []
    expected = captions(model, prompts, max_new_tokens=19, **settings)
    with simulated(monkeypatch) as waits:
        model = model.to(DEVICE)
        for num_tokens in (3, 19):
            waits.found.clear()
            found = captions(model, prompts, max_new_tokens=num_tokens, **settings)
            numbers.append(len(waits.found))
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected])
    assert numbers[1] - numbers[0] <= 2, waits.found


def test_reranking_does_not_wait_for_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts, numbers = cli_helpers.build("retrieval").eval(), [f"a {word} circle" for word in ["red", "big"]], []
    expected = similarity_matrices(model, Gallery(PHOTOS, texts), 1)
    with simulated(monkeypatch) as waits:
        model = model.to(DEVICE)
        for photos in (torch.cat([PHOTOS, PHOTOS]), PHOTOS):
            waits.found.clear()
            found = similarity_matrices(model, Gallery(photos.to(DEVICE), texts), 1)
            numbers.append(len(waits.found))
    assert numbers[0] == numbers[1], waits.found
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)


class Gallery:
    """Photos in one batch, and texts, as the loader of an evaluation."""

    def __init__(self, image: torch.Tensor, text: list[str]) -> None:
        self.image, self.dataset = image, GallerySet(len(image), text)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"image": self.image, "index": list(range(len(self.image)))}


class GallerySet:
    """The number of images, and the texts."""

    def __init__(self, num_images: int, text: list[str]) -> None:
        self.num_images, self.text = num_images, text

    def __len__(self) -> int:
        return self.num_images


def test_numbers_of_answers_that_do_not_add_up_end_the_run_on_a_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a wait; the device stops at the operation."""
    with simulated(monkeypatch) as waits:
        numbers = transfer.upload(torch.tensor([1, 2]), DEVICE)
        assert question_of_answer({"n_answers": numbers}, 2, 3, DEVICE).shape == (3,)
        assert waits.found == []
        with pytest.raises(RuntimeError, match=r"n_answers.*does not add up"):
            question_of_answer({"n_answers": numbers}, 2, 4, DEVICE)
