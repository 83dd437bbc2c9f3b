"""The training loop on a toy regression: exact resume after a kill, ranks, accumulation, best weights, errors.

Run as a script (`python tests/test_runner.py JOB_DIR key=value ...`) it is one training process, which tests kill or
start under torchrun's environment.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from torch import nn
from torch.utils.data import Dataset

from lavis_lite.common import checkpoint, dist
from lavis_lite.common import precision as precisions
from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import NonFiniteLoss, UnreadableSample
from lavis_lite.common.logger import JsonLog
from lavis_lite.common.optim import parameter_groups
from lavis_lite.common.precision import resolve_precision
from lavis_lite.common.registry import registry
from lavis_lite.common.rng import seed_everything
from lavis_lite.runners.plan import make_plan
from lavis_lite.runners.runner import Runner
from lavis_lite.runners.train_loop import FiniteGuard
from lavis_lite.tasks.base import BaseTask

RUN: dict[str, Any] = {
    "task": "toy",
    "init_lr": 0.05,
    "warmup_lr": 0.01,
    "warmup_steps": 3,
    "max_epoch": 2,
    "batch_size_train": 4,
    "batch_size_eval": 3,
    "num_workers": 0,
    "valid_splits": ["val"],
    "test_splits": ["test"],
    "device": "cpu",
    "log_freq": 1,
    "tensorboard": False,
}


class Config:
    """What a Runner reads of a configuration."""

    def __init__(self, **changes: Any) -> None:
        self.run = RunConfig(**{**RUN, **changes})
        self.model: dict[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"run": asdict(self.run)}


class Line(Dataset):
    """y = x @ [1, -2, 3] with noise drawn at reading, so that the order of random numbers matters."""

    def __init__(self, split: str, length: int, *, broken: bool = False, name: str = "") -> None:
        self.split, self.broken, self.name = split, broken, name
        self.x = torch.randn(length, 3, generator=torch.Generator().manual_seed(length))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.broken:
            raise UnreadableSample(f"broken{index}.jpg is cut short.")
        noise = 0.1 * torch.randn(()) if self.split == "train" else 0.0
        y = self.x[index] @ torch.tensor([1.0, -2.0, 3.0]) + noise
        return {"x": self.x[index], "y": y, "instance_id": f"{self.name}{index}"}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Stacks tensors."""
        ids = [s["instance_id"] for s in samples]
        return {key: torch.stack([s[key] for s in samples]) for key in ("x", "y")} | {"instance_id": ids}


