"""Any picture as 8-bit RGB, for datasets that open files and for processors that are handed pictures."""

import numpy as np
from PIL import Image

from lavis_lite.errors import InputTypeError


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` as 8-bit RGB. Raises TypeError if it is not a PIL image.

    16-bit grey is divided by 257 (Pillow would clip it to white). Alpha is dropped without blending, as in LAVIS.
    """
    if not isinstance(image, Image.Image):
        raise InputTypeError(
            f"an image processor takes a PIL image, got {type(image).__name__}: open it with PIL.Image.open"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about palettes with per-entry transparency
    return image.convert("RGB")
