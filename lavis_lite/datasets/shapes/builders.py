"""Builders of the generated dataset `shapes`: built at first use below the data root, one folder per config.

All datasets with the same settings read the same folder. Images must not be flipped or cropped in training: that would
change what is left and right, and what is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import download
from lavis_lite.datasets.annotations import read_json
from lavis_lite.datasets.base import BaseBuilder, BaseDataset
from lavis_lite.datasets.caption import CaptionEvalDataset, CaptionTrainDataset
from lavis_lite.datasets.instruct import InstructBuilder
from lavis_lite.datasets.nlvr import NLVREvalDataset, NLVRTrainDataset
from lavis_lite.datasets.pairs import PairsDataset
from lavis_lite.datasets.readers import Reader, find_reader
from lavis_lite.datasets.retrieval import RetrievalEvalDataset, RetrievalTrainDataset
from lavis_lite.datasets.shapes.build import ensure_built, official_paths, questions_name
from lavis_lite.datasets.shapes.instructions import ensure_instructions
from lavis_lite.datasets.shapes.scene import SPLITS, ShapesConfig
from lavis_lite.datasets.shapes.truth import true_rate
from lavis_lite.datasets.vqa import VQAEvalDataset, VQATrainDataset


@dataclass(kw_only=True)
class GeneratedBuilder(ShapesConfig, BaseBuilder):
    """A dataset whose files are generated; see ShapesConfig for the fields. It takes no build_info."""

    def __post_init__(self) -> None:
        self.check()
        if self.build_info:
            raise InputError(
                "shapes is generated and takes no build_info; use the builders caption, vqa ... for other files"
            )

    def splits(self) -> list[str]:
        return list(SPLITS)

    def folder(self) -> Path:
        """Return the folder of these settings, generated if need be: seconds."""
        return ensure_built(self, download.data_root() / "shapes")

    def image_root(self) -> Path:
        return self.folder() / "images"


class ShapesCaptionEvalDataset(CaptionEvalDataset):
    """Caption evaluation that also knows the true scenes."""

    def __init__(
        self, annotation_paths: Sequence[str | Path], vis_root: str | Path, *, scenes_path: Path, **options: Any
    ) -> None:
        super().__init__(annotation_paths, vis_root, **options)
        self.scenes: dict[str, dict[str, Any]] = read_json(scenes_path)

    def extra_metrics(self, captions: Mapping[Any, str]) -> dict[str, float]:
        """Return `true_rate`: percent of the captions, by image id, that are true of their scene."""
        return {"true_rate": true_rate(captions, self.scenes)}

    def judge(self, image_id: Any, caption: str) -> dict[str, float]:
        """Return `accuracy`: 100 if the caption is true of its scene, else 0."""
        return {"accuracy": true_rate({image_id: caption}, self.scenes)}


DATASETS: dict[str, tuple[type[BaseDataset], type[BaseDataset]]] = {
    "caption": (CaptionTrainDataset, ShapesCaptionEvalDataset),
    "retrieval": (RetrievalTrainDataset, RetrievalEvalDataset),
    "vqa": (VQATrainDataset, VQAEvalDataset),
    "nlvr": (NLVRTrainDataset, NLVREvalDataset),
    "pairs": (PairsDataset, PairsDataset),
}
"""The classes for training and evaluation, by kind."""


@registry.register_builder("shapes")
@dataclass(kw_only=True)
class ShapesBuilder(GeneratedBuilder):
    """The scenes with the annotations of one benchmark: COCO captions, full descriptions for retrieval, VQAv2
    questions, NLVR2 statements, web-style pairs (the records keep `is_noisy`).
    """

    kind: Literal["caption", "retrieval", "vqa", "nlvr", "pairs"] = "caption"

    def dataset_class(self, split: str) -> type[BaseDataset]:
        train, evaluation = DATASETS[self.kind]
        return train if split == "train" else evaluation

    def annotation_paths(self, split: str) -> list[Path]:
        names = [f"{self.kind}_{split}.json"]
        if self.kind == "vqa":
            official = () if split == "train" else official_paths(split)
            names = [questions_name(split), *official, "answer_list.json"]
        return [self.folder() / "annotations" / name for name in names]

    def dataset_options(self, split: str) -> dict[str, Any]:
        if self.kind != "caption" or split == "train":
            return {}
        return {"scenes_path": self.folder() / f"scenes_{split}.json"}


@registry.register_builder("shapes_instruct")
@dataclass(kw_only=True)
class ShapesInstructBuilder(GeneratedBuilder, InstructBuilder):
    """The scenes with the instructions of one task group, for mixtures and for groups that are held out."""

    instructions: str | dict[str, Any] = "shapes_question"
    group: Literal["caption", "color", "count", "relation", "yesno", "options", "statement", "dialogue"] = "color"

    def make_reader(self) -> Reader:
        return super().make_reader() or find_reader("records")

    def annotation_paths(self, split: str) -> list[Path]:
        if self.group == "caption":
            return [self.folder() / "annotations" / f"caption_{split}.json"]
        return [ensure_instructions(self, self.folder(), self.group, split)]
