"""Writes checkpoints, in the training's own thread or aside (`run.async_checkpoint`).

Aside, training waits only while the state is copied to the host's memory. One checkpoint is written at a time: the next
one waits for it. An error of a write is raised in the training's thread after the step at which it is noticed.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from lavis_lite.common.sharding import on_host


class CheckpointWriter:
    """While entered, writes checkpoints; leaving it waits for the last one. Used on the ranks that write."""

    def __init__(self, *, is_aside: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if is_aside else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if kind is None or not issubclass(kind, Exception):  # another error is the one to report
            self.wait()

    def write(self, function: Callable[[Mapping[str, Any]], None], saved: Mapping[str, Any]) -> None:
        """Call `function(saved)`; aside, with a copy of `saved` that training does not change."""
        self.wait()
        if self._pool is None:
            function(saved)
        else:
            self._pending = self._pool.submit(function, on_host(saved))

    def check(self) -> None:
        """Raise the error of a write that has ended."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written. Raise the error of the write."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
