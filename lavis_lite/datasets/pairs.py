"""Image-text pairs for pretraining: {image, caption} records, as of the web, CapFilt or the user's own."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lavis_lite.common.bounds import one_of
from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record, shown
from lavis_lite.common.registry import registry
from lavis_lite.datasets.annotations import as_list
from lavis_lite.datasets.base import BaseBuilder
from lavis_lite.datasets.caption import CaptionDataset, image_key

CaptionsPerSample = Literal["all", "draw"]


class PairsDataset(CaptionDataset):
    """Samples {image, text_input, instance_id}: one per caption, or with `captions_per_sample: draw` one per image.

    `draw` joins the captions of an image and draws one each time the sample is read; outside the split `train`, where
    nothing may be random, it takes the first.
    """

    def __init__(
        self,
        *arguments: Any,
        captions_per_sample: CaptionsPerSample = "all",
        where: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        one_of("captions_per_sample", captions_per_sample, get_args(CaptionsPerSample))
        self.captions_per_sample, self.where = captions_per_sample, dict(where or {})
        self.reads_tables = captions_per_sample == "all" and not self.where  # else all records are needed
        super().__init__(*arguments, **options)

    def arrange(self, records: list[Record]) -> list[Record]:
        records = self.chosen(records) if self.where else records
        return joined(records) if self.captions_per_sample == "draw" else super().arrange(records)

    def chosen(self, records: list[Record]) -> list[Record]:
        """Return the records whose fields have the values of `where`. InputError if no record has them."""
        names = ", ".join(map(str, self.annotation_paths))
        for name, value in self.where.items():
            if not any(name in record for record in records):
                raise InputError(f"{names}: where.{name}: no record has this field; the first has {[*records[0]]}")
            kept = [number for number, record in enumerate(records) if record.get(name) in as_list(value)]
            if not kept:
                raise InputError(f"{names}: where.{name}: no record has the value {shown(value)}")
            records, self.places = [records[number] for number in kept], [self.places[number] for number in kept]
        return records

    def entries(self, record: Record, index: int) -> dict[str, Any]:
        captions = as_list(record["caption"])
        return {"text_input": self.text_processor(random.choice(captions) if self.split == "train" else captions[0])}


def joined(records: list[Record]) -> list[Record]:
    """Return one record per image, in first-seen order, with the list of its captions."""
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(image_key(record), {**record, "caption": []})["caption"] += as_list(record["caption"])
    return list(found.values())


@registry.register_builder("pairs")
@dataclass(kw_only=True)
class PairsBuilder(BaseBuilder):
    """Records {image, caption}."""

    captions_per_sample: CaptionsPerSample = "all"
    """`all`: each caption of an image is a sample. `draw`: each image is one, with a caption drawn at each step."""
    where: dict[str, Any] = field(default_factory=dict)
    """Only the records with these values of their fields, or one of a list: `{kept: true, source: [web]}`."""

    train_dataset = PairsDataset
    eval_dataset = PairsDataset

    def __post_init__(self) -> None:
        if self.stream is not None and (self.where or self.captions_per_sample == "draw"):
            setting = "where" if self.where else "captions_per_sample: draw"
            raise InputError(f"pairs: {setting} needs all records, and a stream has none: leave out one of them")