class Toy(nn.Module):
    """A two-layer regression with dropout; frozen and random parts like a real model's."""

    def __init__(self, *, dropout: float = 0.5) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 8).requires_grad_(False)
        self.hidden, self.head, self.dropout = nn.Linear(8, 16), nn.Linear(16, 1), nn.Dropout(dropout)
        self.register_buffer("queue", torch.randn(2))
        self.seen: list[tuple[int, int, int]] = []

    def forward(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Mean squared error."""
        if self.training:
            self.seen.append((samples["epoch"], samples["iters"], samples["num_iters_per_epoch"]))
        hidden = self.dropout(torch.relu(self.hidden(self.encoder(samples["x"]))))
        prediction = self.head(hidden).squeeze(-1)
        loss = (prediction.float() - samples["y"]).square().mean()
        return {"loss": loss, "loss_mse": loss.detach(), "prediction": prediction}

    def optimizer_groups(self, weight_decay: float, lr_layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """As BaseModel's."""
        return parameter_groups(self, weight_decay, lambda name: lr_layer_decay if name.startswith("hidden") else 1.0)

    def checkpoint_state_dict(self) -> dict[str, torch.Tensor]:
        """Without what is frozen."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("encoder")}


class ToyTask(BaseTask):
    """Trains on the model's loss; evaluates to minus the mean squared error, and counts whom it saw."""

    def __init__(self, *, metrics: list[float] | None = None, poison: int | None = None) -> None:
        self.metrics, self.poison, self.steps = metrics, poison, 0
        self.dtypes: list[torch.dtype] = []

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's losses; at step `poison` not a number."""
        losses = model(samples)
        self.dtypes.append(losses["prediction"].dtype)
        self.steps += 1
        if self.steps == self.poison:
            losses["loss"] = losses["loss"] * float("nan")
        return losses

    def evaluate(self, model: nn.Module, loader: Any, *, split: str, result_dir: Path) -> dict[str, Any]:
        """Mean over all ranks' samples."""
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(1)  # sampling in evaluation moves the generator
        rows = []
        for batch in loader:
            errors = (model(batch)["prediction"].float() - batch["y"]).square()
            rows += zip(batch["instance_id"], errors.tolist(), strict=True)
        rows = sorted(dist.gather_objects(rows))
        mse = sum(error for _, error in rows) / len(rows)
        metrics = {"mse": mse, "num": len({name for name, _ in rows}), "agg_metrics": -mse}
        if self.metrics is not None and split == "val":
            metrics["agg_metrics"] = self.metrics.pop(0)
        return metrics


def toy_data(**splits: int) -> dict[str, dict[str, Dataset]]:
    lengths = splits or {"train": 22, "val": 5, "test": 7}
    return {"line": {split: Line(split, length) for split, length in lengths.items()}}


def mixed_data() -> dict[str, dict[str, Dataset]]:
    """Two training sets whose samples' ids begin with their name; eight steps of 4 samples are an epoch."""
    lengths = {"few": {"train": 8, "val": 3}, "many": {"train": 24, "val": 5}}
    return {name: {s: Line(s, n, name=name) for s, n in splits.items()} for name, splits in lengths.items()}


def make(
    job_dir: Path, *, task: ToyTask | None = None, dropout: float = 0.5, data: Any = None, **changes: Any
) -> Runner:
    cfg = Config(**changes)
    seed_everything(cfg.run.seed)
    runner_class = registry.get_runner_class(cfg.run.runner)
    return runner_class(cfg, task or ToyTask(), Toy(dropout=dropout), data or toy_data(), job_dir)


def rows(job_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job_dir / "log.txt").read_text().splitlines()]


def losses(job_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(job_dir) if "loss" in row}


def last(job_dir: Path) -> dict[str, Any]:
    return checkpoint.load(job_dir / "checkpoint_last.pth")


def script_main(job_dir: str, *options: str) -> None:
    """One process of a training; `die_at=N` kills it in step N by SIGKILL, `mixed=true` takes `mixed_data`."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    changes = {key: json.loads(value) for key, value in (option.split("=", 1) for option in options)}
    die_at, dropout = changes.pop("die_at", None), changes.pop("dropout", 0.5)
    data = mixed_data() if changes.pop("mixed", False) else None
    task = ToyTask()
    if die_at is not None:
        task.train_step = lambda model, samples: die_or(task, model, samples, die_at=die_at)
    dist.init("cpu")
    make(Path(job_dir), task=task, dropout=dropout, data=data, **changes).train()
    dist.shutdown()


def die_or(task: ToyTask, model: nn.Module, samples: dict[str, Any], *, die_at: int) -> dict[str, torch.Tensor]:
    """A train_step that is the last one."""
    if samples["epoch"] * samples["num_iters_per_epoch"] + samples["iters"] == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return ToyTask.train_step(task, model, samples)


def assert_equal(found: Any, expected: Any) -> None:
    """Equal bit for bit, through nested containers of tensors and plain values."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize(("die_at", "accumulate"), [(4, 1), (8, 2)])
