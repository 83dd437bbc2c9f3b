"""Copies to the device for which the host does not wait."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

WITH_PINNED_MEMORY = ("cuda",)
"""Types of devices that copy from pinned memory while the host continues."""


def pins_memory(device: torch.device) -> bool:
    """Return whether copies to a device should come from pinned memory."""
    return device.type in WITH_PINNED_MEMORY


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from the CPU through pinned memory, without which the host would wait until the device
    has done all earlier work.
    """
    if tensor.device.type != "cpu" or not pins_memory(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return `batch` with every tensor in its dicts, lists and tuples on `device`, as `upload` does."""
    if isinstance(batch, Tensor):
        return upload(batch, torch.device(device))
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield every tensor in the dicts, lists and tuples of `batch`."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from tensors_of(list(batch.values()))
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors_of(value)
