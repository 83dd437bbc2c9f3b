"""LAVIS's base classes of datasets and builders, for classes that are written after its tutorials, and `load_dataset`.

They are thin: a builder here hands the four arguments of LAVIS's datasets to the class in `train_dataset_cls` or
`eval_dataset_cls`. New datasets are shorter with `BaseDataset` and `BaseBuilder` of `datasets/base.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import default_collate

from lavis_lite.common.config.files import load_with_bases, resolve
from lavis_lite.common.config.zoo import packaged_dataset
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.datasets import base
from lavis_lite.datasets.processing import identity, make_processor
from lavis_lite.datasets.storage import VISUAL_FOLDERS
from lavis_lite.datasets.streams import StreamDataset


class BaseDataset(base.BaseDataset):
    """A dataset with LAVIS's constructor: `annotation` holds the records of all files, each with an `instance_id`.

    Subclasses define `__getitem__`, and `collater` if torch's `default_collate` does not do. An evaluation split's
    samples have the `instance_id` of their records.
    """

    def __init__(
        self,
        vis_processor: Callable[[Any], Any] | None = None,
        text_processor: Callable[[Any], Any] | None = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
    ) -> None:
        root = vis_root or ""
        if ann_paths:
            super().__init__(ann_paths, root, split="eval")
        else:
            self.annotation, self.annotation_paths, self.vis_root, self.split = [], [], Path(root), "eval"
        self.set_processors(vis_processor or identity, text_processor or identity)

    def set_processors(self, vis_processor: Callable[[Any], Any], text_processor: Callable[[Any], Any]) -> None:
        """Replace both processors."""
        self.vis_processor, self.text_processor = vis_processor, text_processor

    def _add_instance_ids(self, key: str = "instance_id") -> None:
        for index, record in enumerate(self.annotation):
            record[key] = str(index)

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch as torch's loaders make it: tensors stacked, numbers as tensors, texts as lists."""
        batch: dict[str, Any] = default_collate(samples)
        return batch


class BaseDatasetBuilder(base.BaseBuilder):
    """A builder with LAVIS's class attributes; `DATASET_CONFIG_DICT` names the YAML of each type."""

    train_dataset_cls: ClassVar[Any] = None
    eval_dataset_cls: ClassVar[Any] = None
    DATASET_CONFIG_DICT: ClassVar[Mapping[str, str]] = {}

    def dataset_class(self, split: str) -> Any:
        """Return the class of the split's dataset."""
        name = "train_dataset_cls" if split == "train" else "eval_dataset_cls"
        chosen = self.train_dataset_cls if split == "train" else self.eval_dataset_cls
        if chosen is None:
            raise InputError(f"{type(self).__name__}: has no {name}, which the split {split!r} needs: set it")
        return chosen

    def build_datasets(self) -> dict[str, base.BaseDataset | StreamDataset]:
        """Return the datasets of all splits."""
        return self.build()

    def _build_split(self, split: str) -> base.BaseDataset:
        dataset: base.BaseDataset = self.dataset_class(split)(
            vis_processor=make_processor(self.vis_processor, split),
            text_processor=make_processor(self.text_processor, split),
            vis_root=str(self.image_root()),
            ann_paths=[str(path) for path in self.annotation_paths(split)],
        )
        dataset.split = split
        return dataset


def load_dataset(
    name: str, cfg_path: str | Path | None = None, vis_path: str | None = None, data_type: str | None = None
) -> dict[str, base.BaseDataset]:
    """Return the datasets of a packaged YAML, or of the first dataset in `cfg_path`, by split, as in LAVIS.

    `vis_path` is the folder of the images or videos; `data_type` ("images" or "videos") says which, if not the YAML.
    Raises KeyError for an unknown name, InputError for another `data_type`.
    """
    if cfg_path is None:
        section = packaged_dataset(name)
    else:
        section = next(iter(resolve(load_with_bases(Path(cfg_path)))["datasets"].values()))
    section = {key: value for key, value in section.items() if key not in ("type", "builder", "dataset_card")}
    if vis_path is not None:
        info = dict(section.get("build_info") or {})
        kind = data_type or next((kind for kind in VISUAL_FOLDERS if info.get(kind)), "images")
        if kind not in VISUAL_FOLDERS:
            raise InputError(f"data_type: must be one of {', '.join(VISUAL_FOLDERS)}, got {kind!r}")
        folder = {"storage": str(Path(vis_path).expanduser().absolute())}
        others = {key: value for key, value in info.items() if key not in VISUAL_FOLDERS}
        section["build_info"] = others | {kind: {**(info.get(kind) or {}), **folder}}
    return registry.get_builder_class(name)(**section).build()
