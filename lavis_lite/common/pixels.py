"""Any picture as 8-bit RGB, for datasets that open files and for processors that are handed pictures.

Files are untrusted: only regular files in `FORMATS` are opened, whatever their names say, and only up to a number of
pixels. Pillow would pass an EPS to Ghostscript, and wait at a named pipe for ever.
"""

import functools
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError, InputTypeError

IGNORE_ALPHA = "ignore_alpha"
"""The background that is none: transparency is dropped, and what colour lies under it shows, as in LAVIS."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of what is opened."""
MAX_PIXELS = 120_000_000
"""More pixels are refused before they are decoded: a file of 20 kB can hold them. (Phones take 108,000,000.)"""

BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, RuntimeError, struct.error, zlib.error)
"""What Pillow raises about a broken file (RuntimeError: about an AVIF)."""


def open_file(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return a picture that is not decoded yet, to be used in a `with` statement.

    Raises ValueError for what is not a regular file and for too many pixels, FileNotFoundError, and whatever Pillow
    raises about a broken file.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise InputError("it is not a regular file")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit, which has no other form than this variable
    try:
        return Image.open(path, formats=formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{error}; max_pixels is {max_pixels:,}") from error


@functools.cache
def formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that the installed Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image, *, background: str = "white", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return `image` as 8-bit RGB; itself if it is that already.

    - Transparent pixels show `background`, a colour of `PIL.ImageColor`, or with `ignore_alpha` the colour under them.
    - 16-bit grey is divided by 257; Pillow would clip it to white. 32-bit integers count as 8-bit up to 255, else as
      16-bit.
    - Floats from 0 to 1 are multiplied by 255; larger ones are taken as 0 to 255.

    Raises ValueError for numbers outside these ranges, for NaN and for more than `max_pixels`; TypeError if it is no
    PIL image.
    """
    if not isinstance(image, Image.Image):
        raise InputTypeError(
            f"an image processor takes a PIL image, got {type(image).__name__}: open it with PIL.Image.open"
        )
    if image.width * image.height > max_pixels:
        raise InputError(
            f"the image has {image.width} x {image.height} pixels, more than max_pixels={max_pixels:,}: shrink it, or "
            "raise max_pixels of the image processor"
        )
    image.load()  # GIF and TIFF know their mode only then
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return _from_numbers(image).convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image  # the only way that Pillow has
    if background != IGNORE_ALPHA and image.has_transparency_data:
        return _composite(image, background)
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about palettes with per-entry transparency
    return image if image.mode == "RGB" else image.convert("RGB")


def check_background(background: str) -> str:
    """Return `background`; raise ValueError if it is neither a colour nor `ignore_alpha`."""
    if background != IGNORE_ALPHA:
        try:
            ImageColor.getrgb(background)
        except (ValueError, AttributeError):
            raise InputError(
                f"background: expected a colour such as white or '#ffffff', or {IGNORE_ALPHA}, got {background!r}"
            ) from None
    return background


def check_max_pixels(max_pixels: int) -> int:
    """Return `max_pixels`; raise ValueError if it is not a positive integer."""
    return check_number("max_pixels", max_pixels, 1, 2**53)


def is_constant(image: Image.Image) -> bool:
    """Return whether all pixels of an 8-bit image have one value; most images are told by a few pixels."""
    right, bottom = image.width - 1, image.height - 1
    spots = {
        image.getpixel(at) for at in ((0, 0), (right // 2, bottom // 2), (right // 3, bottom // 2), (right, bottom))
    }
    return len(spots) == 1 and all(low == high for low, high in image.getextrema())


def _composite(image: Image.Image, background: str) -> Image.Image:
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, ImageColor.getrgb(background)[:3])
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _from_numbers(image: Image.Image) -> Image.Image:
    """Return a grey image of 16-bit integers, 32-bit integers or floats in 8 bit."""
    grey = np.asarray(image)
    low, high = grey.min(), grey.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # NaN is not within either
            raise InputError(
                f"the image's floats go from {low:g} to {high:g}: expected 0 to 1 or 0 to 255, without NaN"
            )
        grey = grey.astype(np.float64) * 255 + 0.5 if high <= 1 else grey
        return Image.fromarray(grey.astype(np.uint8))
    grey = grey.astype(np.int64)
    if low < 0 or high > 65535:
        raise InputError(f"the image's integers go from {low} to {high}: expected 0 to 255 or 0 to 65535")
    if image.mode == "I" and high <= 255:
        return Image.fromarray(grey.astype(np.uint8))
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
