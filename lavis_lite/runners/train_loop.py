"""The training loop: steps, log lines, checkpoints and validations in the order in which they happen.

A step is an update of the weights by one global batch, which `run.accum_grad_iters` batches on each rank make up.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lavis_lite.common import dist, sharding
from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import NonFiniteLoss
from lavis_lite.common.logger import row_of
from lavis_lite.common.optim import Schedule, set_lr
from lavis_lite.common.precision import autocast
from lavis_lite.runners.checkpoint_writer import CheckpointWriter
from lavis_lite.runners.encoded import EncoderCache
from lavis_lite.runners.learning import learning_metrics
from lavis_lite.runners.plan import Plan
from lavis_lite.runners.profiling import StepProfiler
from lavis_lite.runners.progress import Progress
from lavis_lite.runners.stopping import Stopped, StopSignals
from lavis_lite.runners.train_state import TrainState
from lavis_lite.tasks.base import BaseTask

logger = logging.getLogger(__name__)

REMEDY = (
    "The checkpoints on disk predate it. "
    "Try a lower run.init_lr, run.grad_clip_norm=1.0, a longer run.warmup_steps, or run.precision=bf16 or fp32"
)


MAX_UNREAD = 10_000
"""Updates after which losses are read although no log line is due."""


class FiniteGuard:
    """Stops a run at its first loss that is nan or infinite.

    On an accelerator the first such step is noted on the device and read only in `check`, so that nothing waits between
    two log lines. On a CPU every `update` checks.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.rates: list[tuple[int, float]] = []  # step and learning rate of each update since the last `check`
        self.is_good: torch.Tensor | None = None  # whether all since then were finite
        self.num_good: torch.Tensor | None = None
        self.losses: torch.Tensor | None = None  # of the first update that is not finite, or of the last one

    def update(self, step: int, lr: float, names: tuple[str, ...], losses: torch.Tensor) -> None:
        """Note the losses of `step` (0-based) if they are the first that are not finite. They are one vector, which
        begins with `loss`.
        """
        self.names = names
        self.rates.append((step + 1, lr))
        if self.losses is None or self.is_good is None or self.num_good is None:
            self.losses, self.is_good = losses, torch.isfinite(losses[0])
            self.num_good = self.is_good.long()
        else:
            self.losses = torch.where(self.is_good, losses, self.losses)
            self.is_good = self.is_good & torch.isfinite(losses[0])
            self.num_good = self.num_good + self.is_good
        if losses.device.type == "cpu" or len(self.rates) >= MAX_UNREAD:
            self.check()

    def check(self) -> None:
        """Raise NonFiniteLoss if any loss so far was not finite; it names step, losses and learning rate."""
        if self.num_good is None or self.losses is None:
            return
        number, rates, losses = int(self.num_good), self.rates, self.losses
        self.rates, self.is_good, self.num_good, self.losses = [], None, None, None
        if number < len(rates):
            step, lr = rates[number]
            said = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, losses.tolist(), strict=True))
            raise NonFiniteLoss(f"the loss is not finite at step {step}: {said}; learning rate {lr:g}. {REMEDY}")

    def check_weights(self, parameters: Iterable[torch.Tensor], *, step: int) -> None:
        """As `check`, and raise NonFiniteLoss if a weight is not finite after `step` steps: a gradient may be nan at a
        finite loss.
        """
        self.check()
        finite = torch.stack([torch.isfinite(sharding.local(one.detach())).all() for one in parameters]).all()
        if dist.all_reduce_mean(finite.float()) < 1:
            problem = f"weights are not finite after step {step}: at a finite loss, a gradient was not"
            raise NonFiniteLoss(f"{problem}. {REMEDY}")


class LossAverage:
    """A step's loss, over all ranks: the mean of its batches' losses, or with `run.loss_average: tokens` the mean over
    all their labels.
    """

    def __init__(self, run: RunConfig) -> None:
        self.accumulate, self.is_of_tokens = run.accum_grad_iters, run.loss_average == "tokens"
        self.num_labels: torch.Tensor | float = 0.0

    def weigh(self, loss: torch.Tensor, output: Mapping[str, Any]) -> torch.Tensor:
        """Return a batch's part of the step's loss; the gradients of the parts add up."""
        if not self.is_of_tokens:
            return loss / self.accumulate
        self.num_labels = self.num_labels + output["num_labels"].double()
        return loss * output["num_labels"]

    def rescale(self, state: TrainState) -> None:
        """Divide the summed gradients by the number of labels, which is known only after the last batch."""
        if self.is_of_tokens:
            per_rank = dist.all_reduce_mean(torch.as_tensor(self.num_labels))  # gradients are means over the ranks
            gradients = [sharding.local(parameter.grad) for parameter in state.parameters if parameter.grad is not None]
            torch._foreach_mul_(gradients, per_rank.reciprocal().float())
            self.num_labels = 0.0


@dataclass(kw_only=True)
class Training:
    """The parts of a training, built before its first step."""

    run: RunConfig
    task: BaseTask
    plan: Plan
    state: TrainState
    schedule: Schedule
    dtype: torch.dtype
    parallel: nn.Module
    """The model as training calls it: in DistributedDataParallel where there are several ranks."""
    no_sync: Callable[[], contextlib.AbstractContextManager[None]]
    """The context in which gradients stay on their rank."""
    ranks: dist.Lockstep
    progress: Progress
    profiler: StepProfiler
    stop: StopSignals
    writer: CheckpointWriter
    parts: Any
    """The group of ranks that write a sharded checkpoint (`dist.new_group`), else None."""
    tokens: EncoderCache | None
    """The cache of the frozen image encoder's tokens, if there is one."""
    guard: FiniteGuard = field(default_factory=FiniteGuard)


