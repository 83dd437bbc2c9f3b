"""Captioning: one caption a sample in training; one image a sample, with its references, in evaluation.

Evaluation ids come from the annotation (`image_id`, `img_id`), else from the file name as for COCO
(`COCO_val2014_000000391895.jpg` -> 391895), else they are the image paths; so any user's files can be scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from lavis_lite.datasets.annotations import Record, as_list, as_records, read_json, read_records, require_fields
from lavis_lite.datasets.base import BaseBuilder, BaseDataset
from lavis_lite.errors import InputError
from lavis_lite.registry import registry


class CaptionTrainDataset(BaseDataset):
    """Samples {image, text_input, image_id (index in first-seen order), instance_id}."""

    required = ("image|file_name", "caption")
    long_keys = ("image_id",)

    def load(self) -> list[Record]:
        return load_captions(self.annotation_paths, self.required)

    def arrange(self, records: list[Record]) -> list[Record]:
        expanded = expand_captions(records)
        ids = {key: index for index, key in enumerate(dict.fromkeys(image_key(record) for record in expanded))}
        self.num_images = len(ids)
        self.image_index = [ids[image_key(record)] for record in expanded]
        return expanded

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        return {
            "image": self.image(record["image"]),
            "text_input": self.text_processor(record["caption"]),
            "image_id": self.image_index[index],
            "instance_id": str(index),
        }


class CaptionEvalDataset(BaseDataset):
    """Samples {image, image_id, instance_id}, one an image; `references()` has the captions."""

    required = ("image|file_name",)

    def load(self) -> list[Record]:
        return load_captions(self.annotation_paths, self.required)

    def arrange(self, records: list[Record]) -> list[Record]:
        return merge_images(records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        return {
            "image": self.image(record["image"]),
            "image_id": record["image_id"],
            "instance_id": str(index),
        }

    def references(self) -> dict[Any, list[str]]:
        """The captions of each image id; images without any (nocaps) are left out."""
        return {record["image_id"]: record["caption"] for record in self.annotation if record["caption"]}


def load_captions(paths: list[Any], required: tuple[str, ...]) -> list[Record]:
    """Caption records of LAVIS's or the user's files, or of a COCO file (`images` + `annotations`)."""
    records: list[Record] = []
    for path in paths:
        content = read_json(path) if PurePath(path).suffix.lower() == ".json" else read_records(path)
        if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
            part = records_of_coco(content, path)
        else:
            part = as_records(content, path)
        require_fields(part, required, path)
        records += [record if "image" in record else {"image": record["file_name"], **record} for record in part]
    return records


def records_of_coco(content: dict[str, Any], path: Any) -> list[Record]:
    """A COCO caption file's images, each with the list of its captions."""
    require_fields(content["images"], ("id", "file_name"), f"{path} (images)")
    require_fields(content["annotations"], ("image_id", "caption"), f"{path} (annotations)")
    captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
    for number, annotation in enumerate(content["annotations"]):
        if annotation["image_id"] not in captions:
            raise InputError(
                f"{path} (annotations): record {number} has image_id {annotation['image_id']}, not in images"
            )
        captions[annotation["image_id"]].append(annotation["caption"])
    return [
        {**image, "image": image["file_name"], "image_id": image["id"], "caption": captions[image["id"]]}
        for image in content["images"]
    ]


def expand_captions(records: list[Record]) -> list[Record]:
    """One record a caption, where a record may hold a list of them."""
    return [
        {**r, "caption": caption} if isinstance(r["caption"], list) else r
        for r in records
        for caption in as_list(r["caption"])
    ]


def image_key(record: Record) -> Any:
    """What makes two records the same image."""
    return record.get("image_id", record["image"])


def merge_images(records: list[Record]) -> list[Record]:
    """One record an image, in first-seen order, with `image_id` and the list `caption` (maybe empty)."""
    merged: dict[Any, Record] = {}
    for record, image_id in zip(records, evaluation_ids(records), strict=True):
        captions = as_list(record["caption"]) if record.get("caption") is not None else []
        if image_id in merged:
            merged[image_id]["caption"] += captions
        else:
            merged[image_id] = {**record, "image_id": image_id, "caption": list(captions)}
    return list(merged.values())


def evaluation_ids(records: list[Record]) -> list[Any]:
    """Each record's image id; never the same for two image files."""
    for key in ("image_id", "img_id"):
        if records and all(record.get(key) is not None for record in records):
            return [record[key] for record in records]
    paths = [record["image"] for record in records]
    numbers = [PurePath(path).stem.split("_")[-1] for path in paths]
    if all(n.isascii() and n.isdigit() for n in numbers) and len({int(n) for n in numbers}) == len(set(paths)):
        return [int(n) for n in numbers]
    return paths


@registry.register_builder("coco_caption")
@registry.register_builder("nocaps")
@registry.register_builder("flickr30k_caption")
@registry.register_builder("caption")
@dataclass(kw_only=True)
class CaptionBuilder(BaseBuilder):
    """Records {image, caption[, image_id]}; `caption` may be a list. COCO's own caption files work too."""

    train_dataset = CaptionTrainDataset
    eval_dataset = CaptionEvalDataset
