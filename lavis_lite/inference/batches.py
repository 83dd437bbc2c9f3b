"""Batches of images: read ahead by threads, in order, and made smaller where the device has no memory for them."""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
LARGEST_BATCH = 128
CPU_BATCH = 8
"""Images per batch on a CPU, where larger batches are not faster."""


def read_ahead(items: Iterable[T], read: Callable[[T], R], *, num_threads: int, ahead: int) -> Iterator[tuple[T, R]]:
    """Yield each item with the result of `read`, in order, while threads read up to `ahead` items further.

    An exception of `read` is raised when its item's turn comes.
    """
    source = iter(items)
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        waiting: collections.deque[tuple[T, Future[R]]] = collections.deque()
        try:
            for item in itertools.islice(source, ahead):
                waiting.append((item, pool.submit(read, item)))
            while waiting:
                item, future = waiting.popleft()
                waiting.extend((item, pool.submit(read, item)) for item in itertools.islice(source, 1))
                yield item, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class BatchSizer(Generic[T, R]):
    """Applies a function to batches, of a fixed size or, on a GPU, of one that is found.

    Without a size a GPU's batches start at 8 and double until one does not fit, or takes more than half of the memory.
    A batch that does not fit is divided, with a fixed size too.
    """

    def __init__(self, function: Callable[[Sequence[T]], list[R]], *, size: int | None, device: torch.device) -> None:
        self.function, self.device = function, device
        self.size = size or CPU_BATCH
        self.grows = size is None and device.type == "cuda"

    def __call__(self, items: Iterable[T]) -> Iterator[R]:
        """Yield the function's results, one per item, in order."""
        source = iter(items)
        while batch := list(itertools.islice(source, self.size)):
            yield from self._apply(batch)

    def _apply(self, batch: Sequence[T]) -> list[R]:
        try:
            results = self.function(batch)
        except RuntimeError as error:
            if not _is_memory(error) or len(batch) == 1:
                raise
        else:
            self._grow(len(batch))
            return results
        self.size, self.grows = max(1, len(batch) // 2), False  # outside of `except`, which keeps the tensors alive
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(f"a batch of {len(batch)} images does not fit in memory; batches now have {self.size}")
        results, rest = [], batch
        while rest:  # parts may become smaller still
            part, rest = rest[: self.size], rest[self.size :]
            results += self._apply(part)
        return results

    def _grow(self, used: int) -> None:
        if not self.grows or used < self.size:
            return
        free, total = torch.cuda.mem_get_info(self.device)
        self.grows = self.size * 2 <= LARGEST_BATCH and free > total / 2
        self.size = self.size * 2 if self.grows else self.size


def _is_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
