"""Batches with samples of several datasets: their keys, their image ids, and a check that the samples fit together.

As in LAVIS, a mixed batch has the keys that all datasets have. LAVIS decides so for each batch; here it is decided
once, so that no batch means something else because its samples happen to come from one dataset.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lavis_lite.common.errors import InputError

IDS_PER = {"split": 2**40, "dataset": 2**48}
"""Datasets number their images from 0. The second one's ids begin here, so that no two images have the same."""

Batch = dict[str, Any]


def with_own_image_id(sample: Batch, position: int, *, kind: str = "dataset") -> Batch:
    """Return the sample with an `image_id` that no dataset (or split) at another position gives."""
    image_id = sample.get("image_id") if isinstance(sample, dict) else None
    if position == 0 or not isinstance(image_id, int | torch.Tensor):
        return sample
    return {**sample, "image_id": image_id + position * IDS_PER[kind]}


def missing_keys(batches: Mapping[str, Batch]) -> dict[str, list[str]]:
    """Return, for each key of any dataset's batch, one of each by name, the datasets that lack it."""
    keys = dict.fromkeys(key for batch in batches.values() for key in batch)
    return {key: [name for name, batch in batches.items() if key not in batch] for key in keys}


def check_mixable(batches: Mapping[str, Batch]) -> None:
    """Raise InputError naming two datasets whose batches, one of each by name, cannot be joined."""
    bare = [name for name, batch in batches.items() if "prompt" not in batch]
    if bare and len(bare) < len(batches):
        whole = next(name for name in batches if name not in bare)
        raise InputError(
            f"datasets {whole!r} and {bare[0]!r} cannot share a batch: texts of the first are complete instructions, "
            "those of the second are not; set run.train_dataset_mixing: per_step"
        )
    join_batches(list(batches.items()), keys=[key for key, names in missing_keys(batches).items() if not names])


def join_batches(parts: Sequence[tuple[str, Batch]], *, keys: Sequence[str] | None) -> Batch:
    """Join batches, each with its dataset's name, in order. `keys`: those of the result; None keeps a single part's."""
    if keys is None:
        ((_, batch),) = parts
        return batch
    for name, batch in parts:
        if missing := [key for key in keys if key not in batch]:
            raise InputError(f"a sample of {name} has no {missing[0]!r}, which its first sample has: it has {[*batch]}")
    if "image_mask" in keys:
        parts = _of_equal_length(parts)
    return {key: _joined(key, [(name, batch[key]) for name, batch in parts]) for key in keys}


def _of_equal_length(parts: Sequence[tuple[str, Batch]]) -> list[tuple[str, Batch]]:
    """Return the parts with features `image` (B,N,W) and `image_mask` (B,N) padded to the longest."""
    longest = max(batch["image_mask"].shape[1] for _, batch in parts)
    padded = []
    for name, batch in parts:
        space = longest - batch["image_mask"].shape[1]
        own = {"image": F.pad(batch["image"], (0, 0, 0, space)), "image_mask": F.pad(batch["image_mask"], (0, space))}
        padded.append((name, batch | own))
    return padded


def _joined(key: str, parts: Sequence[tuple[str, Any]]) -> Any:
    (first, example), *others = parts
    for name, value in others:
        if _form(value) != _form(example):
            raise InputError(
                f"datasets {first!r} and {name!r} cannot share a batch: {key!r} is {_form(example)} in the first, "
                f"{_form(value)} in the second; give them the same processors, or set train_dataset_mixing: per_step"
            )
    if torch.is_tensor(example):
        return torch.cat([value for _, value in parts])
    if isinstance(example, list):
        return [item for _, value in parts for item in value]
    return example  # the same for all samples


def _form(value: Any) -> str:
    """Return in words what must be equal for two values to be joined along their first dimension."""
    if torch.is_tensor(value):
        return f"a tensor ({', '.join(['B', *map(str, value.shape[1:])])}) of {str(value.dtype).removeprefix('torch.')}"
    return "a list" if isinstance(value, list) else f"{value!r} for all samples"
