"""Examples before the instruction of an evaluation sample (few-shot prompting), and several images in one prompt."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError, SettingError
from lavis_lite.common.records import Record, StoredImage

MAX_EXAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """The examples of every sample: `num` records of a split, drawn by `seed` and the sample's index.

    `template` makes a text of an example's `{instruction}` and `{answer}`.
    """

    pool: Sequence[Record]
    num: int
    seed: int
    template: str
    has_images: bool

    def draw(self, index: int, files: Sequence[str]) -> list[Record]:
        """Return the examples of a sample, none of which shows one of its `files`."""
        order = random.Random(f"{self.seed}:{index}")
        found: list[Record] = []
        drawn: set[int] = set()  # not a permutation of the pool, which may hold a million records
        while len(found) < self.num and len(drawn) < len(self.pool):
            number = order.randrange(len(self.pool))
            if number not in drawn and not set(files) & set(files_of(self.pool[number])):
                found.append(self.pool[number])
            drawn.add(number)
        if len(found) == self.num:
            return found
        raise InputError(f"few_shot_num: {self.num} examples of other images are not there, only {len(found)}")

    @classmethod
    def of(cls, records: Sequence[Record], *, split: str, num: int, template: str, **settings: Any) -> FewShot:
        """Return the examples from a split's records with an answer; `settings` are the other fields.

        Raises SettingError if there are too few, or for a template without placeholder.
        """
        check_number("few_shot_num", num, 1, MAX_EXAMPLES)
        if "{instruction}" not in template or "{answer}" not in template:
            raise SettingError("few_shot_template", f"must have {{instruction}} and {{answer}}, got {template!r}")
        pool = [record for record in records if record["answers"]]
        if len(pool) < num:
            problem = f"{num} examples are wanted, and the split {split!r} has {len(pool)} records with an answer"
            raise SettingError("few_shot_num", problem)
        return cls(pool=pool, num=num, template=template, **settings)


def files_of(record: Mapping[str, object]) -> list[str]:
    """Return the files of a record's images or video; of an image inside a table the digest of its content."""
    value = record.get("image") if record.get("video") is None else record["video"]
    if isinstance(value, StoredImage):
        return [value.digest().hex()]
    return [str(file) for file in value] if isinstance(value, list) else [str(value)]


def joined(visuals: Sequence[Tensor], where: str) -> Tensor:
    """Return images (3,H,W) and videos (3,F,H,W) as one video (3,F,H,W), in their order; features (N,W) as one (N,W).

    Raises InputError, which names a dataset or record `where`, for anything else.
    """
    if not all(isinstance(visual, Tensor) and visual.dim() == visuals[0].dim() for visual in visuals):
        raise InputError(f"{where}: several images of a prompt must all be tensors of one kind: name a vis_processor")
    if visuals[0].dim() == 2:
        return torch.cat(list(visuals))
    return torch.cat([visual if visual.dim() == 4 else visual[:, None] for visual in visuals], dim=1)
