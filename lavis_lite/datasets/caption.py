"""Captioning: one caption per sample in training; one image per sample, with its references, in evaluation.

Evaluation ids come from the annotation (`image_id`, `img_id`), else from the file name as for COCO
(`COCO_val2014_000000391895.jpg` -> 391895), else they are the image paths; so any files can be scored.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record, StoredImage
from lavis_lite.common.registry import registry
from lavis_lite.datasets.annotations import as_list
from lavis_lite.datasets.base import BaseBuilder, BaseDataset
from lavis_lite.datasets.copies import first_different, picture_of, shards_key, visual_path
from lavis_lite.datasets.readers.captions import CAPTION_FIELDS
from lavis_lite.datasets.stream_shards import LoadedFile
from lavis_lite.datasets.table_samples import image_numbers
from lavis_lite.datasets.tables import TableRecords

MAX_ID_DIGITS = 19
"""More digits at the end of a file name are not taken as an id: they do not fit a 64-bit integer."""


class CaptionDataset(BaseDataset):
    """Samples {image, text_input, instance_id}, one per caption: the base of the caption layouts."""

    required: tuple[str, ...] = ("image|file_name", "caption")
    fields = CAPTION_FIELDS
    reader = "captions"
    reads_tables = True
    item_field = "caption"

    def arrange(self, records: list[Record]) -> list[Record]:
        return expand_captions(records)

    def entries(self, record: Record, index: int) -> dict[str, Any]:
        return {"text_input": self.text_processor(record["caption"])}


class CaptionTrainDataset(CaptionDataset):
    """Samples {image, text_input, image_id (index in first-seen order), instance_id}."""

    long_keys = ("image_id",)

    def arrange(self, records: list[Record]) -> list[Record]:
        check_images(records, map(image_key, records), self.place, root=self.vis_root)
        expanded = expand_captions(records)
        ids = {key: index for index, key in enumerate(dict.fromkeys(map(image_key, expanded)))}
        self.num_images = len(ids)
        self.image_index: Sequence[int] = [ids[image_key(record)] for record in expanded]
        return expanded

    def arrange_table(self, samples: TableRecords) -> TableRecords:
        self.image_index = array("i", image_numbers(samples).tobytes())
        self.num_images = max(self.image_index) + 1
        return samples

    def entries(self, record: Record, index: int) -> dict[str, Any]:
        return super().entries(record, index) | {"image_id": self.image_index[index]}


class CaptionEvalDataset(CaptionDataset):
    """Samples {image, image_id, instance_id}, one per image; `references()` has the captions."""

    reads_tables = False
    required = ("image|file_name",)

    def arrange(self, records: list[Record]) -> list[Record]:
        return merge_images(records, self.place, root=self.vis_root)

    def entries(self, record: Record, index: int) -> dict[str, Any]:
        return {"image_id": record["image_id"]}

    def references(self) -> dict[Any, list[str]]:
        """Return the captions of each image id; images without any (nocaps) are left out."""
        return references_of(self.annotation)


def references_of(annotation: Iterable[Record]) -> dict[Any, list[str]]:
    """Return the captions of each image id; images without any are left out."""
    return {record["image_id"]: record["caption"] for record in annotation if record["caption"]}


def expand_captions(records: list[Record]) -> list[Record]:
    """Return one record per caption, where a record may hold a list of them."""
    return [
        {**r, "caption": caption} if isinstance(r["caption"], list) else r
        for r in records
        for caption in as_list(r["caption"])
    ]


def image_key(record: Record) -> str:
    """Return what identifies a record's image: ids are compared as texts, as result files and scores have them."""
    return str(visual_path(record) if record.get("image_id") is None else record["image_id"])


def check_images(
    records: Sequence[Record], ids: Iterable[Any], place: Callable[[int], str], *, root: Path = Path()
) -> None:
    """Raise InputError, with both records and paths, if two different images have the same id.

    In shards and tables an image may be there once per caption, so contents are compared there; not of streams, whose
    ids need to be unique within a block only.
    """
    first: dict[str, tuple[int, Any]] = {}
    stored: list[tuple[int, int, Any]] = []
    for number, (record, image_id) in enumerate(zip(records, ids, strict=True)):
        file = visual_path(record)
        other, its_file = first.setdefault(str(image_id), (number, file))
        if file is its_file or file == its_file or isinstance(file, LoadedFile):
            continue
        one, two = picture_of(its_file, root), picture_of(file, root)
        if isinstance(one, StoredImage) and isinstance(two, StoredImage):
            stored.append((other, number, image_id))
        elif one != two:
            raise two_pictures(records, (other, number, image_id), place)
    if not stored:
        return
    files = [[picture_of(visual_path(records[number]), root) for number in found[:2]] for found in stored]
    pairs = [(one, two) for one, two in files]
    different = first_different(pairs, len(pairs), name=place(0), key=shards_key(pairs))
    if different is not None:
        raise two_pictures(records, stored[different], place)


def two_pictures(records: Sequence[Record], found: tuple[int, int, Any], place: Callable[[int], str]) -> InputError:
    """Return the error about two different images, by the numbers of their records, with the same id."""
    one, other, image_id = found
    return InputError(
        f"{place(one)} ({visual_path(records[one])}) and {place(other)} ({visual_path(records[other])}) are two "
        f"pictures under one image_id {image_id!r}; give each picture an id of its own, or leave image_id out"
    )


def merge_images(records: list[Record], place: Callable[[int], str], *, root: Path = Path()) -> list[Record]:
    """Return one record per image, in first-seen order, with `image_id` and the list `caption` (maybe empty)."""
    merged: dict[str, Record] = {}
    ids = evaluation_ids(records)
    check_images(records, ids, place, root=root)
    for record, image_id in zip(records, ids, strict=True):
        captions = as_list(record["caption"]) if record.get("caption") is not None else []
        merged.setdefault(str(image_id), {**record, "image_id": image_id, "caption": []})["caption"] += captions
    return list(merged.values())


def evaluation_ids(records: list[Record]) -> list[Any]:
    """Return each record's image id; never the same for two image files."""
    for key in ("image_id", "img_id"):
        if records and all(record.get(key) is not None for record in records):
            return [record[key] for record in records]
    paths = [visual_path(record) for record in records]
    if any(isinstance(path, StoredImage) for path in paths):
        return list(map(str, paths))
    numbers = [PurePath(path).stem.split("_")[-1] for path in paths]
    if not all(n.isascii() and n.isdigit() and len(n) < MAX_ID_DIGITS for n in numbers):
        return paths
    found = [int(n) for n in numbers]
    return found if len(set(found)) == len(set(paths)) else paths


@registry.register_builder("caption")
@dataclass(kw_only=True)
class CaptionBuilder(BaseBuilder):
    """Records {image, caption[, image_id]}; `caption` may be a list. COCO's own caption files work too."""

    train_dataset = CaptionTrainDataset
    eval_dataset = CaptionEvalDataset
