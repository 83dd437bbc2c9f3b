"""Samples of a batch that show the same image, as the questions about it: the image is copied and encoded once.

The loader leaves out repeated images on the CPU (`without_repeats`) and restores them on the device (`with_repeats`);
then a task lets the model encode each image once (`encoded_once`). Images are the same if all their values are equal.
"""

from typing import Any

import torch
from torch import Tensor

from lavis_lite.common.transfer import upload
from lavis_lite.models.base import BaseModel
from lavis_lite.models.inputs import IS_ENCODED

SAME_IMAGE = "same_image"
"""Key of a batch: for each sample the position of the first sample with the same image."""
NUM_COMPARED = 64
"""Values of an image by which most images are told apart; only of equal ones all values are compared."""
Samples = dict[str, Any]


def without_repeats(samples: Samples) -> Samples:
    """Return a batch on the CPU with each image, or video, once as `image`, and with `same_image`; without repeated
    images the batch itself.
    """
    image = samples.get("image")
    if not isinstance(image, Tensor) or image.dim() < 4:
        return samples
    same = first_equal(image)
    firsts = sorted(set(same))
    return samples if len(firsts) == len(same) else {**samples, "image": image[firsts], SAME_IMAGE: same}


def with_repeats(samples: Samples) -> Samples:
    """Return the batch that `without_repeats` got, on any device, and with `same_image`."""
    return {**samples, "image": samples["image"][rows_of(samples)[1]]} if SAME_IMAGE in samples else samples


def encoded_once(model: object, samples: Samples) -> Samples:
    """Return the batch with the image encoder's tokens as `image`, computed once per image, if samples share images and
    the model reads tokens; else the batch itself.

    Raises:
        InputError: the images are not those that the model takes.
    """
    if SAME_IMAGE not in samples or not isinstance(model, BaseModel) or not model.reads_encoded:
        return samples
    image = model.checked_image(samples, answering=True)
    if image.dim() != 4:
        return samples
    firsts, rows = rows_of(samples)
    return {**samples, "image": model.encoder_tokens(image[firsts])[rows], IS_ENCODED: True}


def rows_of(samples: Samples) -> tuple[Tensor, Tensor]:
    """Return the positions of the samples with another image than all before, and for each sample the row of its image
    among these; on the image's device.
    """
    firsts, rows = torch.tensor(samples[SAME_IMAGE]).unique(return_inverse=True)
    device = samples["image"].device
    return upload(firsts, device), upload(rows, device)


def first_equal(images: Tensor) -> list[int]:
    """Return for each of the images (B, ...) the position of the first that equals it."""
    values = images.flatten(1)
    some = values[:, :: max(1, values.shape[1] // NUM_COMPARED)].tolist()
    alike: dict[tuple[float, ...], list[int]] = {}
    found = []
    for row, key in enumerate(map(tuple, some)):
        others = alike.setdefault(key, [])
        first = next((other for other in others if torch.equal(images[other], images[row])), row)
        if first == row:
            others.append(row)
        found.append(first)
    return found
