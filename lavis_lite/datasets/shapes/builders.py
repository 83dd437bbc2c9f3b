"""Builders of the generated dataset `shapes`: built at first use below the data root, one folder a config.

All five read the same folder when they're configured alike. Images must not be flipped or cropped in training: that
would change what is left and right, and what is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from lavis_lite.common import dist
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import download
from lavis_lite.datasets.annotations import read_json
from lavis_lite.datasets.base import BaseBuilder
from lavis_lite.datasets.caption import CaptionEvalDataset, CaptionTrainDataset
from lavis_lite.datasets.nlvr import NLVREvalDataset, NLVRTrainDataset
from lavis_lite.datasets.pairs import PairsDataset
from lavis_lite.datasets.retrieval import RetrievalEvalDataset, RetrievalTrainDataset
from lavis_lite.datasets.shapes.build import ensure_built, official_paths, questions_name
from lavis_lite.datasets.shapes.scene import SPLITS, ShapesConfig
from lavis_lite.datasets.shapes.truth import true_rate
from lavis_lite.datasets.vqa import VQAEvalDataset, VQATrainDataset


@dataclass(kw_only=True)
class ShapesBuilder(ShapesConfig, BaseBuilder):
    """A `shapes` dataset; see ShapesConfig for the fields. It takes no build_info."""

    file: ClassVar[str]

    def __post_init__(self) -> None:
        self.check()
        if self.build_info:
            raise InputError(
                "shapes is generated and takes no build_info; use the builders caption, vqa ... for other files"
            )

    def splits(self) -> list[str]:
        return list(SPLITS)

    def prepare(self, splits: Iterable[str] | None = None) -> None:
        """Generate the folder of this config if it isn't there: seconds."""
        with dist.main_first():
            self.folder()

    def folder(self) -> Path:
        """The dataset's folder, built if need be."""
        config = ShapesConfig(**{f.name: getattr(self, f.name) for f in fields(ShapesConfig)})
        return ensure_built(config, download.data_root() / "shapes")

    def annotation_paths(self, split: str) -> list[Path]:
        return [self.folder() / "annotations" / f"{self.file}_{split}.json"]

    def image_root(self) -> Path:
        return self.folder() / "images"


class ShapesCaptionEvalDataset(CaptionEvalDataset):
    """Caption evaluation that also knows the truth."""

    def __init__(
        self, annotation_paths: Sequence[str | Path], vis_root: str | Path, *, scenes_path: Path, **options: Any
    ) -> None:
        super().__init__(annotation_paths, vis_root, **options)
        self.scenes: dict[str, dict[str, Any]] = read_json(scenes_path)

    def extra_metrics(self, captions: Mapping[Any, str]) -> dict[str, float]:
        """`true_rate`: percent of the captions, by image id, that are true of their scene."""
        return {"true_rate": true_rate(captions, self.scenes)}


@registry.register_builder("shapes_caption")
@dataclass(kw_only=True)
class ShapesCaptionBuilder(ShapesBuilder):
    """Captions in COCO's form."""

    file = "caption"
    train_dataset = CaptionTrainDataset
    eval_dataset = ShapesCaptionEvalDataset

    def dataset_options(self, split: str) -> dict[str, Any]:
        return {} if split == "train" else {"scenes_path": self.folder() / f"scenes_{split}.json"}


@registry.register_builder("shapes_retrieval")
@dataclass(kw_only=True)
class ShapesRetrievalBuilder(ShapesBuilder):
    """Full descriptions; the evaluation splits hold `gallery_size` images."""

    file = "retrieval"
    train_dataset = RetrievalTrainDataset
    eval_dataset = RetrievalEvalDataset


@registry.register_builder("shapes_vqa")
@dataclass(kw_only=True)
class ShapesVQABuilder(ShapesBuilder):
    """Questions in VQAv2's form."""

    file = "vqa"
    train_dataset = VQATrainDataset
    eval_dataset = VQAEvalDataset

    def annotation_paths(self, split: str) -> list[Path]:
        names = [questions_name(split), *(() if split == "train" else official_paths(split))]
        return [self.folder() / "annotations" / name for name in [*names, "answer_list.json"]]


@registry.register_builder("shapes_nlvr")
@dataclass(kw_only=True)
class ShapesNLVRBuilder(ShapesBuilder):
    """Two images and a statement in NLVR2's form."""

    file = "nlvr"
    train_dataset = NLVRTrainDataset
    eval_dataset = NLVREvalDataset


@registry.register_builder("shapes_pairs")
@dataclass(kw_only=True)
class ShapesPairsBuilder(ShapesBuilder):
    """Web-style pairs; the records keep `is_noisy`."""

    file = "pairs"
    train_dataset = PairsDataset
    eval_dataset = PairsDataset
