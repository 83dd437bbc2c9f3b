"""AdamW parameter groups and learning-rate schedules.

A schedule is a pure function of the step (`lr_at(step)`), so resuming needs no state. Steps are updates, from 0.
By default the rate changes every step; `per_epoch=True` is LAVIS's variant: warm-up only inside epoch 0 (cut off where
that epoch ends), afterwards one rate per epoch, whose cosine starts at epoch 0 and not at the end of warm-up.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up from `run.warmup_lr` (None: no warm-up) in `run.warmup_steps`, then `_decayed`.

    Units: `iters_per_epoch` and `total_steps` are steps; `run.lr_decay_rate` is per epoch.
    """

    run: RunConfig
    max_epoch: int
    iters_per_epoch: int
    total_steps: int

    def lr_at(self, step: int) -> float:
        """Return the learning rate of `step` (0-based), before any group's `lr_scale`."""
        run = self.run
        if step >= (self.iters_per_epoch if run.lr_sched_per_epoch else run.warmup_steps):
            return self._decayed(step)
        start = run.init_lr if run.warmup_lr is None else run.warmup_lr
        return min(run.init_lr, start + (run.init_lr - start) * step / max(run.warmup_steps, 1))

    def _decayed(self, step: int) -> float:
        raise NotImplementedError(f"{type(self).__name__} does not define how the rate decays after warm-up")


@registry.register_lr_scheduler("linear_warmup_cosine_lr")
class LinearWarmupCosine(Schedule):
    """Half a cosine from `init_lr` down to `min_lr`, over the steps that remain after warm-up."""

    def _decayed(self, step: int) -> float:
        if self.run.lr_sched_per_epoch:
            progress = (step // self.iters_per_epoch) / self.max_epoch
        else:
            warmup_steps = self.run.warmup_steps
            progress = min(1.0, (step - warmup_steps) / max(self.total_steps - warmup_steps, 1))
        return (self.run.init_lr - self.run.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress)) + self.run.min_lr


@registry.register_lr_scheduler("linear_warmup_step_lr")
class LinearWarmupStep(Schedule):
    """`init_lr` times `lr_decay_rate` to the power of the epoch (a fraction unless per epoch), never below `min_lr`."""

    def _decayed(self, step: int) -> float:
        run = self.run
        assert run.lr_decay_rate is not None, "RunConfig checks it"
        epoch = (
            step // self.iters_per_epoch if run.lr_sched_per_epoch else (step - run.warmup_steps) / self.iters_per_epoch
        )
        return max(run.min_lr, run.init_lr * run.lr_decay_rate**epoch)


@registry.register_lr_scheduler("constant_lr")
class Constant(Schedule):
    """`init_lr` throughout, after warm-up."""

    def _decayed(self, step: int) -> float:
        return self.run.init_lr


def build_schedule(run: RunConfig, *, max_epoch: int, iters_per_epoch: int, total_steps: int) -> Schedule:
    """Return the schedule that `run` names, for `total_steps` steps; warn of a warm-up without effect or end."""
    if run.warmup_steps > 0 and run.warmup_lr is None:
        advice = "set it to the rate to start from, e.g. 1e-8"
        logger.warning(f"run.warmup_steps={run.warmup_steps} has no effect without run.warmup_lr: {advice}")
    schedule_class = registry.get_lr_scheduler_class(run.lr_sched)
    schedule = schedule_class(run=run, max_epoch=max_epoch, iters_per_epoch=iters_per_epoch, total_steps=total_steps)
    warming = iters_per_epoch if run.lr_sched_per_epoch else total_steps
    if run.warmup_lr is not None and run.warmup_steps > warming:
        length = "the first epoch, where lr_sched_per_epoch ends it," if run.lr_sched_per_epoch else "the whole run"
        reached = f"the learning rate reaches {schedule.lr_at(warming - 1):.3g} of run.init_lr={run.init_lr:g}"
        logger.warning(f"run.warmup_steps={run.warmup_steps:,} is longer than {length} of {warming:,} steps: {reached}")
    return schedule


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay and by `layer_scale(name)`, a factor on the learning rate.

    Scalars, vectors (so every LayerNorm) and biases of any shape are not decayed. Groups come in the order in which
    their scale first appears in the model, decayed before not decayed. Each is `{"params", "names", "weight_decay",
    "lr_scale"}`.
    """
    groups: dict[float, dict[bool, dict[str, Any]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_scale(name)
        decays = parameter.ndim >= 2 and "bias" not in name.rsplit(".", 1)[-1]
        blank = {"params": [], "names": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        group = groups.setdefault(scale, {}).setdefault(decays, blank)
        group["params"].append(parameter)
        group["names"].append(name)
    return [by_decay[decays] for by_decay in groups.values() for decays in (True, False) if decays in by_decay]


def build_optimizer(groups: Iterable[dict[str, Any]], run: RunConfig) -> torch.optim.AdamW:
    """Return AdamW over a model's `optimizer_groups`, each at `run.init_lr` times its `lr_scale`; fused where possible.

    Raises:
        InputError: nothing is trainable.
    """
    groups = [{**group, "lr": run.init_lr * group.get("lr_scale", 1.0)} for group in groups if group["params"]]
    if not groups:
        raise InputError("the model has no trainable parameter: unfreeze a part of it, or set run.evaluate=True")
    can_fuse = all(p.device.type in ("cuda", "cpu") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=run.init_lr, betas=(run.beta1, run.beta2), fused=can_fuse or None)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's rate to `lr` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
