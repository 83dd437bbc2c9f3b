"""The dry run's expected rate on a named GPU: operations by hand and of real steps; its lines; wrong names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import project
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lavis_lite.cli import throughput
from lavis_lite.cli.dry_run import build_without_weights
from lavis_lite.cli.main import train_main
from lavis_lite.common.config.agreement import model_setting
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.sections import MODEL_KEYS
from lavis_lite.common.errors import InputError
from lavis_lite.common.hardware import GPUS, known_peak, named_gpu
from lavis_lite.common.registry import registry
from lavis_lite.models.base import build_model


class TwoLayers(nn.Module):
    """3 -> 5 -> 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 1)

    def forward(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"loss": self.second(self.first(samples["image"])).mean()}


def test_the_operations_of_a_small_network() -> None:
    with torch.device("meta"):
        flops = throughput.sample_flops(TwoLayers(), {"image": torch.empty(1, 3)})
    forward, of_weights, of_the_hidden_layer = 2 * (15 + 5), 2 * (15 + 5), 2 * 5
    assert flops == forward + of_weights + of_the_hidden_layer


@pytest.mark.parametrize("name", ["caption", "pretrain"])
def test_the_operations_are_those_of_a_real_step(tmp_path: Path, name: str) -> None:
    cfg = Config.from_file(project(tmp_path, name))
    size = model_setting(cfg.model, "image_size")
    batch: dict[str, Any] = {"image": torch.zeros(1, 3, size, size), "text_input": ["a red circle"]}
    real = build_model(
        registry.get_model_class(cfg.model["arch"]),
        {key: value for key, value in cfg.model.items() if key not in MODEL_KEYS},
    ).train()
    twice = {"image": batch["image"].repeat(2, 1, 1, 1), "text_input": batch["text_input"] * 2}
    with FlopCounterMode(display=False) as counter:
        real(twice)["loss"].backward()
    found = throughput.sample_flops(build_without_weights(cfg.model), {**batch, "image": batch["image"].to("meta")})
    assert found is not None
    assert 2 * found == pytest.approx(counter.get_total_flops(), rel=0.05)


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        train_main(argv)
    found = capsys.readouterr()
    return ended.value.code, found.out, found.err


def test_the_dry_run_names_rate_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(project(tmp_path, "caption"))
    slow = ("--options", "run.peak_tflops=0.0001")
    code, out, _ = output(capsys, "--cfg-path", path, "--dry-run", "--gpu", "h200", *slow)
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("throughput "))
    assert "H200: about" in line
    assert "40% of 0.0001 TFLOP/s" in line
    assert "H200 has 139.00 GiB" in out
    assert "bfloat16" in out
    code, out, _ = output(capsys, "--cfg-path", path, "--dry-run", "--gpu", "T4")
    assert code == 0
    assert "T4: a batch" in out
    assert "20 ms" in out
    assert "float16" in out
    code, out, _ = output(capsys, "--cfg-path", path, "--dry-run", "--gpu", "T4", "--options", "run.precision=fp32")
    assert code == 0
    assert "only its rate in 16 bits is known" in out


def test_wrong_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(project(tmp_path, "caption"))
    code, _, err = output(capsys, "--cfg-path", path, "--dry-run", "--gpu", "H20O")
    assert code == 2
    assert "'H20O'" in err
    assert "H200" in err
    assert output(capsys, "--cfg-path", path, "--gpu", "H200")[0] == 2


def test_names_of_gpus() -> None:
    assert [named_gpu(name).name for name in ("4090", "a100", "H100", "l4")] == ["RTX 4090", "A100", "H100", "L4"]
    assert known_peak("NVIDIA L40S") == 362
    assert known_peak("NVIDIA L4") == 121
    assert known_peak("NVIDIA A100-SXM4-40GB") == known_peak("NVIDIA A100 80GB PCIe") == 312
    others = ("Quadro K2000", "NVIDIA L40", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA T400 4GB")
    assert [known_peak(name) for name in others] == [None] * len(others)
    assert all(gpu.tflops > 0 and gpu.gib > 0 for gpu in GPUS)


@pytest.mark.parametrize("name", ["A10", "rtx", "100"])
def test_a_part_of_several_names_is_refused(name: str) -> None:
    with pytest.raises(InputError) as error:
        named_gpu(name)
    assert repr(name) in str(error.value)
    assert all(gpu.name in str(error.value) for gpu in GPUS if name.casefold() in gpu.name.casefold())


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.123, "0.12 seconds"), (119, "120 seconds"), (121, "2 minutes"), (12_345, "3.4 hours"), (1e6, "12 days")],
)
def test_durations(seconds: float, expected: str) -> None:
    assert throughput.duration(seconds) == expected
