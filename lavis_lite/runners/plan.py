"""The length of a run in steps, decided before the first one.

A step is an update of the weights by one global batch: `batch_size_train` x processes x `accum_grad_iters` samples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lavis_lite.common.config.run import RunConfig
from lavis_lite.runners.sampling import TrainSampler, make_sampler


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The length of a run, in steps of a global batch: `inner` between two validations, `total` in all."""

    inner: int
    total: int
    sampler: TrainSampler
    """Of the training sets: lengths, shares, steps per epoch."""

    @property
    def num_epochs(self) -> int:
        """Number of (inner) epochs; the last may be shorter."""
        return math.ceil(self.total / self.inner)

    def bounds(self, epoch: int) -> tuple[int, int]:
        """Return the first step of (inner) epoch `epoch`, and the one after its last."""
        return epoch * self.inner, min((epoch + 1) * self.inner, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Return what a resumed run must not change, for the checkpoint."""
        sampler = self.sampler
        fixed = {"global_batch": sampler.global_batch, "mixture": sampler.mixture}
        return {"inner": self.inner, "total": self.total, **fixed}


def make_plan(
    run: RunConfig, lengths: Mapping[str, int], world: int, *, streams: Mapping[str, str] | None = None
) -> Plan:
    """Return the plan of a run on `world` processes over training datasets of these lengths, by name; `streams` as for
    `TrainSampler`.

    `runner_iter` takes `max_iters` steps, of which `iters_per_inner_epoch` are between two validations; any other
    runner takes `max_epoch` epochs, at most `max_iters` steps.

    Raises:
        InputError: as `make_sampler`.
    """
    sampler = make_sampler(run, lengths, world=world, streams=streams)
    per_epoch = sampler.steps_per_epoch
    inner, total = per_epoch, per_epoch * run.max_epoch
    if run.max_iters is not None:
        counts_steps = run.runner == "runner_iter"
        inner = (run.iters_per_inner_epoch if counts_steps else None) or per_epoch
        total = run.max_iters if counts_steps else min(total, run.max_iters)
    return Plan(inner=inner, total=total, sampler=sampler)
