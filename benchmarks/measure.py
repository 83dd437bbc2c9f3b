"""Measure two ways of doing the same: time, memory, model FLOPs utilisation (MFU), a table."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lite.common.hardware import GIB

HEADS = ("per s", "seconds", "GFLOP", "MFU", "GiB", "other per s", "GiB", "ratio", "of each turn")
WIDTHS = (10, 9, 9, 7, 7, 13, 7, 7, 15)


class Watched:
    """A function that is timed. It keeps its last result and, on a GPU, the memory that the call took."""

    def __init__(
        self, function: Callable[[], Any], model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.function, self.model, self.optimizer = function, model, optimizer
        self.on_gpu = any(parameter.is_cuda for parameter in model.parameters())
        self.result: Any = None
        self.extra = 0

    def __call__(self) -> None:
        if not self.on_gpu:
            self.result = self.function()
            return
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.result = self.function()
        self.extra = torch.cuda.max_memory_allocated() - before

    @property
    def peak_gib(self) -> float | None:
        """Memory of the model's weights, the optimizer's state and the peak of a call; None on a CPU."""
        return (held_bytes(self.model, self.optimizer) + self.extra) / GIB if self.on_gpu else None

    @property
    def loss(self) -> float | None:
        """The loss that a training step returned."""
        return None if self.optimizer is None else float(self.result)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Return the bytes of weights and optimizer state, counting shared tensors once."""
    held = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        held += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


@dataclass(frozen=True, kw_only=True)
class Job:
    """Two ways of doing the same with `count` images (or pairs) per call; `flops` is the cost of one of these."""

    what: str
    other: str
    ours: Watched
    theirs: Watched
    count: int
    flops: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """The measurements of a job; memory is in GiB.

    `ratio` is how many times faster ours is, by the processor's time on a CPU, which other processes change less than
    the clock's; `ratios` are those of each turn.
    """

    what: str
    per_second: float
    seconds: float
    gflop: float | None
    mfu: float | None
    peak_gib: float | None
    loss: float | None
    other: str
    other_per_second: float
    other_peak_gib: float | None
    other_loss: float | None
    ratio: float
    ratios: list[float]


def turns(functions: list[Watched], repeats: int) -> list[list[tuple[float, float]]]:
    """Return each function's times in seconds, by the clock and of the processor; the functions take turns, and the
    first round warms up.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, own in zip(functions, times, strict=True):
            start, start_cpu = time.perf_counter(), time.process_time()
            function()
            if function.on_gpu:
                torch.cuda.synchronize()
            own.append((time.perf_counter() - start, time.process_time() - start_cpu))
    return [own[1:] for own in times]


def measure(job: Job, *, repeats: int, peak_tflops: float | None = None) -> Row:
    """Time both sides in turns. RuntimeError if a loss is not finite."""
    sides = [job.ours, job.theirs]
    own, other = turns(sides, repeats)
    for side in sides:
        if side.loss is not None and not math.isfinite(side.loss):
            raise RuntimeError(f"{job.what}: the loss is {side.loss}")
    seconds, other_seconds = (statistics.median(clock for clock, _ in side) for side in (own, other))
    clock = 0 if job.ours.on_gpu else 1
    ratios = [theirs[clock] / ours[clock] for ours, theirs in zip(own, other, strict=True)]
    per_second = job.count / seconds
    is_rated = job.flops is not None and peak_tflops is not None
    return Row(
        what=job.what,
        per_second=per_second,
        seconds=seconds,
        gflop=None if job.flops is None else job.flops / 1e9,
        mfu=per_second * job.flops / (peak_tflops * 1e12) if is_rated else None,
        peak_gib=job.ours.peak_gib,
        loss=job.ours.loss,
        other=job.other,
        other_per_second=job.count / other_seconds,
        other_peak_gib=job.theirs.peak_gib,
        other_loss=job.theirs.loss,
        ratio=statistics.median(ratios),
        ratios=ratios,
    )


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Iterate over the table's lines, each as soon as its row is measured."""
    yield f"{'what':<42}" + "".join(map(str.rjust, HEADS, WIDTHS)) + "  other"
    for row in rows:
        cells = (
            f"{row.per_second:.2f}",
            f"{row.seconds:.4f}",
            shown(row.gflop, ".4g"),
            shown(row.mfu, ".1%"),
            shown(row.peak_gib, ".1f"),
            f"{row.other_per_second:.2f}",
            shown(row.other_peak_gib, ".1f"),
            f"{row.ratio:.2f}",
            f"[{min(row.ratios):.2f} {max(row.ratios):.2f}]",
        )
        yield f"{row.what:<42}" + "".join(map(str.rjust, cells, WIDTHS)) + f"  {row.other}"


def shown(value: float | None, form: str) -> str:
    """Format a number, or a dash for None."""
    return "-" if value is None else f"{value:{form}}"
