"""Images as 8-bit RGB, for datasets that open files and for processors that receive images.

Files are untrusted: only regular files in `FORMATS` are opened, whatever their names, up to a number of pixels. Pillow
would pass an EPS to Ghostscript, and block at a named pipe.
"""

import functools
import io
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError, InputTypeError, SettingError
from lavis_lite.common.records import StoredImage

IGNORE_ALPHA = "ignore_alpha"
"""In place of a background colour: transparency is dropped, and the colour of transparent pixels shows, as in LAVIS."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are opened."""
SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Ends of the names by which images are found in folders and shards; the content of a file decides what it is."""
MAX_PIXELS = 120_000_000
"""Images with more pixels are refused before decoding: a file of 20 kB can hold them. (Phones take 108,000,000.)"""

BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, RuntimeError, struct.error, zlib.error)
"""Errors of Pillow about a broken file (RuntimeError: an AVIF)."""


def open_file(path: str | Path | StoredImage, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an image that is not decoded yet, as a context manager.

    Raises InputError if it is not a regular file or has too many pixels, FileNotFoundError, and Pillow's errors about
    a broken file (`BROKEN`).
    """
    if not isinstance(path, StoredImage) and not stat.S_ISREG(Path(path).stat().st_mode):
        raise InputError("it is not a regular file")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow has no other way to set its limit
    try:
        return Image.open(io.BytesIO(path.read()) if isinstance(path, StoredImage) else path, formats=formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{error}; max_pixels is {max_pixels:,}") from error


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the formats of `FORMATS` that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image, *, background: str = "white", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return `image` as 8-bit RGB; an 8-bit RGB image is returned itself.

    - Transparent pixels show `background`, a colour of `PIL.ImageColor`, or with `ignore_alpha` their own colour.
    - 16-bit grey is divided by 257; Pillow would clip it to white. 32-bit integers count as 8-bit up to 255, else as
      16-bit.
    - Floats from 0 to 1 are multiplied by 255; larger ones count as 0 to 255.

    Raises InputError for numbers outside these ranges, for NaN and for more than `max_pixels` pixels; InputTypeError
    for other than a PIL image.
    """
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise InputTypeError(f"an image processor takes a PIL image, got {kind}: open it with PIL.Image.open")
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} pixels, more than max_pixels={max_pixels:,}"
        raise InputError(f"the image has {size}: shrink it, or raise max_pixels of the image processor")
    image.load()  # sets the mode of GIF and TIFF
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return _from_numbers(image).convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image  # Pillow converts La to LA only
    if background != IGNORE_ALPHA and image.has_transparency_data:
        return _composite(image, background)
    if image.mode == "P":
        image = image.convert("RGBA")  # from P to RGB, Pillow warns about palettes with transparency per entry
    return image if image.mode == "RGB" else image.convert("RGB")


def check_background(background: str) -> str:
    """Return `background`; raise SettingError if it is neither a colour nor `ignore_alpha`."""
    if background != IGNORE_ALPHA:
        try:
            ImageColor.getrgb(background)
        except (ValueError, AttributeError):
            expected = f"a colour such as white or '#ffffff', or {IGNORE_ALPHA}"
            raise SettingError("background", f"expected {expected}, got {background!r}") from None
    return background


def check_max_pixels(max_pixels: int) -> int:
    """Return `max_pixels`; raise SettingError if it is not a positive integer."""
    return check_number("max_pixels", max_pixels, 1, 2**53)


def is_constant(image: Image.Image) -> bool:
    """Return whether all pixels of an 8-bit image have one value."""
    return len(image.getcolors(1) or []) == 1  # None for more than one


def _composite(image: Image.Image, background: str) -> Image.Image:
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, ImageColor.getrgb(background)[:3])
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _from_numbers(image: Image.Image) -> Image.Image:
    """Return a grey image of 16-bit integers, 32-bit integers or floats as 8-bit grey."""
    grey = np.asarray(image)
    low, high = grey.min(), grey.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # also for NaN
            raise InputError(f"the image's floats go from {low:g} to {high:g}: expected 0 to 1 or 0 to 255, not NaN")
        grey = grey.astype(np.float64) * 255 + 0.5 if high <= 1 else grey
        return Image.fromarray(grey.astype(np.uint8))
    grey = grey.astype(np.int64)
    if low < 0 or high > 65535:
        raise InputError(f"the image's integers go from {low} to {high}: expected 0 to 255 or 0 to 65535")
    if image.mode == "I" and high <= 255:
        return Image.fromarray(grey.astype(np.uint8))
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
