"""Layers compiled with torch.compile compute what they did; compiled by AOTAutograd alone, which needs no compiler."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
from torch import nn

from lavis_lite.models import load_model
from lavis_lite.runners.compiling import compile_layers, repeated_layers

SAMPLES: dict[str, Any] = {"text_input": ["a red circle", "a blue square left of it"]}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    with torch.random.fork_rng(devices=[]):
        yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def step(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and all gradients at one seed."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model({"image": torch.randn(2, 3, 48, 48), **SAMPLES})["loss"]
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "part"), [("blip_caption", "encoder"), ("blip2_opt", "encoder"), ("blip_caption", "model")]
)
def test_losses_and_gradients_stay(arch: str, part: str) -> None:
    torch.manual_seed(0)
    model = load_model(arch, "tiny", is_eval=True)
    names = list(model.state_dict())
    loss, gradients = step(model)
    assert compile_layers(model, part, backend="aot_eager") > 1
    again, others = step(model)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encoder", "model"])
def test_captions_stay(part: str) -> None:
    torch.manual_seed(0)
    model = load_model("blip_caption", "tiny", is_eval=True)
    samples, settings = {"image": torch.randn(2, 3, 48, 48)}, {"num_beams": 4, "max_length": 12}
    captions = model.generate(samples, **settings)
    compile_layers(model, part, backend="aot_eager")
    assert model.generate(samples, **settings) == captions


@pytest.mark.slow
def test_longer_captions_compile_nothing_more() -> None:
    """Although keys and values grow with each token, and their memory in steps."""
    torch.manual_seed(0)
    model = load_model("blip_caption", "tiny", is_eval=True)
    compile_layers(model.text_decoder, "model", backend="eager")
    numbers = []
    for length in (24, 39):
        model.generate({"image": torch.randn(2, 3, 48, 48)}, num_beams=1, max_length=length, min_length=length)
        numbers.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert numbers[0] == numbers[1] > 0


def test_the_outermost_lists_are_found() -> None:
    model = load_model("blip2_opt", "tiny", is_eval=True)
    layers = {id(layer) for layer in repeated_layers(model)}
    expected = [*model.visual_encoder.blocks, *model.Qformer.bert.layers, *model.opt_model.model.decoder.layers]
    assert layers == {id(layer) for layer in expected}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_run_compiles(tmp_path: Path) -> None:
    """By torch's own compiler: the loss of the first step is that of a run without it."""
    losses = []
    for name in ("none", "encoder"):
        (tmp_path / name).mkdir()
        path = cli_helpers.project(tmp_path / name, "caption", {"run": {"max_iters": 1, "test_splits": []}})
        assert cli_helpers.train(path, f"run.compile={name}") == 0
        (row,) = cli_helpers.steps(tmp_path / name / "output" / "job")
        losses.append(row["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
