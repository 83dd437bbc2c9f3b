"""Image processors of BLIP and BLIP-2: a PIL image of any mode in, a normalised float (3,S,S) tensor out.

Note: evaluation squashes the image to a square (no centre crop), and all resizing is Pillow's bicubic with
antialiasing. CMYK, palette, grey, transparent and 16-bit images become 8-bit RGB first (`common.image_io.to_rgb`).

With `backend: torchvision` torchvision resizes tensors of bytes, which takes a fifth of the time. Crops and mirrors are
those of the same seed; resized pixels differ from Pillow's by at most 2 of 255.
"""

import math
from collections.abc import Sequence
from numbers import Real
from types import ModuleType
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional, v2

from lavis_lite.common.bounds import MAX_IMAGE_SIZE, check_number, one_of
from lavis_lite.common.errors import InputError
from lavis_lite.common.image_io import MAX_PIXELS, check_background, check_max_pixels, to_rgb
from lavis_lite.common.registry import registry
from lavis_lite.processors.base import BaseProcessor
from lavis_lite.processors.randaugment import RandomAugment

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


Backend = Literal["pillow", "torchvision"]
Output = Literal["float32", "uint8"]


def kit(backend: Backend) -> ModuleType:
    """Return the module whose `Resize`, `RandomResizedCrop` ... a backend uses."""
    return v2 if backend == "torchvision" else transforms


class ImageProcessor(BaseProcessor):
    """Convert to RGB, then `geometry`, then to a normalised tensor, or to bytes if the class `returns_bytes`.

    `geometry` takes and gives PIL images, with the backend `torchvision` uint8 tensors (3,H,W). Transparent pixels show
    `background`; images of more than `max_pixels` are refused. Both hold for the files, too, that a dataset opens for
    this processor.
    """

    returns_bytes: bool = False

    def __init__(
        self,
        geometry: Sequence[object],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        background: str = "white",
        max_pixels: int = MAX_PIXELS,
        backend: Backend = "pillow",
    ) -> None:
        self.backend = one_of("backend", backend, get_args(Backend))
        self.mean = tuple(CLIP_MEAN if mean is None else mean)
        self.std = tuple(CLIP_STD if std is None else std)
        numbers = (*self.mean, *self.std)
        is_number = all(isinstance(number, Real) and math.isfinite(number) for number in numbers)
        if not is_number or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"mean and std take three numbers each, std above 0; got {self.mean} and {self.std}")
        self.background, self.max_pixels = check_background(background), check_max_pixels(max_pixels)
        self.geometry = transforms.Compose(geometry)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return float32 (3, image_size, image_size) of a PIL image of any mode; uint8 if this `returns_bytes`."""
        rgb = to_rgb(image, background=self.background, max_pixels=self.max_pixels)
        if self.backend == "pillow":
            own = self.geometry(rgb)
            if self.returns_bytes:
                return functional.pil_to_tensor(own)
            return functional.normalize(functional.to_tensor(own), self.mean, self.std)
        pixels = self.geometry(torch.from_numpy(np.array(rgb)).permute(2, 0, 1)).contiguous()
        if self.returns_bytes:
            return pixels
        return functional.normalize(pixels.to(torch.float32).div(255), self.mean, self.std, inplace=True)


class ImageTrainProcessor(ImageProcessor):
    """A random resized crop of `min_scale`..`max_scale` of the area, mirrored half the time if `hflip`.

    With `output: uint8` it returns bytes, a quarter of the memory, which the training loop normalises on the device.
    """

    def __init__(
        self,
        *,
        image_size: int = 364,
        min_scale: float = 0.5,
        max_scale: float = 1.0,
        hflip: bool = True,
        backend: Backend = "pillow",
        output: Output = "float32",
        **pixels: Any,
    ) -> None:
        own = kit(backend)
        self.returns_bytes = one_of("output", output, get_args(Output)) == "uint8"
        check_number("image_size", image_size, 1, MAX_IMAGE_SIZE)
        scale = check_number("min_scale", min_scale, 1e-6, 1.0), check_number("max_scale", max_scale, min_scale, 1.0)
        crop = own.RandomResizedCrop(image_size, scale=scale, interpolation=InterpolationMode.BICUBIC)
        super().__init__([crop, own.RandomHorizontalFlip()] if hflip else [crop], backend=backend, **pixels)


@registry.register_processor("blip_image_train")
class BlipImageTrainProcessor(ImageTrainProcessor):
    """Random resized crop, mirror, RandAugment (BLIP: N=2, M=5). `hflip: false` where left and right matter."""

    def __init__(
        self,
        *,
        image_size: int = 384,
        randaugment: bool = True,
        num_ops: int = 2,
        magnitude: float = 5,
        legacy_autocontrast: bool = False,
        **crop: Any,
    ) -> None:
        super().__init__(image_size=image_size, **crop)
        if randaugment:
            augment = RandomAugment(num_ops, magnitude, legacy_autocontrast=legacy_autocontrast)
            self.geometry.transforms.append(augment)


@registry.register_processor("blip2_image_train")
class Blip2ImageTrainProcessor(ImageTrainProcessor):
    """As `blip_image_train` without RandAugment, 364 pixels by default (BLIP-2's finetuning size)."""


@registry.register_processor("blip_image_eval")
class BlipImageEvalProcessor(ImageProcessor):
    """Squash to (image_size, image_size) and normalise; deterministic."""

    is_deterministic: ClassVar[bool] = True

    def __init__(self, *, image_size: int = 384, backend: Backend = "pillow", **pixels: Any) -> None:
        size = check_number("image_size", image_size, 1, MAX_IMAGE_SIZE)
        resize = kit(backend).Resize((size, size), interpolation=InterpolationMode.BICUBIC)
        super().__init__([resize], backend=backend, **pixels)
