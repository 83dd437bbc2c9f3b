"""Images as bytes, 0 to 255, and their normalisation on the device, by the operations of the image processors.

Letters: B samples, F frames, H, W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lavis_lite.common.errors import InputError

MEAN, STD = "image_mean", "image_std"
"""Keys of a batch whose images are bytes: (B,3), on the CPU or where the images are."""


def statistics(images: Sequence[Any], *, mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """Return `image_mean` and `image_std` (B,3) of a batch of images that are bytes; nothing of other images.

    Raises:
        InputError: only some of the images are bytes, which no batch can hold.
    """
    are_bytes = [isinstance(image, Tensor) and image.dtype == torch.uint8 for image in images]
    if not any(are_bytes):
        return {}
    if not all(are_bytes):
        problem = "some images of a batch are bytes (`output: uint8`) and others are not"
        raise InputError(f"image: {problem}: give all splits of run.train_splits the same vis_processor")
    given = {MEAN: mean, STD: std}
    return {key: torch.tensor([own], dtype=torch.float32).repeat(len(images), 1) for key, own in given.items()}


def normalised(samples: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with its images (B,3,H,W) or videos (B,3,F,H,W) that are bytes as the processor would have made
    them: float32, scaled to 0..1 and normalised. A batch without such images is returned as it is.
    """
    if MEAN not in samples:
        return samples
    found = {key: value for key, value in samples.items() if key not in (MEAN, STD)}
    for key, image in found.items():
        if isinstance(image, Tensor) and image.dtype == torch.uint8:
            mean, std = (samples[name].view(-1, 3, *[1] * (image.dim() - 2)) for name in (MEAN, STD))
            whole = torch.full((), 255.0, device=image.device)  # a GPU multiplies by the inverse of a plain number
            found[key] = image.to(torch.float32).div_(whole).sub_(mean).div_(std)
    return found
