"""What the log says about speed and memory, and the profile."""

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cli_helpers
import pytest
import torch
from torch import nn

from lavis_lite.common.hardware import known_peak
from lavis_lite.runners import speed as speed_module
from lavis_lite.runners.profiling import TABLE, TRACE, WARM_UP
from lavis_lite.runners.speed import Speed, peak_tflops

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("shapes_data")


class Clock:
    """A clock that tests set."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed_module, "time", clock)
    return clock


class Reader(nn.Module):
    """Counts tokens."""

    num_text_tokens = 7


def test_rates_are_of_the_time_since_the_last_row(clock: Clock) -> None:
    model = Reader()
    speed = Speed(model, CPU, peak_tflops=1e-6)
    speed.step_flops = 5e5
    with speed.waiting():
        clock.now += 1.0
    clock.now += 2.0
    with speed.paused():
        clock.now += 50.0
    clock.now += 1.0
    speed.num_steps, model.num_text_tokens = 8, 27
    values = speed.values(global_batch=6)
    assert values.pop("max_resident_gb") > 0
    assert values == {"samples_per_s": 12.0, "tokens_per_s": 5.0, "data_wait": 0.25, "mfu": 1.0}
    speed.begin()
    clock.now += 1.0
    values = speed.values(global_batch=6)
    assert "tokens_per_s" not in values
    assert values["data_wait"] == 0


def test_operations_are_those_of_the_first_step() -> None:
    """Of a linear layer 3 -> 5 for 4 rows: 2 x 4 x 3 x 5 forward, as much for the weight's gradient."""
    layer = nn.Linear(3, 5)
    speed = Speed(layer, CPU, peak_tflops=1.0)
    for rows in (4, 400):
        with speed.counting():
            layer(torch.ones(rows, 3)).sum().backward()
    assert speed.step_flops == 2 * (2 * 4 * 3 * 5)
    unknown = Speed(layer, CPU)
    with unknown.counting():
        layer(torch.ones(4, 3))
    assert unknown.step_flops is None
    assert "mfu" not in unknown.values(global_batch=1)


@pytest.mark.parametrize(
    ("name", "dtype", "own", "expected"),
    [
        ("NVIDIA H200", torch.bfloat16, None, 989.0),
        ("NVIDIA H200", torch.float32, None, None),
        ("NVIDIA H200", torch.float32, 60.0, 60.0),
        ("NVIDIA GeForce GTX 1080", torch.float16, None, None),
    ],
)
def test_the_peak_is_known_or_given(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, own: float | None, expected: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    run: Any = SimpleNamespace(peak_tflops=own)
    assert peak_tflops(run, torch.device("cuda", 0), dtype) == expected
    assert peak_tflops(run, CPU, dtype) == own
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312.0


@pytest.mark.parametrize("recipe", ["caption", "nlvr"])
def test_every_row_has_rates_and_memory(recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    quiet = {"run": {"valid_splits": [], "test_splits": [], "max_iters": 3, "peak_tflops": 1.0}}
    assert cli_helpers.train(cli_helpers.project(tmp_path, recipe, quiet)) == 0
    rows = cli_helpers.steps(tmp_path / "output/job")
    assert len(rows) == 3
    for row in rows:
        assert row["samples_per_s"] > 0
        assert row["tokens_per_s"] > row["samples_per_s"]  # each text has several tokens
        assert 0 < row["data_wait"] < 1
        assert 0 < row["mfu"] < 1
        assert 0.1 < row["max_resident_gb"] < 100
    lines = [record.message for record in caplog.records if "time left" in record.message]
    for part in (" samples/s  ", " tokens/s  ", "data wait ", "MFU ", " GB  time left"):
        assert all(part in line for line in lines)


def shown(job: Path) -> dict[str, list[list[str]]]:
    """The blocks of a profile's table by their header, as lists of cells."""
    blocks = (job / TABLE).read_text().strip().split("\n\n")[1:]
    return {block.split("  ")[0]: [line.rsplit(maxsplit=4) for line in block.splitlines()[1:]] for block in blocks}


def test_a_training_is_profiled(tmp_path: Path) -> None:
    run = {"valid_splits": [], "test_splits": [], "max_iters": WARM_UP + 3, "max_epoch": 9, "log_freq": 100}
    path = cli_helpers.project(tmp_path, "caption", {"run": run})
    assert cli_helpers.train(path, flags=["--profile", "2"]) == 0
    job = tmp_path / "output/job"
    found = shown(job)
    assert (job / TABLE).read_text().startswith("profile of 2 steps of ")
    phases = {cells[0]: float(cells[2].removesuffix("%")) for cells in found["phase"]}
    assert [*phases] == ["data", "forward", "backward", "optimizer", "other"]
    assert sum(phases.values()) == pytest.approx(100, abs=0.5)
    assert min(phases["forward"], phases["backward"]) > max(phases["data"], phases["other"]) / 10
    assert {cells[0] for cells in found["forward pass of"]} == {"visual_encoder", "text_decoder"}
    assert any(cells[0] == "aten::addmm" and float(cells[4]) >= 1 for cells in found["operation"])
    trace = json.loads(gzip.decompress((job / TRACE).read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("forward") == 2
    saved = json.loads((job / "log.txt").read_text().splitlines()[-1])
    assert "result" in saved  # training went on


def test_an_evaluation_is_profiled(tmp_path: Path) -> None:
    run = {"valid_splits": [], "test_splits": ["test"], "batch_size_eval": 1}
    path = cli_helpers.project(tmp_path, "nlvr", {"run": run})
    assert cli_helpers.evaluate(path, flags=["--profile", "2"]) == 0
    found = shown(tmp_path / "output/evaluation")
    assert [cells[0] for cells in found["phase"]] == ["data", "other"]
    assert {cells[0] for cells in found["forward pass of"]} == {"visual_encoder", "text_encoder", "cls_head"}


def test_too_few_steps_for_a_profile_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = {"valid_splits": [], "test_splits": [], "max_iters": WARM_UP}
    assert cli_helpers.train(cli_helpers.project(tmp_path, "nlvr", {"run": run}), flags=["--profile", "2"]) == 0
    assert "nothing was profiled" in caplog.text
    assert not (tmp_path / "output/job" / TABLE).exists()
