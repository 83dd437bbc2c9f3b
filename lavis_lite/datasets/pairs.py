"""Image-text pairs for pretraining: {image, caption} records, as of the web, Visual Genome or the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lavis_lite.common.records import Record
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import BaseBuilder
from lavis_lite.datasets.caption import CaptionDataset, expand_captions


class PairsDataset(CaptionDataset):
    """Samples {image, text_input, instance_id}."""

    def arrange(self, records: list[Record]) -> list[Record]:
        return expand_captions(records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        return {
            "image": self.image(record["image"]),
            "text_input": self.text_processor(record["caption"]),
            "instance_id": str(index),
        }


@registry.register_builder("pairs")
@dataclass(kw_only=True)
class PairsBuilder(BaseBuilder):
    """Records {image, caption}."""

    train_dataset = PairsDataset
    eval_dataset = PairsDataset
