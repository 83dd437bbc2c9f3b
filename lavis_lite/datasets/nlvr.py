"""NLVR2: is a statement about two images true?

In training a pair is swapped half of the time, and the words left and right with it (whole words only: LAVIS's
substring replacement also hits "bright" and "leftmost"). Evaluation never swaps, so it is repeatable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import ID, PATH, PATHS, TEXT, Record, StoredImage, missing_field, shown
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import BaseBuilder, BaseDataset

NLVR_FIELDS = {"images": PATHS, "image0": PATH, "image1": PATH, "sentence": TEXT, "instance_id": ID}
_LABELS = {"true": 1, "false": 0, "1": 1, "0": 0}
_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)


class NLVREvalDataset(BaseDataset):
    """Samples {image0, image1, text_input, label (1: true), instance_id}.

    A record has the list `images`, or `image0` and `image1`, as members of a shard and columns of a table are.
    """

    required = ("images|image0", "sentence", "label")
    fields = NLVR_FIELDS

    def arrange(self, records: list[Record]) -> list[Record]:
        for index, record in enumerate(records):
            if record.get("images") is None:
                if record.get("image1") is None:
                    raise InputError(f"{self.place(index)}{missing_field(record, ['image1'])}")
                record["images"] = [record["image0"], record["image1"]]
            images, label = record["images"], record["label"]
            if not isinstance(images, list) or len(images) != 2:
                raise InputError(f"{self.place(index)}: `images` must be a list of two paths, found {shown(images)}")
            if str(label).lower() not in _LABELS:
                raise InputError(f"{self.place(index)}: label {label!r} is neither 'True' nor 'False'")
        return records

    def files_of(self, record: Record) -> list[str]:
        return [image for image in record["images"] if isinstance(image, str)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        return self.sample(index, record["images"], record["sentence"])

    def sample(self, index: int, images: list[str | StoredImage], sentence: str) -> dict[str, Any]:
        """Return the sample of two images, paths or stored, and a raw sentence."""
        return {
            "image0": self.image(images[0]),
            "image1": self.image(images[1]),
            "text_input": self.text_processor(sentence),
            "label": _LABELS[str(self.annotation[index]["label"]).lower()],
            "instance_id": str(index),
        }


class NLVRTrainDataset(NLVREvalDataset):
    """Training samples: those of NLVREvalDataset, with images and sides swapped at random."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        if torch.rand(()) < 0.5:
            return self.sample(index, record["images"][::-1], swap_sides(record["sentence"]))
        return self.sample(index, record["images"], record["sentence"])


def swap_sides(sentence: str) -> str:
    """Return the sentence with the words left and right exchanged; capitals are kept."""

    def other(match: re.Match[str]) -> str:
        word = "right" if match[0].lower() == "left" else "left"
        if match[0].isupper():
            return word.upper()
        return word.capitalize() if match[0][0].isupper() else word

    return _SIDE.sub(other, sentence)


@registry.register_builder("nlvr")
@dataclass(kw_only=True)
class NLVRBuilder(BaseBuilder):
    """Records {images: [first, second], sentence, label: "True" or "False"}, or image0 and image1 for images."""

    train_dataset = NLVRTrainDataset
    eval_dataset = NLVREvalDataset