def test_killed_and_resumed_equals_not_killed(tmp_path: Path, die_at: int, accumulate: int) -> None:
    """Dropout on, shuffling on, two workers, clipping, accumulation; killed in the first and in the second epoch."""
    changes = {"num_workers": 2, "checkpoint_every": 3, "grad_clip_norm": 1.0}
    changes |= {"batch_size_train": 4 // accumulate, "accum_grad_iters": accumulate}
    make(tmp_path / "straight", **changes).train()
    options = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    assert warm.start(__file__, tmp_path / "killed", *options, f"die_at={die_at}").wait(300) == -signal.SIGKILL
    assert 0 < last(tmp_path / "killed")["step"] <= die_at
    make(tmp_path / "killed", resume="auto", **changes).train()
    one, two = last(tmp_path / "straight"), last(tmp_path / "killed")
    for key in ("model", "ranks"):
        assert_equal(two[key], one[key])
    assert_equal(two["optimizer"]["state"], one["optimizer"]["state"])
    for key in ("step", "epoch", "best"):
        assert two[key] == one[key]
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert one["step"] == 10
    test_rows = [[row for row in rows(tmp_path / job) if row.get("split") == "test"] for job in ("straight", "killed")]
    assert test_rows[0] == test_rows[1]


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Without dropout, at the same global batch; the evaluation sets (5 and 1 samples) don't divide by the ranks."""
    options = ("batch_size_train=1", "dropout=0", "accum_grad_iters=2", "max_epoch=1")
    ranks = warm.start(__file__, tmp_path / "two", *options, world=2)
    make(tmp_path / "one", dropout=0, max_epoch=1).train()
    assert ranks.wait(300) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two) == list(one) == [1, 2, 3, 4, 5]
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    for key, value in last(tmp_path / "one")["model"].items():
        torch.testing.assert_close(last(tmp_path / "two")["model"][key], value, rtol=1e-4, atol=1e-6)
    metrics = [[row["metrics"] for row in rows(tmp_path / job) if "split" in row] for job in ("one", "two")]
    for alone, together in zip(*metrics, strict=True):
        assert together == pytest.approx(alone, rel=1e-4)
    assert len(last(tmp_path / "two")["ranks"]) == 2


class Recorder(ToyTask):
    """A task that records the samples of each training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[list[str]] = []

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's losses."""
        self.ids.append(samples["instance_id"])
        return super().train_step(model, samples)


def test_accumulated_batches_are_one_larger_batch(tmp_path: Path) -> None:
    """Two epochs of batches of 8, and of 2 accumulated by 4: the same samples, steps, schedule, log and weights."""
    tasks = {"large": Recorder(), "accumulated": Recorder()}
    division = {
        "large": {"batch_size_train": 8},
        "accumulated": {"batch_size_train": 2, "accum_grad_iters": 4, "num_workers": 1},
    }
    changes = {"dropout": 0, "data": toy_data(train=45, val=5, test=7), "grad_clip_norm": 1.0, "checkpoint_every": 2}
    for job, task in tasks.items():
        runner = make(tmp_path / job, task=task, **changes, **division[job])
        runner.train()
        assert runner.training.plan.total == 10
    large, accumulated = tasks.values()
    assert list(itertools.chain(*accumulated.ids)) == list(itertools.chain(*large.ids))
    one, other = ([row for row in rows(tmp_path / job) if "loss" in row] for job in tasks)
    assert [row["step"] for row in other] == list(range(1, 11))
    for key in ("step", "epoch", "lr"):
        assert [row[key] for row in other] == [row[key] for row in one]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in other] == pytest.approx([row[key] for row in one], rel=1e-5)
    first, second = (last(tmp_path / job) for job in tasks)
    for key, value in first["model"].items():
        torch.testing.assert_close(second["model"][key], value, rtol=1e-4, atol=1e-6)
    assert [int(state["step"]) for state in second["optimizer"]["state"].values()] == [10] * 4


def test_a_run_continues_with_its_global_batch_divided_otherwise(tmp_path: Path) -> None:
    """From batches of 4 to batches of 2 accumulated by 2, within an epoch."""
    changes = {"dropout": 0, "checkpoint_every": 3, "keep_checkpoints": 9}
    make(tmp_path / "whole", **changes).train()
    path = str(tmp_path / "whole" / "checkpoint_3.pth")
    make(tmp_path / "divided", resume_ckpt_path=path, batch_size_train=2, accum_grad_iters=2, **changes).train()
    one, two = losses(tmp_path / "whole"), losses(tmp_path / "divided")
    assert list(two) == list(range(4, 11))
    assert list(two.values()) == pytest.approx([one[step] for step in two], rel=1e-5)


