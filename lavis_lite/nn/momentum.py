"""Momentum twin and feature queue (MoCo, as used by ALBEF and BLIP)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lavis_lite.common.errors import InputError


@torch.no_grad()
def copy_parameters(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Make each second module an exact, frozen copy of the first."""
    for online, twin in pairs:
        for parameter, copy in zip(online.parameters(), twin.parameters(), strict=True):
            copy.copy_(parameter)
            copy.requires_grad_(False)


@torch.no_grad()
def update_momentum(pairs: Iterable[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """twin <- momentum * twin + (1 - momentum) * online, for all parameters in a few fused calls."""
    for online, twin in pairs:
        torch._foreach_lerp_(list(twin.parameters()), [p.detach() for p in online.parameters()], 1.0 - momentum)


@torch.no_grad()
def enqueue(queues: Iterable[tuple[Tensor, Tensor]], pointer: Tensor) -> None:
    """Overwrite the oldest columns of each queue (E,Q) with new columns (E,N) and advance the shared pointer (1,).

    Columns wrap round the queue's end: a loaded pointer may be no multiple of this run's batch.
    """
    start = int(pointer)
    for queue, columns in queues:
        size, new = queue.shape[1], columns.shape[1]
        if new > size:
            raise InputError(
                f"model.queue_size: {size} is smaller than the global batch of {new}: choose a longer queue, or 0 for "
                "contrast within the batch"
            )
        at_end = min(new, size - start)
        queue[:, start : start + at_end] = columns[:, :at_end]
        queue[:, : new - at_end] = columns[:, at_end:]
        pointer[0] = (start + new) % size
