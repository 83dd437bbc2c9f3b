"""LAVIS's image processors for CLIP, which some recipes of InstructBLIP use; 224 pixels by default.

Note: unlike `blip_image_eval`, which resizes an image to a square, these keep its proportions and lose its edges.
"""

from typing import Any, ClassVar

from torchvision.transforms import InterpolationMode

from lavis_lite.common.bounds import MAX_IMAGE_SIZE, check_number
from lavis_lite.common.registry import registry
from lavis_lite.processors.image import Backend, ImageProcessor, ImageTrainProcessor, kit


@registry.register_processor("clip_image_train")
class ClipImageTrainProcessor(ImageTrainProcessor):
    """A random resized crop of `min_scale`..`max_scale` of the area; not mirrored, as in LAVIS, unless `hflip`."""

    def __init__(self, *, image_size: int = 224, min_scale: float = 0.9, hflip: bool = False, **crop: Any) -> None:
        super().__init__(image_size=image_size, min_scale=min_scale, hflip=hflip, **crop)


@registry.register_processor("clip_image_eval")
class ClipImageEvalProcessor(ImageProcessor):
    """Resize the shorter side to `image_size` (bicubic), crop the centre, normalise; deterministic."""

    is_deterministic: ClassVar[bool] = True

    def __init__(self, *, image_size: int = 224, backend: Backend = "pillow", **pixels: Any) -> None:
        own, size = kit(backend), check_number("image_size", image_size, 1, MAX_IMAGE_SIZE)
        resize = own.Resize(size, interpolation=InterpolationMode.BICUBIC)
        super().__init__([resize, own.CenterCrop(size)], backend=backend, **pixels)
