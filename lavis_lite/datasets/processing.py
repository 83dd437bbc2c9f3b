"""The processors of a split, and the images that a split processes once per batch."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lavis_lite.common.config.schema import as_read
from lavis_lite.common.pixels import statistics
from lavis_lite.common.registry import registry


def identity(value: Any) -> Any:
    """Return the value: the processor of a dataset that names none."""
    return value


def make_processor(blocks: dict[str, Any], split: str) -> Callable[[Any], Any]:
    """Return the processor of the split's block (`train` for the split of that name, else `eval`), or `identity`."""
    block = dict(blocks.get("train" if split == "train" else "eval") or {})
    if not block:
        return identity
    processor_class = registry.get_processor_class(block["name"])
    processor: Callable[[Any], Any] = processor_class.from_config(as_read(processor_class, block))
    return processor


@runtime_checkable
class Repeatable(Protocol):
    """A processor that says whether it makes equal tensors of the same image or video each time."""

    is_deterministic: bool


@runtime_checkable
class Normalises(Protocol):
    """An image processor that knows the mean and the standard deviation of each colour."""

    mean: Sequence[float]
    std: Sequence[float]


def byte_statistics(samples: Sequence[dict[str, Any]], processor: object) -> dict[str, Tensor]:
    """Return the mean and deviation of a batch's images, as `statistics`, if they are bytes of this processor."""
    images = [sample[key] for sample in samples for key in ("image", "image0") if key in sample]
    return statistics(images, mean=processor.mean, std=processor.std) if isinstance(processor, Normalises) else {}


class ProcessedImages:
    """What a deterministic processor made of the images, or videos, of the batch that is being read."""

    def __init__(self) -> None:
        self.made: dict[Hashable, Tensor] | None = None
        """By the image's place; None while every image is processed anew."""

    @contextlib.contextmanager
    def kept_by(self, processor: object) -> Iterator[None]:
        """Within the body process each image once, if the processor is deterministic."""
        self.made = {} if isinstance(processor, Repeatable) and processor.is_deterministic else None
        try:
            yield
        finally:
            self.made = None

    def once(self, place: Hashable, process: Callable[[], Any]) -> Any:
        """Return what `process` makes of the image at a place; of one that was processed already a copy, which the
        caller may change.
        """
        if self.made is None:
            return process()
        if place not in self.made:
            self.made[place] = process()
        return self.made[place].clone()