def test_counts_are_of_steps_not_of_batches(tmp_path: Path) -> None:
    """`max_iters`, `iters_per_inner_epoch`, `log_freq`, `checkpoint_every` and the ramps' position."""
    changes = {"runner": "runner_iter", "max_iters": 8, "iters_per_inner_epoch": 3, "checkpoint_every": 2}
    division = {"batch_size_train": 2, "accum_grad_iters": 2}
    runner = make(tmp_path, log_freq=4, keep_checkpoints=9, **changes, **division)
    runner.train()
    positions = [(0, 0, 3), (0, 1, 3), (0, 2, 3), (1, 0, 3), (1, 1, 3), (1, 2, 3), (2, 0, 3), (2, 1, 3)]
    assert runner.model.seen == [position for position in positions for _ in range(2)]
    assert list(losses(tmp_path)) == [3, 4, 6, 8]
    kept = sorted(int(path.stem[11:]) for path in tmp_path.glob("checkpoint_[0-9]*.pth"))
    assert kept == [2, 3, 4, 6, 8]


def test_gradients_travel_once_per_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local: list[int] = []

    @contextlib.contextmanager
    def no_sync() -> Iterator[None]:
        local.append(len(runner.model.seen))
        yield

    runner = make(tmp_path, batch_size_train=2, accum_grad_iters=3, max_epoch=1)
    monkeypatch.setattr(dist, "data_parallel", lambda model, **options: (model, no_sync))
    runner.train()
    assert local == [0, 1, 3, 4, 6, 7]  # of the three batches of each step, all but the last


def test_samples_know_the_epoch_and_schedule_is_per_step(tmp_path: Path) -> None:
    runner = make(tmp_path, lr_layer_decay=0.5)
    runner.train()
    assert runner.model.seen == [(epoch, it, 5) for epoch in range(2) for it in range(5)]
    lrs = [row["lr"] for row in rows(tmp_path) if "lr" in row]
    cosine = [0.025 * (1 + math.cos(math.pi * k / 7)) for k in range(7)]
    assert lrs == pytest.approx([0.01, 0.01 + 0.04 / 3, 0.01 + 0.08 / 3, *cosine])
    rates = {group["lr"] / group["lr_scale"] for group in runner.training.state.optimizer.param_groups}
    assert list(rates) == pytest.approx([cosine[-1]])
    assert {group["lr_scale"] for group in runner.training.state.optimizer.param_groups} == {0.5, 1.0}


def test_what_a_run_leaves(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "checkpoint_99.pth").touch()  # of an earlier run that came further; the newest is what is kept
    result = make(tmp_path, tensorboard=True, keep_checkpoints=1, num_workers=0).train()
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {
        "config.yaml",
        "log.txt",
        "tensorboard",
        "checkpoint_last.pth",
        "checkpoint_best.pth",
        "checkpoint_10.pth",
    }
    assert (
        yaml.safe_load((tmp_path / "config.yaml").read_text())
        == Config(tensorboard=True, keep_checkpoints=1, num_workers=0).to_dict()
    )
    assert any((tmp_path / "tensorboard").iterdir())
    row = rows(tmp_path)[0]
    assert {"step", "epoch", "lr", "loss", "loss_mse", "samples_per_s"} <= set(row)
    assert "prediction" not in row
    assert result["test"]["test"]["num"] == 7
    assert "encoder.weight" not in last(tmp_path)["model"]


