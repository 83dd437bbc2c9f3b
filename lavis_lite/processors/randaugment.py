"""RandAugment with BLIP's ten operations (colour changes left out, because captions name colours).

Moves give the bytes of OpenCV's bilinear `warpAffine` (4.11 and later: float32 with fused multiply-add): by OpenCV
where it is installed, else in numpy, which takes 10 to 20 times as long.
All randomness comes from torch's generator, so one seed fixes a sample.
Note: AutoContrast differs from LAVIS on purpose: LAVIS negates an unsigned byte and turns every image without a black
pixel white; `legacy_autocontrast=True` reproduces that.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageEnhance

from lavis_lite.common.bounds import check_number

logger = logging.getLogger(__name__)

GREY = 128
MAX_MAGNITUDE = 10
MAX_OPS = 100


def autocontrast(image: np.ndarray, *, legacy: bool = False) -> np.ndarray:
    """Stretch each channel of a (H,W,3) byte image to 0..255. `legacy` keeps LAVIS's overflow (module docstring)."""
    return np.stack([_stretch(image[..., c], legacy=legacy) for c in range(image.shape[-1])], axis=-1)


def _stretch(channel: np.ndarray, *, legacy: bool) -> np.ndarray:
    low, high = int(channel.min()), int(channel.max())
    if high <= low:
        return channel
    scale = 255 / (high - low)
    minus_low = (256 - low) % 256 if legacy else -low
    table = (np.arange(256) * scale + minus_low * scale).clip(0, 255).astype(np.uint8)
    return table[channel]


def equalize(image: np.ndarray) -> np.ndarray:
    """Flatten each channel's histogram as PIL's `ImageOps.equalize` does; (H,W,3) bytes in and out."""
    return np.stack([_equalize_channel(image[..., c]) for c in range(image.shape[-1])], axis=-1)


