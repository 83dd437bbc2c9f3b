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


class ProcessesImages:
    """A dataset that processes an image, or a video, once for all samples of a batch, if its processor is
    deterministic.
    """

    vis_processor: Callable[[Any], Any] = staticmethod(identity)
    batch_images: dict[Hashable, Tensor] | None = None
    """Of the batch that is being read, by the image's place; None while every image is processed anew."""

    @contextlib.contextmanager
    def processing_once(self) -> Iterator[None]:
        """Within the body, which reads a batch, process each image once."""
        own = self.vis_processor
        self.batch_images = {} if isinstance(own, Repeatable) and own.is_deterministic else None
        try:
            yield
        finally:
            self.batch_images = None

    def process_once(self, place: Hashable, process: Callable[[], Any]) -> Any:
        """Return what `process` makes of the image at a place; of one that was processed already a copy, which the
        caller may change.
        """
        if self.batch_images is None:
            return process()
        if place not in self.batch_images:
            self.batch_images[place] = process()
        return self.batch_images[place].clone()
