"""Overlay of an attention map on an image, as LAVIS's notebooks draw it."""

import numpy as np
from PIL import Image


def getAttMap(  # LAVIS's name
    img: np.ndarray, attMap: np.ndarray, blur: bool = True, overlap: bool = True
) -> np.ndarray:
    """Return the colours of an attention map (h,w), or, with `overlap`, the image (H,W,3) of 0 to 1 below them.

    The map is scaled to 0 to 1 and resized to the image; with `blur` it is smoothed by a Gaussian of 2 percent of the
    longer side. Colours go from blue, least, over green to red; opacity is the map to the power of 0.7.
    """
    height, width = img.shape[:2]
    resized = Image.fromarray(_scaled(attMap).astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    attention = np.clip(np.asarray(resized, dtype=np.float64), 0, 1)
    if blur:
        attention = _scaled(_blurred(attention, sigma=0.02 * max(height, width)))
    centres = np.array([3.0, 2.0, 1.0])  # of red, green and blue, in quarters of the scale
    colours = np.clip(1.5 - np.abs(4 * attention[..., None] - centres), 0, 1)
    if not overlap:
        return colours
    opacity = attention[..., None] ** 0.7
    return (1 - opacity) * img + opacity * colours


def _scaled(values: np.ndarray) -> np.ndarray:
    """Return the values from 0 to 1; zeros if all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values, dtype=np.float64)


def _blurred(values: np.ndarray, *, sigma: float) -> np.ndarray:
    """Return the values (H,W) after a Gaussian filter; edges are repeated."""
    reach = max(1, int(4 * sigma + 0.5))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(values, [(reach, reach) if axis == own else (0, 0) for own in (0, 1)], mode="edge")
        values = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return values
