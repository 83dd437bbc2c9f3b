"""Classification of an image and a text (SNLI-VE), or of an image alone, into named classes.

SNLI-VE's classes are contradiction 0, neutral 1, entailment 2, the order that LAVIS's checkpoints were trained with.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import ANY_TEXT, ID, NAME, Record, StoredImage
from lavis_lite.common.registry import did_you_mean, registry
from lavis_lite.datasets.base import BaseBuilder, BaseDataset
from lavis_lite.datasets.folders import class_names, metadata_file
from lavis_lite.datasets.parts import WHOLE
from lavis_lite.datasets.storage import named_splits
from lavis_lite.datasets.tables import Table, TableRecords, is_table

MAX_DIGITS = 9
"""Digits of a label that fits an index."""

CLASSIFICATION_FIELDS = {"image": NAME, "sentence": ANY_TEXT, "text": ANY_TEXT, "label": ID, "instance_id": ID}


class ClassificationDataset(BaseDataset):
    """Samples {image, text_input, label (position in `classes`), instance_id}.

    An image name without a suffix gets `.jpg` (SNLI-VE's are Flickr ids). Without `classes`, labels are integers.
    """

    required = ("image", "label")
    fields = CLASSIFICATION_FIELDS
    reads_tables = True

    def __init__(self, *files: Any, classes: Sequence[str] = (), **options: Any) -> None:
        self.classes = list(classes)
        super().__init__(*files, **options)

    def arrange(self, records: list[Record]) -> list[Record]:
        self.labels: Sequence[int] = [self.label(record, self.place, index) for index, record in enumerate(records)]
        return records

    def arrange_table(self, samples: TableRecords) -> TableRecords:
        self.labels = array("i", (self.label(record, samples.place, i) for i, record in enumerate(samples)))
        return samples

    def label(self, record: Record, place: Callable[[int], str], index: int) -> int:
        """Return the class index of a record. Raises InputError for a label that is not one of the classes."""
        label = str(record["label"])
        if label in self.classes:
            return self.classes.index(label)
        if not self.classes and label.isascii() and label.isdigit() and len(label) <= MAX_DIGITS:
            return int(label)
        known = did_you_mean(label, self.classes) if self.classes else "Without `classes: [...]` they are integers"
        raise InputError(f"{place(index)} has label {label!r}, which is not a class. {known}")

    def files_of(self, record: Record) -> list[str]:
        if isinstance(record["image"], StoredImage):
            return []
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

    def dataset_options(self, split: str) -> dict[str, Any]:
        return {} if self.classes else {"classes": self.stored_classes(split)}

    def stored_classes(self, split: str) -> list[str]:
        """Return the names of the classes that the files have: those of a table's labels, in the order of `train`, or
        the sub-folders of all splits, sorted; none of other files.
        """
        if own := self.table_classes(split):
            first = self.table_classes(WHOLE) if WHOLE in named_splits(self.build_info) else []
            return list(dict.fromkeys([*first, *own]))
        every = {path for one in self.splits() for path in self.annotation_paths(one) if path.is_dir()}
        folders = [path for path in every if not is_table(path) and metadata_file(path) is None]
        return sorted({name for folder in folders for name in class_names(folder)})

    def table_classes(self, split: str) -> list[str]:
        """Return the names of the classes that a split's tables have; none of other files."""
        paths = self.annotation_paths(split)
        if not all(map(is_table, paths)):
            return []
        return Table(paths, split=split, columns=self.columns, root=Path()).classes.get("label", [])