def train_loop(training: Training, *, save: Callable[[], None], validate: Callable[[int], None]) -> None:
    """Train from the state's position to the plan's end.

    `save` writes a checkpoint, `validate` evaluates after an (inner) epoch, which it is given.

    Raises:
        Stopped: any rank was asked to stop; all have finished the same step, and it is saved.
        NonFiniteLoss: a loss or a weight is not finite.
    """
    run, plan, state, ranks = training.run, training.plan, training.state, training.ranks
    average = LossAverage(run)
    with (
        contextlib.closing(iter(state.loader)) as batches,
        training.stop.deferred(),
        training.profiler.over(state.model),
    ):
        for epoch in range(state.epoch, plan.num_epochs):
            if is_stale(state, run.early_stopping):
                break
            first, end = plan.bounds(epoch)
            start = state.step
            state.model.train()
            with training.progress.epoch(epoch, plan, step=state.step), ranks:
                for step in range(start, end):
                    lr = training.schedule.lr_at(step)
                    set_lr(state.optimizer, lr)
                    place = {"epoch": epoch, "iters": step - first, "num_iters_per_epoch": plan.inner}
                    take_step(training, batches, average, lr=lr, place=place)
                    training.progress.advance()
                    with training.progress.speed.paused():  # it may write the profile
                        training.profiler.step()
                    training.writer.check()
                    if state.step % run.log_freq == 0 or state.step == end:
                        _log(training, epoch, lr)
                    signum = ranks.largest(training.stop.signum or 0)
                    is_due = run.checkpoint_every and state.step % run.checkpoint_every == 0 and state.step < end
                    if is_due or signum:
                        with ranks.paused():
                            save()
                    if signum:
                        raise Stopped(signum)
            # a resumed run may only validate, but one that was stopped after an epoch's last step has not logged it
            if start < end or state.by_dataset.counts or state.loader.sampler.is_concat:
                _log_datasets(training, first, end, epoch=epoch)
            if run.valid_splits:
                save()  # validation may be long, and the epoch should not be lost with it
                with training.stop.at_once():
                    validate(epoch)
            state.epoch = epoch + 1
            save()


def take_step(
    training: Training, batches: Iterator[dict[str, Any]], average: LossAverage, *, lr: float, place: Mapping[str, int]
) -> None:
    """Update the weights by one global batch; `place` are the keys of a batch that say where in the run it is.

    Nothing here waits for the device: values are read in `_log` and `save`.
    """
    run, state, profiler, speed = training.run, training.state, training.profiler, training.progress.speed
    step = state.step
    with speed.counting():
        for remaining in reversed(range(run.accum_grad_iters)):
            with speed.waiting(), profiler.phase("data"):
                samples = next(batches)
            samples.update(place)
            with training.no_sync() if remaining else contextlib.nullcontext():
                with profiler.phase("forward"), autocast(state.device, training.dtype):
                    samples = samples if training.tokens is None else training.tokens.fill(samples)
                    output = training.task.train_step(training.parallel, samples)
                losses = {k: v for k, v in output.items() if k.startswith("loss") and torch.is_tensor(v)}
                values = {"loss": losses["loss"], **losses, **learning_metrics(output)}
                names, row = tuple(values), row_of(values)
                training.guard.update(step, lr, names[: len(losses)], row[: len(losses)])
                with profiler.phase("backward"):
                    state.scaler.scale(average.weigh(losses["loss"], output)).backward()
            state.metrics.add(names, row)
            if state.loader.sampler.draws_datasets:
                state.by_dataset.add((state.loader.sampler.dataset_at(step),), row[:1])
        with profiler.phase("optimizer"):
            average.rescale(state)
            _update_weights(state, clip=run.grad_clip_norm)
    state.step = step + 1


def is_stale(state: TrainState, patience: int | None) -> bool:
    """Return whether the last `patience` validations gave no better metric; follows from what a checkpoint holds."""
    if patience is None or state.best_epoch is None or state.epoch - 1 - state.best_epoch < patience:
        return False
    logger.info(
        f"early stopping: {patience} validations without a better metric than {state.best_metric:.4g} after epoch "
        f"{state.best_epoch + 1} (run.early_stopping)"
    )
    return True


def _update_weights(state: TrainState, *, clip: float | None) -> None:
    if clip is not None:
        state.scaler.unscale_(state.optimizer)
        norm = sharding.clip_grad_norm(state.parameters, clip)
        if not state.scaler.is_enabled():  # the scaler's overflow steps have infinite norms
            state.metrics.update(grad_norm=norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)


def _log(training: Training, epoch: int, lr: float) -> None:
    state = training.state
    training.guard.check()
    values: dict[str, float] = {"lr": lr, **state.metrics.drain()}
    if training.run.max_unreadable_share > 0:
        values["unreadable"] = state.loader.unreadable
    state.watch.update(training.progress.report(state.step, epoch, values, plan=training.plan))


def _log_datasets(training: Training, first: int, end: int, *, epoch: int) -> None:
    """Report each training set's part in an epoch: its batches and their mean loss, or its samples where batches mix
    several sets and have one loss.
    """
    state, sampler = training.state, training.state.loader.sampler
    if len(sampler.names) == 1:
        return
    counts = sampler.counts_between(first, end)
    means = state.by_dataset.drain()
    parts: dict[str, dict[str, float | None]] = {
        name: {"samples": count} if sampler.is_concat else {"batches": count, "loss": means.get(name)}
        for name, count in counts.items()
    }
    training.progress.report_datasets(parts, step=state.step, epoch=epoch)
