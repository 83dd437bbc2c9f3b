"""Batches of texts and of image tokens: pad, trim and gather them, for BLIP and BLIP-2."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.nn.attention import CrossAttentionKV

Texts = tuple[Tensor, Tensor]
"""Ids and mask (B,T)."""


def stack_texts(*texts: Texts) -> Texts:
    """Concatenate batches, padded (with masked zeros) to the longest."""
    longest = max(ids.shape[1] for ids, _ in texts)
    ids, mask = zip(*(padded(text, longest) for text in texts), strict=True)
    return torch.cat(ids), torch.cat(mask)


def padded(texts: Texts, length: int) -> Texts:
    """Pad the batch with masked zeros to a length."""
    ids, mask = (F.pad(part, (0, length - part.shape[1])) for part in texts)
    return ids, mask


def trimmed(texts: Texts) -> Texts:
    """Remove the columns in which all texts are padded. Waits for the device."""
    ids, mask = texts
    longest = int(mask.sum(dim=1).max())
    return ids[:, :longest], mask[:, :longest]


def fetch_texts(texts: Texts, index: Tensor, *, max_length: int) -> Texts:
    """Return these rows of all ranks' batches, which may be of different lengths up to `max_length`."""
    if dist.world_size() == 1:
        return texts[0][index], texts[1][index]
    rows = dist.gather_rows(torch.stack(padded(texts, max_length), dim=1), index)
    return trimmed((rows[:, 0], rows[:, 1]))


def match_pairs(
    match: Callable[[Tensor, Tensor, CrossAttentionKV], Tensor],
    texts: Texts,
    negatives: tuple[CrossAttentionKV, Texts],
    context: CrossAttentionKV,
) -> Tensor:
    """Return matching logits (3B,2) of B pairs, of each text with its negative image and of each image with its
    negative text, by `match(ids, mask, context)`.

    An image's keys and values serve its own text and the negative one without being copied.
    """
    wrong_image, wrong_text = negatives
    ids, mask = (part.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) for part in stack_texts(texts, wrong_text))
    own = match(ids, mask, context).unflatten(0, (-1, 2))
    return torch.cat([own[:, 0], match(*texts, wrong_image), own[:, 1]])


def in_compute_type(x: Tensor) -> Tensor:
    """Cast to the type in which a linear layer computes: under autocast half the bytes to keep or send, with the same
    results.
    """
    device = x.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if is_on else x
