"""What only a GPU shows: half precision against float32, the scaler of fp16, compiled layers. `pytest -m gpu`."""

from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch

from lavis_lite.models import load_model
from lavis_lite.runners.compiling import compile_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ARCHITECTURES = ("blip_caption", "blip2", "blip2_opt", "blip2_t5")


def batch(size: int = 48) -> dict[str, Any]:
    """A batch of random images and short texts on the GPU."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(4, 3, size, size, generator=generator).cuda()
    return {"image": image, "text_input": ["a red circle", "two stars", "a blue square left of it", "a cross"]}


def loss_of(model: Any, samples: dict[str, Any], dtype: torch.dtype = torch.float32) -> float:
    torch.manual_seed(2)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        return float(model(samples)["loss"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_losses_in_bf16_are_within_two_percent(arch: str) -> None:
    torch.manual_seed(0)
    model = load_model(arch, "tiny", is_eval=True, device="cuda")
    samples = batch()
    assert loss_of(model, samples, torch.bfloat16) == pytest.approx(loss_of(model, samples), rel=0.02)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_layers_have_the_same_loss(arch: str) -> None:
    torch.manual_seed(0)
    model = load_model(arch, "tiny", is_eval=True, device="cuda")
    samples = batch()
    loss = loss_of(model, samples)
    compile_layers(model, "model")
    assert loss_of(model, samples) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_learns_in_each_precision(precision: str, tmp_path: Path) -> None:
    path = cli_helpers.project(tmp_path, "caption", {"run": {"max_iters": 30, "test_splits": [], "log_freq": 10}})
    assert cli_helpers.train(path, "run.device=cuda", f"run.precision={precision}") == 0
    losses = [row["loss"] for row in cli_helpers.steps(tmp_path / "output" / "job")]
    assert losses[-1] < losses[0]
