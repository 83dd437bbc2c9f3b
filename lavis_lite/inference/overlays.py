"""Maps of where a model looked, drawn over the image."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from lavis_lite.common.gradcam import getAttMap
from lavis_lite.models.explain import Maps

SIZE = 224
"""Width and height of an overlay, in pixels."""
MAX_MAPS = 64


class Overlay(NamedTuple):
    """A picture of a map, with the map's largest value as a share of the largest of all maps."""

    label: str
    picture: Image.Image
    share: float


def squashed(image: Image.Image) -> Image.Image:
    """Return the image as square as the model sees it."""
    return image.resize((SIZE, SIZE))


def overlay(image: Image.Image, values: np.ndarray) -> Image.Image:
    """Return a map (h,w) over an image of `squashed`."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    return Image.fromarray((255 * getAttMap(pixels, values)).astype(np.uint8))


def overlays(image: Image.Image, maps: Maps) -> list[Overlay]:
    """Return the first `MAX_MAPS` maps over an image of `squashed`."""
    largest = max(maps.maps.max(), 1e-12)
    pairs = list(zip(maps.labels, maps.maps, strict=True))[:MAX_MAPS]
    return [Overlay(label, overlay(image, values), float(values.max() / largest)) for label, values in pairs]