def _equalize_channel(channel: np.ndarray) -> np.ndarray:
    histogram = np.bincount(channel.ravel(), minlength=256)
    step = (channel.size - histogram[np.flatnonzero(histogram)[-1]]) // 255
    if step == 0:
        return channel
    below = np.concatenate([[step // 2], histogram[:-1]]).cumsum()
    return (below // step).clip(0, 255).astype(np.uint8)[channel]


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Scale a byte image by `factor`; 1 leaves it as it is."""
    return (np.arange(256, dtype=np.float32) * factor).clip(0, 255).astype(np.uint8)[image]


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend a smoothed byte image with the image itself; factor 1 leaves it as it is, above sharpens."""
    if factor == 1.0:
        return image
    return np.asarray(ImageEnhance.Sharpness(Image.fromarray(image)).enhance(factor))


def fused(weight: np.ndarray, factor: np.ndarray, addend: np.ndarray) -> np.ndarray:
    """Return weight * factor + addend of float32 arrays, rounded once, like a processor's fused multiply-add."""
    return (weight.astype(np.float64) * factor + addend).astype(np.float32)


def pixel_reader(image: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a function (x, y) -> float32 (H,W,3) pixels of a (H,W,3) byte image, grey where x or y lie outside."""
    height, width = image.shape[:2]
    framed = np.full((height + 2, width + 2, 4), GREY, dtype=np.uint8)
    framed[1:-1, 1:-1, :3] = image
    words = framed.view(np.uint32)[..., 0]  # one look-up fetches all channels of a pixel

    def read(x_HW: np.ndarray, y_HW: np.ndarray) -> np.ndarray:
        found = words[np.clip(y_HW, -1, height) + 1, np.clip(x_HW, -1, width) + 1]
        return found.view(np.uint8).reshape(*found.shape, 4)[..., :3].astype(np.float32)

    return read


def warp_affine(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Move a (H,W,3) byte image by the 2x3 forward `matrix` on (x, y, 1), grey outside; OpenCV's bytes."""
    shift = matrix[:, 2]
    if np.array_equal(matrix[:, :2], np.eye(2)) and np.array_equal(shift, np.rint(shift)):
        return shifted(image, *shift.astype(int))
    opencv = equal_opencv()
    return interpolated(image, matrix) if opencv is None else opencv_warp(opencv, image, matrix)


def shifted(image: np.ndarray, right: int, down: int) -> np.ndarray:
    """Move a (H,W,3) byte image by whole pixels, grey outside."""
    height, width = image.shape[:2]
    moved = np.full_like(image, GREY)
    to_y, to_x = (slice(max(0, by), max(0, size + min(0, by))) for by, size in ((down, height), (right, width)))
    from_y, from_x = (slice(max(0, -by), max(0, size - max(0, by))) for by, size in ((down, height), (right, width)))
    moved[to_y, to_x] = image[from_y, from_x]
    return moved


def opencv_warp(opencv: Any, image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Move an image as `warp_affine` does, by OpenCV."""
    return opencv.warpAffine(image, matrix, image.shape[1::-1], borderValue=(GREY,) * 3)


@functools.cache
def equal_opencv() -> Any:
    """Return the module of OpenCV, on one thread, if it is installed and moves a test image to the same bytes; else
    None. Releases before 4.11 round otherwise.
    """
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)  # of the whole process: its threads do not survive the fork of a loader's workers
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    for name in ("ShearX", "Rotate"):
        matrix = moving_matrix(name, 0.17, width=83, height=61)
        if not np.array_equal(opencv_warp(cv2, image, matrix), interpolated(image, matrix)):
            logger.info(f"OpenCV {cv2.__version__} rounds otherwise: RandAugment moves images without it")
            return None
    return cv2


def interpolated(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Move an image as `warp_affine` does, by bilinear interpolation in numpy."""
    height, width = image.shape[:2]
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2].astype(np.float32)
    xs, ys = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    x_HW, y_HW = (fused(a, xs, b * ys + c) for a, b, c in inverse)
    left, top = np.floor(x_HW).astype(np.int64), np.floor(y_HW).astype(np.int64)
    along, down = (x_HW - left.astype(np.float32))[..., None], (y_HW - top.astype(np.float32))[..., None]
    read = pixel_reader(image)

    def row_of(y_HW: np.ndarray) -> np.ndarray:
        pixels = read(left, y_HW)
        return _blend(pixels, read(left + 1, y_HW), along) if along.any() else pixels

    pixels = row_of(top)
    return np.rint(_blend(pixels, row_of(top + 1), down) if down.any() else pixels).astype(np.uint8)


def _blend(start: np.ndarray, end: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return fused(weight, end - start, start)


def moving_matrix(name: str, amount: float, *, width: int, height: int) -> np.ndarray:
    """Return the 2x3 forward matrix of a move: ShearX moves each row right by `amount` times its y, ShearY each column
    down by `amount` times its x, TranslateX and TranslateY move left and up by `amount` pixels (LAVIS's sign), Rotate
    turns counter-clockwise by `amount` degrees about (W/2, H/2).
    """
    shear, cx, cy = np.float32(amount), width / 2, height / 2
    cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
    matrices = {
        "ShearX": [[1, shear, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [shear, 1, 0]],
        "TranslateX": [[1, 0, -amount], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, -amount]],
        "Rotate": [[cos, sin, (1 - cos) * cx - sin * cy], [-sin, cos, sin * cx + (1 - cos) * cy]],
    }
    return np.array(matrices[name], dtype=np.float64)


MOST = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 10.0, "TranslateY": 10.0, "Rotate": 30.0}
"""The amount of each move at the largest magnitude."""
OPERATIONS = ("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness", *MOST)


def apply_operation(
    image: np.ndarray, name: str, *, magnitude: float = 5, negative: bool = False, legacy_autocontrast: bool = False
) -> np.ndarray:
    """Apply one of OPERATIONS at `magnitude` (0..10) to a (H,W,3) byte image; `negative` reverses a move."""
    level = magnitude / MAX_MAGNITUDE
    if name in MOST:
        amount = -level * MOST[name] if negative else level * MOST[name]
        return warp_affine(image, moving_matrix(name, amount, width=image.shape[1], height=image.shape[0]))
    if name == "AutoContrast":
        return autocontrast(image, legacy=legacy_autocontrast)
    if name == "Equalize":
        return equalize(image)
    if name in ("Brightness", "Sharpness"):
        return (brightness if name == "Brightness" else sharpness)(image, level * 1.8 + 0.1)
    return image


class RandomAugment:
    """`num_ops` operations drawn with replacement, each then applied with `probability`, at `magnitude` of 10.

    Takes and gives an RGB PIL image, or a uint8 tensor (3,H,W). At BLIP's magnitude 5, Brightness and Sharpness leave
    the image as it is.
    """

    def __init__(
        self, num_ops: int = 2, magnitude: float = 5, *, probability: float = 0.5, legacy_autocontrast: bool = False
    ) -> None:
        self.num_ops: int = check_number("num_ops", num_ops, 0, MAX_OPS)
        self.magnitude: float = check_number("magnitude", magnitude, 0.0, float(MAX_MAGNITUDE))
        self.probability: float = check_number("probability", probability, 0.0, 1.0)
        self.legacy_autocontrast = legacy_autocontrast

    @overload
    def __call__(self, image: Image.Image) -> Image.Image: ...
    @overload
    def __call__(self, image: torch.Tensor) -> torch.Tensor: ...
    def __call__(self, image: Image.Image | torch.Tensor) -> Image.Image | torch.Tensor:
        if not isinstance(image, torch.Tensor):
            return Image.fromarray(self.augmented(np.asarray(image)))
        pixels = self.augmented(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)

    def augmented(self, pixels: np.ndarray) -> np.ndarray:
        """Return the (H,W,3) bytes of an image after the operations that are drawn."""
        for _ in range(self.num_ops):
            name = OPERATIONS[int(torch.randint(len(OPERATIONS), ()))]
            applied, negative = (torch.rand(2) < torch.tensor([self.probability, 0.5])).tolist()
            if applied:
                pixels = apply_operation(
                    pixels,
                    name,
                    magnitude=self.magnitude,
                    negative=negative,
                    legacy_autocontrast=self.legacy_autocontrast,
                )
        return pixels
