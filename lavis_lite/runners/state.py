"""What a training run must remember to go on as if it had never stopped, and the files in which it does.

A job's folder holds checkpoint_last.pth (everything, for resuming), checkpoint_best.pth (weights) and, if asked for,
the newest checkpoint_<step>.pth (everything).
"""

import functools
import logging
import random
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavis_lite.common import checkpoint, dist
from lavis_lite.common.errors import InputError, NonFiniteLoss
from lavis_lite.runners.sampling import seed_rank

logger = logging.getLogger(__name__)

REMEDY = (
    "Checkpoints are from before. "
    "Try a lower run.init_lr, run.grad_clip_norm=1.0, a longer run.warmup_steps, or run.precision=bf16 or fp32"
)


@dataclass
class RunState:
    """Iterations done, (inner) epochs done including their validation, and the best validation so far."""

    step: int = 0
    epoch: int = 0
    best_metric: float | None = None
    best_epoch: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the checkpoint's keys: `step`, `epoch`, `best`."""
        return {"step": self.step, "epoch": self.epoch, "best": {"metric": self.best_metric, "epoch": self.best_epoch}}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "RunState":
        """The inverse of `to_dict`."""
        best = saved["best"]
        return cls(step=saved["step"], epoch=saved["epoch"], best_metric=best["metric"], best_epoch=best["epoch"])


def aggregate(results: Mapping[str, Mapping[str, Any]], *, by: str) -> tuple[str, float | None]:
    """What weights are compared by: name and `agg_metrics` of the first validation result, or `mean` and that of all.

    A result whose `agg_metrics` is None (a split without answers, say) has no part in the mean; without any number the
    answer is None.

    Raises:
        ValueError: one of those has no `agg_metrics`.
    """
    judged = list(results.items())[: 1 if by == "first" else None]
    for split, metrics in judged:
        if "agg_metrics" not in metrics:
            raise InputError(f"the task's score gave no 'agg_metrics' for {split}: found {sorted(metrics)}")
    numbers = [float(metrics["agg_metrics"]) for _, metrics in judged if metrics["agg_metrics"] is not None]
    return judged[0][0] if by == "first" else by, statistics.fmean(numbers) if numbers else None


def save_last(saved: Mapping[str, Any], job_dir: Path, *, step: int, keep: int) -> None:
    """Writes checkpoint_last.pth, and of checkpoint_<step>.pth keeps the `keep` newest."""
    checkpoint.save(saved, job_dir / "checkpoint_last.pth")
    if keep > 0:
        checkpoint.link_or_copy(job_dir / "checkpoint_last.pth", job_dir / f"checkpoint_{step}.pth")
        kept = [path for path in job_dir.glob("checkpoint_*.pth") if path.stem.split("_")[1].isdigit()]
        for old in sorted(kept, key=lambda path: path.stat().st_mtime_ns)[:-keep]:  # a resumed run may count lower
            old.unlink()


def bring_best(state: RunState, source: Path, *, job_dir: Path) -> None:
    """When a run resumes in another folder, copy its best weights there; `check_best` has seen that they are whole."""
    best = source.with_name("checkpoint_best.pth")
    own = job_dir / best.name
    if state.best_metric is None or best.resolve() == own.resolve():
        return
    if dist.is_main():
        with best.open("rb") as file:
            checkpoint.atomic_write(own, functools.partial(shutil.copyfileobj, file), num_bytes=best.stat().st_size)
    dist.barrier()


def rank_state(loader: Any, device: torch.device) -> dict[str, Any]:
    """What only this rank knows: its generators and how many samples its training loader saw and could not read."""
    return {"rng": rng_state(device), "seen": loader.seen, "unreadable": loader.unreadable}


def restore_rank(
    ranks: Sequence[Mapping[str, Any]], loader: Any, *, device: torch.device, seed: int, step: int, source: Path
) -> None:
    """Puts back this rank's part of all ranks' `rank_state`s; with another number of ranks, seeds anew and says so."""
    if len(ranks) == dist.world_size():
        mine = ranks[dist.rank()]
        restore_rng(mine["rng"], device)
        loader.seen, loader.unreadable = mine["seen"], mine["unreadable"]
        return
    logger.warning(
        f"{source} was written by {len(ranks)} processes, this run has {dist.world_size()}: "
        "the data's order is the same at the same global batch, but random numbers (dropout) will differ"
    )
    seed_rank(seed, step=step)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's global generators, in types that a `weights_only` load accepts."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts back what `rng_state` returned."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, array, *rest = state["numpy"]
    np.random.set_state((name, np.array(array, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


class FiniteGuard:
    """Stops a run at its first loss that is nan or infinite.

    On an accelerator the first bad step is noted on the device and looked up only in `check`, which therefore costs no
    wait between two logs. On CPU every `update` checks.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.first_bad: torch.Tensor | None = None  # [step, learning rate, *losses] of the first bad step, else zeros

    def update(self, step: int, lr: float, losses: Mapping[str, torch.Tensor]) -> None:
        """Looks at the losses of `step` (0-based)."""
        values = torch.stack([loss.detach().double().reshape(()) for loss in losses.values()])
        self.names = list(losses)
        row = torch.cat([values.new_tensor([step + 1, lr]), values])
        known = row.new_zeros(row.shape) if self.first_bad is None else self.first_bad
        is_new = (known[0] == 0) & ~torch.isfinite(losses["loss"].detach())
        self.first_bad = torch.where(is_new, row, known)
        if row.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raises NonFiniteLoss if any loss so far was not finite; names step, losses and learning rate."""
        if self.first_bad is None:
            return
        step, lr, *values = self.first_bad.tolist()
        if step == 0:
            return
        losses = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, values, strict=True))
        raise NonFiniteLoss(f"the loss is not finite at step {int(step)}: {losses}; learning rate {lr:g}. {REMEDY}")

    def check_weights(self, parameters: Iterable[torch.Tensor], *, step: int) -> None:
        """Raises NonFiniteLoss if a weight is not finite after `step` steps: a gradient may be nan at a finite loss."""
        if not torch.stack([torch.isfinite(parameter.detach()).all() for parameter in parameters]).all():
            raise NonFiniteLoss(
                f"weights are not finite after step {step}: at a finite loss, a gradient was not. {REMEDY}"
            )
