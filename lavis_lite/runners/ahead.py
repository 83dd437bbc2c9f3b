"""The copy of batches to the device, on an accelerator one batch ahead of the step that computes."""

from collections.abc import Iterator

import torch

from lavis_lite.common.pixels import normalised
from lavis_lite.common.transfer import pins_memory, tensors_of, to_device
from lavis_lite.runners.streaming import Item


def on_device(items: Iterator[Item], device: torch.device) -> Iterator[Item]:
    """Yield the batches on a device. An accelerator copies the next one, on a stream of its own, while it computes."""
    if not pins_memory(device):
        for item in items:
            yield _moved(item, device)
        return
    streams = torch.get_device_module(device)
    own = streams.Stream(device)
    following = None
    for item in items:
        with streams.stream(own):
            copied = _moved(item, device)
        if following is not None:
            yield following
        computing = streams.current_stream(device)
        computing.wait_stream(own)
        for tensor in tensors_of(copied.batch.samples):
            tensor.record_stream(computing)  # else the memory of a batch would be free for a copy while it is read
        following = copied
    if following is not None:
        yield following


def _moved(item: Item, device: torch.device) -> Item:
    samples = to_device(item.batch.samples, device)
    return item._replace(batch=item.batch._replace(samples=None if samples is None else normalised(samples)))
