"""Opening an image file of any kind as 8-bit RGB.

As in LAVIS, the first frame of an animation is taken, alpha is dropped without blending, and the EXIF orientation is
ignored (published results were measured so). Unlike `PIL.Image.convert`, 16-bit grey is scaled to 8 bit, not clipped.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from PIL import Image

from lavis_lite.errors import UnreadableSample
from lavis_lite.pixels import to_rgb

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