@pytest.mark.slow
def test_events_outlive_a_process_that_does_not_close_them(tmp_path: Path) -> None:
    """As an evaluation's, and those of a training that fails."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    code = "import sys; from lavis_lite.common.logger import TensorBoardLog\n"
    code += "TensorBoardLog(sys.argv[1]).write({'a': 1.0}, step=1)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["a"]


@pytest.mark.parametrize(
    ("metrics", "best"),
    [
        ([0.2, 0.9, 0.5], 1),
        ([-3.0, -2.0, -9.0], 1),
        ([0.0, 0.0, 0.0], 0),
        ([math.nan, 0.2, 0.1], 1),
        ([0.2, math.nan, 0.1], 0),
    ],
)
def test_best_weights_are_tested(tmp_path: Path, metrics: list[float], best: int) -> None:
    runner = make(tmp_path, task=ToyTask(metrics=list(metrics)), max_epoch=3)
    result = runner.train()
    saved = checkpoint.load(tmp_path / "checkpoint_best.pth")
    assert result["best"] == saved["best"] == {"metric": metrics[best], "epoch": best}
    assert saved["step"] == 5 * (best + 1)
    torch.testing.assert_close(dict(runner.model.state_dict()), {**runner.model.state_dict(), **saved["model"]})
    path = str(tmp_path / "checkpoint_best.pth")
    alone = make(tmp_path / "alone", evaluate=True, valid_splits=[], resume_ckpt_path=path)
    assert alone.train()["test"] == result["test"]
    assert list(make(tmp_path / "both", evaluate=True, resume_ckpt_path=path).train()["test"]) == ["val", "test"]
    assert alone.evaluate(["val"])["val"]["num"] == 5


def test_without_validation_best_is_last(tmp_path: Path) -> None:
    make(tmp_path, valid_splits=[]).train()
    best = checkpoint.load(tmp_path / "checkpoint_best.pth")["model"]
    torch.testing.assert_close(best, last(tmp_path)["model"], rtol=0, atol=0)


def test_runner_iter_counts_iterations(tmp_path: Path) -> None:
    changes = {"runner": "runner_iter", "max_iters": 8, "iters_per_inner_epoch": 3, "checkpoint_every": 2}
    runner = make(tmp_path / "a", keep_checkpoints=9, **changes)
    runner.train()
    expected = [(0, 0, 3), (0, 1, 3), (0, 2, 3), (1, 0, 3), (1, 1, 3), (1, 2, 3), (2, 0, 3), (2, 1, 3)]
    assert runner.model.seen == expected
    assert [row["step"] for row in rows(tmp_path / "a") if row.get("split") == "val"] == [3, 6, 8]
    kept = sorted(int(path.stem[11:]) for path in (tmp_path / "a").glob("checkpoint_[0-9]*.pth"))
    assert kept == [2, 3, 4, 6, 8]
    halfway = make(tmp_path / "b", resume_ckpt_path=str(tmp_path / "a" / "checkpoint_4.pth"), **changes)
    halfway.train()
    assert halfway.model.seen == expected[4:]
    assert_equal(last(tmp_path / "b")["model"], last(tmp_path / "a")["model"])
    assert_equal(*(checkpoint.load(tmp_path / job / "checkpoint_best.pth")["model"] for job in "ab"))


def test_max_iters_cuts_epochs_short(tmp_path: Path) -> None:
    make(tmp_path, max_iters=7).train()
    assert last(tmp_path)["step"] == 7
    assert [row["step"] for row in rows(tmp_path) if row.get("split") == "val"] == [5, 7]


def test_finished_run_only_tests_again(tmp_path: Path) -> None:
    first = make(tmp_path).train()
    again = make(tmp_path, resume="auto")
    assert again.train() == first
    assert again.model.seen == []


def test_nothing_to_resume_starts_afresh(tmp_path: Path) -> None:
    make(tmp_path, resume="auto", max_epoch=1).train()
    assert last(tmp_path)["step"] == 5


def test_resuming_what_does_not_fit(tmp_path: Path) -> None:
    make(tmp_path, max_epoch=1).train()
    path = str(tmp_path / "checkpoint_last.pth")
    with pytest.raises(ValueError, match=r"5 steps per .*this run has 11"):
        make(tmp_path / "b", batch_size_train=2, resume_ckpt_path=path).train()
    with pytest.raises(ValueError, match=r"with \{'line': '22 samples, share 1'\} as training sets, .*'21 samples"):
        make(tmp_path / "f", data=toy_data(train=21, val=5, test=7), resume_ckpt_path=path).train()
    with pytest.raises(ValueError, match="parameter groups differ"):
        make(tmp_path / "c", lr_layer_decay=0.5, resume_ckpt_path=path).train()
    with pytest.raises(ValueError, match=r"no training state \(optimizer.*model\.pretrained"):
        make(tmp_path / "d", resume_ckpt_path=str(tmp_path / "checkpoint_best.pth")).train()
    with pytest.raises(FileNotFoundError, match=r" has checkpoint_last\.pth"):
        make(tmp_path / "e", resume_ckpt_path=str(tmp_path / "checkpoint_lst.pth")).train()


def test_bad_loss_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"step 8: loss nan, loss_mse [\d.]+; learning rate 0\.0"):
        make(tmp_path, task=ToyTask(poison=8)).train()
    saved = last(tmp_path)
    assert saved["step"] == 5
    assert all(torch.isfinite(value).all() for value in saved["model"].values())


def test_a_bad_gradient_before_a_checkpoint_keeps_the_last_one(tmp_path: Path) -> None:
    """Step 10 has a finite loss, and a gradient that is none; its checkpoint would be the last of this run."""

    class Root(ToyTask):
        def train_step(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
            losses = super().train_step(model, samples)
            if self.steps == 10:
                losses["loss"] = losses["loss"] + (losses["prediction"].sum() * 0).sqrt()
            return losses

    with pytest.raises(NonFiniteLoss, match=r"weights are not finite after step 10.*run\.init_lr"):
        make(tmp_path, task=Root()).train()
    saved = last(tmp_path)
    assert saved["step"] == 5
    assert all(torch.isfinite(value).all() for value in saved["model"].values())


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, max_epoch=1).train()
    before = (tmp_path / "checkpoint_last.pth").read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint_last\.pth: the disk is full .*MiB free"):
        make(tmp_path, resume="auto").train()
    assert (tmp_path / "checkpoint_last.pth").read_bytes() == before
    monkeypatch.undo()
    make(tmp_path, resume="auto").train()
    assert last(tmp_path)["step"] == 10


def test_clipping_limits_the_gradient(tmp_path: Path) -> None:
    runner = make(tmp_path, grad_clip_norm=1e-3, max_epoch=1)
    norms: list[float] = []
    runner_step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
        return runner_step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        runner.train()
    assert norms == pytest.approx([1e-3] * 5, rel=1e-3)
    assert rows(tmp_path)[0]["grad_norm"] > 1e-3


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({"precision": "bf16"}, torch.bfloat16),
        ({"amp": False}, torch.float32),
        ({"amp": True}, torch.float32),
    ],
)
def test_precision(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    task = ToyTask()
    runner = make(tmp_path, task=task, max_epoch=1, **changes)
    runner.train()
    assert set(task.dtypes) == {dtype}
    assert {parameter.dtype for parameter in runner.model.parameters()} == {torch.float32}


def test_bf16_on_a_cpu_that_is_slower_in_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    precisions.warn_of_slow_bf16.cache_clear()
    for gain, count in ((2.5, 0), (1.0, 0), (0.5, 1), (0.5, 1)):
        monkeypatch.setattr(precisions, "bf16_gain", lambda gain=gain: gain)
        resolve_precision("bf16", torch.device("cpu"))
        resolve_precision("fp32", torch.device("cpu"))
        found = [record.getMessage() for record in caplog.records if "run.precision" in record.getMessage()]
        assert len(found) == count
        assert all("2.0 times as long" in message for message in found)


def test_wrong_precision() -> None:
    for precision, text in (("fp16", "needs a GPU"), ("half", "'half' is unknown")):
        with pytest.raises(ValueError, match=text):
            resolve_precision(precision, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"valid_splits": ["dev"]}, r"valid_splits.*'dev'|'dev'.*valid_splits"),
        ({"test_splits": ["tset"]}, r"'tset'.*'test'"),
        ({"train_splits": ["training"]}, r"'training'"),
        ({"batch_size_train": 64}, "22 training samples"),
        ({"iters_per_inner_epoch": 3}, "runner_iter"),
        ({"runner": "runner_iter"}, "max_iters"),
        ({"accum_grad_iters": 0}, "accum_grad_iters"),
    ],
)
def test_impossible_settings(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(tmp_path, **changes).train()


def test_metrics_without_aggregate(tmp_path: Path) -> None:
    task = ToyTask()
    task.evaluate = lambda model, loader, *, split, result_dir: {"accuracy": 1.0}
    with pytest.raises(ValueError, match=r"agg_metrics.*accuracy"):
        make(tmp_path, task=task).train()


def test_guard_names_the_first_bad_step_when_asked_late() -> None:
    """As on a GPU, where nobody looks between two logs."""
    guard = FiniteGuard()
    guard.check = lambda: None
    for step, value in enumerate([1.0, 2.0, math.inf, math.nan, 3.0]):
        guard.update(step, 0.5, ("loss", "loss_itm"), torch.tensor([value, step]))
    with pytest.raises(NonFiniteLoss, match=r"step 3: loss inf, loss_itm 2; learning rate 0\.5"):
        FiniteGuard.check(guard)


def test_progress_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    make(tmp_path).train()
    shown = capsys.readouterr().err
    for part in ("epoch 2/2", "5/5", "loss=", "lr=", "samples_per_s=", "left=0:00:00"):
        assert part in shown


def test_progress_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make(tmp_path, log_freq=4).train()
    lines = [record.message for record in caplog.records if "time left" in record.message]
    assert [line.split("  ")[:2] for line in lines] == [
        ["epoch 1", "step 4/10"],
        ["epoch 1", "step 5/10"],
        ["epoch 2", "step 8/10"],
        ["epoch 2", "step 10/10"],
    ]
    assert all("lr " in line and " samples/s " in line and "loss " in line for line in lines)


def test_json_log_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text('{"step": 1}\n{"step"', encoding="utf-8")
    JsonLog(path).write({"step": torch.tensor(2), "path": tmp_path, "name": "é"})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ['{"step": 1}', '{"step"']
    assert json.loads(lines[2]) == {"step": 2, "path": str(tmp_path), "name": "é"}


def test_missing_tensorboard_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    make(tmp_path, tensorboard=True, max_epoch=1).train()
    assert caplog.text.count("pip install tensorboard") == 1


def test_unreadable_samples_are_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSample, match=r"broken\d+\.jpg"):
        make(
            tmp_path / "a", data={"line": {"train": Line("train", 22, broken=True)}}, valid_splits=[], test_splits=[]
        ).train()
    make(tmp_path / "b", max_unreadable_share=0.1).train()
    assert rows(tmp_path / "b")[0]["unreadable"] == 0


def test_plan() -> None:
    run = RunConfig(task="toy", batch_size_train=2, max_iters=12, max_epoch=9)
    plan = make_plan(run, {"line": 22}, 2)
    assert (plan.sampler.steps_per_epoch, plan.inner, plan.total, plan.sampler.global_batch) == (5, 5, 12, 4)
    assert plan.num_epochs == 3
    assert [plan.bounds(epoch) for epoch in range(3)] == [(0, 5), (5, 10), (10, 12)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_epoch": 3}, (5, 5, 15, 4)),
        ({"accum_grad_iters": 2, "max_epoch": 3}, (2, 2, 6, 8)),
        ({"runner": "runner_iter", "max_iters": 40}, (5, 5, 40, 4)),
        ({"runner": "runner_iter", "max_iters": 40, "iters_per_inner_epoch": 7}, (5, 7, 40, 4)),
        ({"runner": "runner_iter", "max_iters": 40, "accum_grad_iters": 5}, (1, 1, 40, 20)),
    ],
)
def test_plans_count_updates(changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    plan = make_plan(RunConfig(task="toy", batch_size_train=4, **changes), {"line": 22}, 1)
    assert (plan.sampler.steps_per_epoch, plan.inner, plan.total, plan.sampler.global_batch) == expected


if __name__ == "__main__":
    script_main(*sys.argv[1:])
