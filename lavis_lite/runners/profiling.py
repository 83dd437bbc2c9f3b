"""A profile of some training steps, or batches of an evaluation (`--profile N`): a trace for Perfetto, and a table of
where the time went.

Forward passes are shown by part of the model, the model's direct children. Note: a device computes later than the host
asks it to, so phases are the host's time, and `device ms` is the time of the kernels that a phase started.
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from lavis_lite.common import checkpoint

logger = logging.getLogger(__name__)

WARM_UP = 3
"""Steps before the profile: the first ones allocate memory and choose kernels."""
TABLE, TRACE = "profile.txt", "profile_trace.json.gz"
PHASES = ("data", "forward", "backward", "optimizer", "other")
PART, SHOWN = "part ", 15


T = TypeVar("T")


class Row(NamedTuple):
    """A line of the table: microseconds of the host and of the device, over all profiled steps."""

    name: str
    host: float
    device: float
    calls: int


class StepProfiler:
    """Profiles `num_steps` steps after `WARM_UP` others, once, and writes into `folder`. Without `num_steps` it does
    nothing.
    """

    def __init__(self, folder: Path = Path(), *, num_steps: int | None = None, device: str = "cpu") -> None:
        self.folder, self.num_steps, self.device = folder, num_steps, device
        self.profile: profile | None = None
        self.num_taken = 0

    @contextlib.contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Profile the steps in the body."""
        if self.num_steps is None:
            yield
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
        steps = schedule(wait=0, warmup=WARM_UP, active=self.num_steps, repeat=1)
        with watched(model), profile(activities=activities, schedule=steps, on_trace_ready=self._write) as self.profile:
            logger.info(f"profiling {self.num_steps} steps after {WARM_UP} others")
            yield
        self.profile = None
        if self.num_steps is not None:
            logger.warning(f"run.profile: nothing was profiled, as there were no more than {WARM_UP} steps")

    def phase(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Return a context whose time is shown under one of `PHASES`."""
        return contextlib.nullcontext() if self.profile is None else record_function(name)

    def batches(self, items: Iterator[T]) -> Iterator[T]:
        """Yield items, each of which is a step."""
        while True:
            with self.phase("data"):
                item = next(items, None)
            if item is None:
                return
            yield item
            self.step()

    def step(self) -> None:
        """Count a step."""
        if self.profile is not None:
            self.num_taken += 1
            self.profile.step()

    def _write(self, found: profile) -> None:
        """Write the trace and the table, which the console shows too."""
        if self.num_taken <= WARM_UP:
            return
        num_steps, self.num_steps = self.num_taken - WARM_UP, None
        with tempfile.TemporaryDirectory() as name:
            path = Path(name, TRACE)
            found.export_chrome_trace(str(path))
            checkpoint.atomic_write(self.folder / TRACE, lambda file: file.write(path.read_bytes()))
        text = "\n".join(table(found.key_averages(), num_steps, on_device=self.device != "cpu"))
        checkpoint.write_text(self.folder / TABLE, f"{text}\n")
        logger.info(f"{text}\ntrace, for ui.perfetto.dev: {self.folder / TRACE}")


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """Name the forward passes of the model's children in a profile; a child whose own parts are called is named too."""
    handles = []
    for name, child in model.named_children():
        ranges: list[record_function | None] = []
        for part in (child, *child.children()):
            handles.append(part.register_forward_pre_hook(_opens(f"{PART}{name}", ranges)))
            handles.append(part.register_forward_hook(_closes(ranges), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _opens(name: str, ranges: list[record_function | None]) -> Callable[..., None]:
    """Return a hook that opens a range, unless the module is inside one of the same child."""

    def hook(*_: Any) -> None:
        opened = None if ranges else record_function(name)
        ranges.append(opened)
        if opened is not None:
            opened.__enter__()

    return hook


def _closes(ranges: list[record_function | None]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        opened = ranges.pop()
        if opened is not None:
            opened.__exit__(None, None, None)

    return hook


def table(events: Sequence[FunctionEventAvg], num_steps: int, *, on_device: bool) -> Iterator[str]:
    """Yield the lines: phases, the parts of the model in the forward pass, and the operations that took longest."""
    rows = [Row(str(e.key), e.cpu_time_total, e.device_time_total, e.count) for e in events]
    named = {row.name: row for row in rows}
    whole = next(row.host for row in rows if row.name.startswith("ProfilerStep"))
    yield f"profile of {num_steps} steps of {whole / 1e3 / num_steps:.1f} ms"
    yield ""
    known = [named[phase] for phase in PHASES if phase in named]
    rest = whole - sum(row.host for row in known)
    yield from _block("phase", [*known, Row("other", rest, 0.0, num_steps)], whole, num_steps, on_device=on_device)
    parts = [row._replace(name=row.name.removeprefix(PART)) for row in rows if row.name.startswith(PART)]
    parts.sort(key=lambda row: row.device if on_device else row.host, reverse=True)
    yield from _block("forward pass of", parts, whole, num_steps, on_device=on_device)
    own = [Row(str(e.key), e.self_cpu_time_total, e.self_device_time_total, e.count) for e in events]
    own = [row for row in own if "::" in row.name]
    own.sort(key=lambda row: row.device if on_device else row.host, reverse=True)
    yield from _block("operation", own[:SHOWN], whole, num_steps, on_device=on_device)


def _block(head: str, rows: Sequence[Row], whole: float, num_steps: int, *, on_device: bool) -> Iterator[str]:
    """Yield a header and a line per row, in milliseconds per step."""
    yield f"{head:<44}{'ms/step':>10}{'share':>8}{'device ms':>11}{'calls/step':>12}"
    for row in rows:
        device = f"{row.device / 1e3 / num_steps:.2f}" if on_device else "-"
        share = row.host / whole if whole else 0.0
        cells = f"{row.host / 1e3 / num_steps:>10.2f}{share:>8.1%}{device:>11}{row.calls / num_steps:>12.1f}"
        yield f"{row.name[:43]:<44}{cells}"
    yield ""
