"""Opening an image file of any kind as 8-bit RGB.

As in LAVIS, the first frame of an animation is taken, alpha is dropped without blending, and the EXIF orientation is
ignored (published results were measured so). Unlike `PIL.Image.convert`, 16-bit grey is scaled to 8 bit, not clipped.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from lavis_lite.errors import UnreadableSample

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def open_image(path: str | Path) -> Image.Image:
    """The image as RGB, fully decoded. Raises UnreadableSample, naming the file, when it's missing or broken."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise UnreadableSample(
            f"image file not found: {path}. Check the dataset's build_info.images.storage (relative paths are below "
            "the data root, environment variable LAVIS_LITE_DATA) or remove the record from the annotations."
        ) from None
    except Image.DecompressionBombError as error:
        raise UnreadableSample(f"image file too large to decode safely: {path} ({error}). Shrink it.") from error
    except _BROKEN as error:
        raise UnreadableSample(
            f"image file broken or truncated: {path} ({type(error).__name__}: {error}). "
            "Fetch it again, or remove the record from the annotations."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB. 16-bit grey (`I;16*`, and `I`, which is how PIL may open it) is divided by 257."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P":
        # Straight to RGB, PIL warns about palettes with per-entry transparency; the colours are the same.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
