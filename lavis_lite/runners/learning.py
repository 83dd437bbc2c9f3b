"""Warnings that a contrastive run does not learn although its loss falls, from the means that are logged.

Each warning is given once per run; it says over how many steps the value was observed, and what to change.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lavis_lite.common import dist
from lavis_lite.nn.learning import METRICS, TEMPERATURE_LIMITS

logger = logging.getLogger(__name__)

Means = Mapping[str, float]

COLLAPSED = 0.99
"""Mean cosine above which features count as collapsed."""
ALWAYS_NO_MATCH = 0.6365
"""`loss_itm` of a head that has learned only that two of three pairs do not match: the entropy of 1/3 and 2/3."""


def learning_metrics(output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the entries of a training step's output that are logged beside its losses: `METRICS` of one number."""
    values = {name: output[name] for name in METRICS if torch.is_tensor(output.get(name))}
    return {name: value for name, value in values.items() if value.numel() == 1}


@dataclass
class Check:
    """Looks for a symptom in the means of the values `names` over at least `window` steps."""

    names: tuple[str, ...]
    window: int
    find: Callable[[Means], str | None]
    """Means in; what is wrong and what to do, or None."""
    steps: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    has_warned: bool = False

    def update(self, row: Means, steps: int) -> str | None:
        """Add the means over `steps` more steps; return the symptom, if a window is full and shows it."""
        if self.has_warned or not all(name in row for name in self.names):
            return None
        self.totals = {name: self.totals.get(name, 0.0) + steps * row[name] for name in self.names}
        self.steps += steps
        if self.steps < self.window:
            return None
        found = self.find({name: total / self.steps for name, total in self.totals.items()})
        text = found and f"over the last {self.steps} steps {found}"
        self.has_warned = text is not None
        self.steps, self.totals = 0, {}
        return text


class LearningWatch:
    """Checks each logged row of a run, and warns on rank 0.

    Steps of the warm-up do not count: features of random weights are alike, and heads start at their priors.
    """

    def __init__(self, *, warmup_steps: int = 0) -> None:
        self.step, self.warmup_steps = 0, warmup_steps
        self.checks = [
            Check(("cos_image",), 100, lambda means: collapsed("images", means["cos_image"])),
            Check(("cos_text",), 100, lambda means: collapsed("texts", means["cos_text"])),
            Check(("temp",), 100, at_limit),
            Check(("acc_itc", "chance_itc", "loss_itc"), 300, guessing),
            Check(("acc_itm", "loss_itm"), 300, never_matching),
        ]

    def update(self, row: Means) -> None:
        """Check a row's means, which are over the steps since the last row."""
        since, self.step = self.step, int(row["step"])
        if since < self.warmup_steps:
            return
        for check in self.checks:
            text = check.update(row, self.step - since)
            if text and dist.is_main():
                logger.warning(f"step {self.step}: {text}. See 'Does it learn?' in docs/training.md")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue the windows, and not to warn again."""
        checks = [{"steps": c.steps, "totals": dict(c.totals), "has_warned": c.has_warned} for c in self.checks]
        return {"step": self.step, "checks": checks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.step = state["step"]
        for check, saved in zip(self.checks, state["checks"], strict=True):
            check.steps, check.totals, check.has_warned = saved["steps"], dict(saved["totals"]), saved["has_warned"]


def collapsed(kind: str, cosine: float) -> str | None:
    """Return the symptom that all images or texts have nearly the same feature."""
    if cosine <= COLLAPSED:
        return None
    return (
        f"the features of a batch's {kind} were all alike (mean cosine of two {kind} {cosine:.4f}): lower run.init_lr, "
        "lengthen run.warmup_steps, set run.grad_clip_norm=1.0, and start the encoders from trained weights"
    )


def at_limit(means: Means) -> str | None:
    """Return the symptom that the temperature is held at one of its limits."""
    low, high = TEMPERATURE_LIMITS
    temp = means["temp"]
    if low * 1.02 < temp < high * 0.98:
        return None
    return (
        f"the temperature of the contrast was at its limit (temp {temp:.4g}, limits {low} and {high}), as features do "
        "not separate pairs: lower run.init_lr, and shorten a feature queue or set model.queue_size=0"
    )


def guessing(means: Means) -> str | None:
    """Return the symptom that contrast is at chance within the batch, whatever its loss."""
    accuracy, chance = means["acc_itc"], means["chance_itc"]
    if accuracy >= 1.5 * chance or chance > 0.5:
        return None
    return (
        f"contrast within the batch was at chance (acc_itc {accuracy:.4f}, by guessing {chance:.4f}, with loss_itc "
        f"{means['loss_itc']:.3g}), even if loss_itc falls: check that texts belong to their images; for short runs "
        "set model.queue_size=0 and lower model.momentum"
    )


def never_matching(means: Means) -> str | None:
    """Return the symptom that the matching head gives every pair the prior."""
    if abs(means["acc_itm"] - 0.5) > 0.02 or abs(means["loss_itm"] - ALWAYS_NO_MATCH) > 0.01:
        return None
    return (
        f"the matching head gave the same score to every pair (loss_itm {means['loss_itm']:.4f}, by always answering "
        f"'no match' {ALWAYS_NO_MATCH}): train longer, until acc_itc is above chance; till then set run.k_test=0"
    )
