"""Image-text pairs for pretraining: {image, caption} records, as of the web, Visual Genome or the user's own."""

from __future__ import annotations

from dataclasses import dataclass

from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import BaseBuilder
from lavis_lite.datasets.caption import CaptionDataset


class PairsDataset(CaptionDataset):
    """Samples {image, text_input, instance_id}."""


@registry.register_builder("pairs")
@dataclass(kw_only=True)
class PairsBuilder(BaseBuilder):
    """Records {image, caption}."""

    train_dataset = PairsDataset
    eval_dataset = PairsDataset
