"""Classification of an image and a text (SNLI-VE), or of an image alone, into named classes.

SNLI-VE's classes are contradiction 0, neutral 1, entailment 2, the order that LAVIS's checkpoints were trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import ANY_TEXT, ID, NAME, Record
from lavis_lite.common.registry import did_you_mean, registry
from lavis_lite.datasets.base import BaseBuilder, BaseDataset

MAX_DIGITS = 9
"""Digits of a label that fits an index."""

CLASSIFICATION_FIELDS = {"image": NAME, "sentence": ANY_TEXT, "text": ANY_TEXT, "label": ID, "instance_id": ID}


class ClassificationDataset(BaseDataset):
    """Samples {image, text_input, label (position in `classes`), instance_id}.

    An image name without a suffix gets `.jpg` (SNLI-VE's are Flickr ids). Without `classes`, labels are integers.
    """

    required = ("image", "label")
    fields = CLASSIFICATION_FIELDS

    def __init__(self, *files: Any, classes: Sequence[str] = (), **options: Any) -> None:
        self.classes = list(classes)
        super().__init__(*files, **options)

    def arrange(self, records: list[Record]) -> list[Record]:
        self.labels = [self.label(record, index) for index, record in enumerate(records)]
        return records

    def label(self, record: Record, index: int) -> int:
        """Return the class index of a record. Raises InputError for a label that is not one of the classes."""
        label = str(record["label"])
        if label in self.classes:
            return self.classes.index(label)
        if not self.classes and label.isascii() and label.isdigit() and len(label) <= MAX_DIGITS:
            return int(label)
        known = did_you_mean(label, self.classes) if self.classes else "Without `classes: [...]` they are integers"
        raise InputError(f"{self.place(index)} has label {label!r}, which is not a class. {known}")

    def files_of(self, record: Record) -> list[str]:
        file = str(record["image"])
        return [file if PurePath(file).suffix else f"{file}.jpg"]

    def entries(self, record: Record, index: int) -> dict[str, Any]:
        text = next((record[name] for name in ("sentence", "text") if record.get(name) is not None), "")
        return {"text_input": self.text_processor(text), "label": self.labels[index]}


@registry.register_builder("classification")
@dataclass(kw_only=True)
class ClassificationBuilder(BaseBuilder):
    """Records {image, sentence (or text), label}; `classes` names the labels in order."""

    classes: list[str] = field(default_factory=list)

    train_dataset = ClassificationDataset
    eval_dataset = ClassificationDataset
