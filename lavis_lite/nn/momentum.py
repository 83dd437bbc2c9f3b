"""Momentum encoders and feature queue (MoCo, as used by ALBEF and BLIP)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lavis_lite.common.errors import InputError

ModulePair = tuple[nn.Module, nn.Module]
"""An online module and its momentum encoder."""


@torch.no_grad()
def copy_parameters(pairs: Iterable[ModulePair]) -> None:
    """Make each momentum encoder an exact, frozen copy."""
    for online, momentum_encoder in pairs:
        for parameter, copy in zip(online.parameters(), momentum_encoder.parameters(), strict=True):
            copy.copy_(parameter)
            copy.requires_grad_(False)


@torch.no_grad()
def update_momentum(pairs: Iterable[ModulePair], momentum: float) -> None:
    """Set each momentum encoder to momentum x itself + (1 - momentum) x online, in a few fused calls."""
    for online, momentum_encoder in pairs:
        weights = [p.detach() for p in online.parameters()]
        torch._foreach_lerp_(list(momentum_encoder.parameters()), weights, 1.0 - momentum)


@torch.no_grad()
def enqueue(queues: Sequence[tuple[Tensor, Tensor]], pointer: Tensor) -> None:
    """Overwrite the oldest columns of each queue (E,Q) with new columns (E,N) and advance the shared pointer (1,). Does
    not wait for the device.

    Columns wrap round the queue's end: a loaded pointer need not be a multiple of this run's batch.
    """
    size, new = queues[0][0].shape[1], queues[0][1].shape[1]
    if new > size:
        raise InputError(f"model.queue_size: {size} is less than the global batch of {new}; raise it, or set 0")
    places = (pointer + torch.arange(new, device=pointer.device)) % size
    for queue, columns in queues:
        queue.index_copy_(1, places, columns.to(queue.dtype))
    pointer.add_(new).remainder_(size)
