"""Batches of texts and of image tokens: pad, trim and gather them, for BLIP and BLIP-2."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.common.transfer import upload
from lavis_lite.nn.attention import CrossAttentionKV

Texts = tuple[Tensor, Tensor | None]
"""Ids and mask (B,T); None for a mask without padding."""


def stack_texts(*texts: Texts) -> Texts:
    """Concatenate batches, padded (with masked zeros) to the longest."""
    longest = max(ids.shape[1] for ids, _ in texts)
    if all(mask is None and ids.shape[1] == longest for ids, mask in texts):
        return torch.cat([ids for ids, _ in texts]), None
    ids, mask = zip(*(padded(text, longest) for text in texts), strict=True)
    return torch.cat(ids), torch.cat(mask)


def padded(texts: Texts, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Return ids and mask, padded with masked zeros to a length, by default their own."""
    ids, mask = texts
    mask = torch.ones_like(ids) if mask is None else mask
    missing = 0 if length is None else length - ids.shape[1]
    return F.pad(ids, (0, missing)), F.pad(mask, (0, missing))


def selected(texts: Texts, index: Tensor) -> Texts:
    """Return these rows of the batch."""
    ids, mask = texts
    return ids[index], None if mask is None else mask[index]


def by_length(encode: Callable[[list[str]], Tensor], texts: Sequence[str], *, at_once: int) -> Tensor:
    """Return a row per text by `encode`, which gets texts of like length together, so that they are padded little."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    parts = [order[start : start + at_once] for start in range(0, len(order), at_once)]
    rows = torch.cat([encode([texts[index] for index in part]) for part in parts])
    return rows[upload(torch.tensor(order).argsort(), rows.device)]


def trimmed(texts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Remove the columns in which all texts are padded. Waits for the device."""
    ids, mask = texts
    longest = int(mask.sum(dim=1).max())
    return ids[:, :longest], mask[:, :longest]


def fetch_texts(texts: Texts, index: Tensor, *, max_length: int) -> Texts:
    """Return these rows of all ranks' batches, which may be of different lengths up to `max_length`."""
    if dist.world_size() == 1:
        return selected(texts, index)
    rows = dist.gather_rows(torch.stack(padded(texts, max_length), dim=1), index)
    return trimmed((rows[:, 0], rows[:, 1]))


def match_pairs(
    match: Callable[[Tensor, Tensor | None, CrossAttentionKV], Tensor],
    texts: Texts,
    negatives: tuple[CrossAttentionKV, Texts],
    context: CrossAttentionKV,
) -> Tensor:
    """Return matching logits (3B,2) of B pairs, of each text with its negative image and of each image with its
    negative text, by `match(ids, mask, context)`.

    An image's keys and values serve its own text and the negative one without being copied.
    """
    wrong_image, wrong_text = negatives
    both = torch.arange(2 * len(texts[0]), device=texts[0].device).view(2, -1).t().flatten()  # of each image in turn
    own = match(*selected(stack_texts(texts, wrong_text), both), context).unflatten(0, (-1, 2))
    return torch.cat([own[:, 0], match(*texts, wrong_image), own[:, 1]])


def in_compute_type(x: Tensor) -> Tensor:
    """Cast to the type in which a linear layer computes: under autocast half the bytes to keep or send, with the same
    results.
    """
    device = x.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if is_on else x
