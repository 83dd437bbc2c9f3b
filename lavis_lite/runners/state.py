"""What a training run must remember to go on as if it had never stopped, beside weights and optimizer."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lavis_lite.errors import NonFiniteLoss


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
        raise NonFiniteLoss(
            f"the loss is not finite at step {int(step)}: {losses}; learning rate {lr:g}. Checkpoints are from before. "
            "Try a lower run.init_lr, run.grad_clip_norm=1.0, a longer run.warmup_steps, or run.precision=bf16 or fp32"
        )
