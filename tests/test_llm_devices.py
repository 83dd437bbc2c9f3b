"""A language model over several devices (`llm_device_map`): on a CPU, and on two GPUs of which torch knows only shapes.

Fake tensors have a device and no values, and an operation on two devices is an error as on GPUs. accelerate cannot move
them, so its function for that is replaced; its hooks are its own.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.models import load_model
from lavis_lite.nn.llm import LLMAdapter
from lavis_lite.nn.llm_devices import divided, layer_classes, spread
from lavis_lite.nn.llm_loading import load_language_model

hooks: Any = pytest.importorskip("accelerate.hooks")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def layers(model: nn.Module) -> dict[str, int]:
    """The bytes of each layer."""
    named = {name: one for name, one in model.named_modules() if type(one).__name__ in layer_classes(model)}
    return {name: sum(parameter.nbytes for parameter in one.parameters()) for name, one in named.items()}


def shared(model: nn.Module) -> dict[str, Any]:
    """A map by memory to two devices, of which the first gets the first layer and what is no layer."""
    sizes, total = layers(model), sum(parameter.nbytes for parameter in model.parameters())
    layer = max(sizes.values())
    return divided(model, {0: total - sum(sizes.values()) + 2 * layer + layer // 8, 1: total, "cpu": 10**12})


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    moved: dict[tuple[int, Any], tuple[Any, Any]] = {}

    def move(module: nn.Module, name: str, device: Any, *unused: Any, **settings: Any) -> None:
        path, _, name = name.rpartition(".")
        module = module.get_submodule(path)
        own = module._parameters if name in module._parameters else module._buffers
        before = own[name]
        assert before is not None
        if before.device != device and (id(before), device) not in moved:
            after = before.detach().to(device)
            after = nn.Parameter(after, requires_grad=False) if own is module._parameters else after
            moved[id(before), device] = after, before  # which keeps its id taken
        if before.device != device:
            own[name] = moved[id(before), device][0]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(hooks, "set_module_tensor_to_device", move)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("source", ["tiny_opt", "tiny_vicuna", "tiny_t5"])
def test_every_tensor_follows_its_layer(source: str, two_gpus: None) -> None:
    model, _ = load_language_model(source, dtype=torch.float32, frozen=True)
    spread(model, shared(model))
    assert {parameter.device for parameter in model.parameters()} == {FIRST, SECOND}
    lm = LLMAdapter(model, start_id=1, end_id=2, pad_id=0)
    mask = torch.ones(2, 5, dtype=torch.long, device=FIRST)
    embeds = lm.embed(mask)
    assert (embeds.device, lm.embed(mask.to(SECOND)).device) == (FIRST, SECOND)
    prefix = lm.prefix(embeds, mask)
    assert prefix.logits.device == prefix.cache.mask.device == FIRST
    new, rows = torch.ones(6, 1, dtype=torch.long, device=FIRST), torch.arange(6, device=FIRST)
    _, cache = lm.extend(prefix.cache.expand(3), new)
    logits, cache = lm.extend(cache.select(rows), new)
    assert logits.device == lm.extend(prefix.cache.rows(rows % 2), new)[0].device == FIRST
    of_text = {layer.keys.device for layer in cache._read_by_text.layers}
    assert of_text == ({SECOND} if lm.is_encoder_decoder else {FIRST, SECOND})
    with lm._scored.only(torch.arange(3, device=FIRST)):
        assert lm.logits(embeds, mask, mask).device == FIRST


@pytest.mark.parametrize("source", ["tiny_opt", "tiny_t5"])
def test_a_map_by_memory_divides_no_layer(source: str) -> None:
    with torch.device("meta"):
        model, _ = load_language_model(source, dtype=torch.float32)
    places, sizes = shared(model), layers(model)
    of_layers = {layer: {d for place, d in places.items() if f"{layer}.".startswith(f"{place}.")} for layer in sizes}
    assert {len(devices) for devices in of_layers.values()} == {1}
    assert set.union(*of_layers.values()) == {0, 1}
    with pytest.raises(InputError, match=r"llm_device_map: .* do not fit"):
        divided(model, {0: max(sizes.values()), 1: max(sizes.values()), "cpu": 10**12})


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_t5_instruct"])
def test_hooks_change_no_output(arch: str) -> None:
    outputs = []
    for settings in ({}, {"llm_device_map": {"": "cpu"}}):
        torch.manual_seed(0)
        model = load_model(arch, "tiny", is_eval=True, **settings)
        image = torch.linspace(-1, 1, 2 * 3 * 48 * 48).view(2, 3, 48, 48)
        samples = {"image": image, "text_input": ["a cat", "what is it"], "prompt": "a", "text_output": ["x", "a dog"]}
        written = model.generate(dict(samples), num_beams=3, max_length=9, return_scores=True)
        losses = model.class_losses(dict(samples), ["red", "a blue one"])
        outputs.append((written, losses.tolist(), model(dict(samples))["loss"].item()))
    assert "_hf_hook" in vars(model.lm.model)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ("auto", "needs a GPU"),
        ("balanced", "'balanced'"),
        ({"model.decoder.layer": "cpu"}, "no module 'model.decoder.layer'"),
        ({"": "cuda:7"}, "unknown device 'cuda:7'"),
        ({"model": 0, "lm_head": "cpu"}, "GPUs and the CPU"),
        ({"model": 0, "model.decoder.layers.0": 1}, "'model' contains 'model.decoder.layers.0'"),
        ({"model.decoder.layers.0.fc1": "cpu"}, "part of a layer"),
        ({"model.decoder.layers": "cpu"}, "no device for model.decoder.embed_tokens.weight"),
        ({"model": 0, "lm_head": 1}, "lm_head.weight are one tensor"),
    ],
)
def test_a_map_that_cannot_be_is_refused(device_map: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with torch.device("meta"):
        model, _ = load_language_model("tiny_opt", dtype=torch.float32)
    with pytest.raises(InputError, match=f"model.llm_device_map: .*{words}"):
        spread(model, device_map)
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="quantized"):
        spread(model, device_map)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingPackageError, match="pip install accelerate"):
        spread(model, device_map)


def test_a_training_is_refused(tmp_path: Path, shapes_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opt = {"model": {"arch": "blip2_opt", "model_type": "tiny", "llm_device_map": "auto"}}
    path = cli_helpers.project(tmp_path, "caption")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | opt))
    assert cli_helpers.train(path, flags=["--dry-run"]) == 2
    assert "model.llm_device_map: is for evaluations" in capsys.readouterr().err
