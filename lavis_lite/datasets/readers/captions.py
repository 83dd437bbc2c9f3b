"""Readers of captions: COCO's files, TextCaps, VSR's true statements, captions of videos.

Note: TextCaps's test images are kept, although they have no captions (LAVIS drops them).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import ID, NAME, PATH, TEXT, TEXTS, WORDS, Record, RecordCheck
from lavis_lite.datasets.annotations import as_records, check_records, check_unique, place_of
from lavis_lite.datasets.readers.files import SplitFiles, derived, with_places

CAPTION_FIELDS = {
    **{"image": PATH, "file_name": PATH, "caption": TEXTS},
    **{"image_id": ID, "img_id": ID, "instance_id": ID},
}

TEXTCAPS_FIELDS = {"image_id": NAME, "caption_str": TEXTS, "ocr_tokens": WORDS}


def read_captions(files: SplitFiles) -> Iterator[Record]:
    """Yield records {image, caption[, image_id]}; of a COCO caption file its images, each with all its captions."""
    for path in files.paths:
        content, where = files.content(path)
        if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
            records = with_places(coco_images(content, path, files), f"{path} (images)")
        else:
            records = files.located(as_records(content, where), where)
        for record in records:
            if record.get("image") is None and "file_name" in record:
                record["image"] = record["file_name"]
            yield record


def coco_images(content: dict[str, Any], path: Path, files: SplitFiles) -> list[Record]:
    """Return a COCO caption file's images, each with the list of its captions."""
    images = list(files.section(content, "images", path, files.needs("id", "file_name", id=ID, file_name=PATH)))
    check_unique(images, "id", lambda number: place_of(f"{path} (images)", number))
    captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
    check = files.needs("image_id", "caption", image_id=ID, caption=TEXT)
    for number, annotation in enumerate(files.section(content, "annotations", path, check)):
        if annotation["image_id"] not in captions:
            where = f"{path} (annotations): record {number}"
            raise InputError(f"{where} has image_id {annotation['image_id']}, which no image has")
        captions[annotation["image_id"]].append(annotation["caption"])
    return [{**image, "image_id": image["id"], "caption": captions[image["id"]]} for image in images]


def read_textcaps(files: SplitFiles) -> Iterator[Record]:
    """Yield TextCaps's records {image, image_id[, caption, ocr_tokens]}; the images are in one folder, named by ids."""
    required = ("image_id", "caption_str") if files.split == "train" else ("image_id",)
    ours = {"image_id": "image_id", "caption_str": "caption", "ocr_tokens": "ocr_tokens"}
    for row in rows_with_words(files, files.needs(*required, **TEXTCAPS_FIELDS)):
        fields = {ours[key]: row[key] for key in ours if row.get(key) is not None}
        yield derived(row, image=f"{row['image_id']}.jpg", **fields)


def rows_with_words(files: SplitFiles, check: RecordCheck) -> list[Record]:
    """Return the rows of files `{"data": [...]}` (TextCaps, TextVQA), with `ocr_tokens` if the words in the images, a
    file of the same form, are among the paths. Raises InputError for other content.
    """
    rows: list[Record] = []
    words: dict[Any, list[str]] | None = None
    for path in files.paths:
        content, _ = files.content(path)
        if not isinstance(content, dict) or not isinstance(content.get("data"), list):
            raise InputError(f'{path}: expected {{"data": [...]}}, as TextCaps and TextVQA are published')
        where = f"{path} (data)"
        part = as_records(content["data"], where)
        if "ocr_tokens" in part[0]:
            check_records(part, files.needs("image_id", "ocr_tokens", **TEXTCAPS_FIELDS), where)
            words = (words or {}) | {row["image_id"]: row["ocr_tokens"] for row in part}
        else:
            rows += with_places(check_records(part, check, where), where)
    return rows if words is None else [{**row, "ocr_tokens": words.get(row["image_id"], [])} for row in rows]


def read_vsr_captions(files: SplitFiles) -> Iterator[Record]:
    """Yield VSR's statements that are true, as captions."""
    check = files.needs("image", "caption", "label", image=PATH, caption=TEXT, label=ID, image_id=ID)
    yield from (record for record in files.records(check) if record["label"] == 1)


def read_video_captions(files: SplitFiles) -> Iterator[Record]:
    """Yield records {video, image_id[, caption]}; a video without an id is known by its name."""
    for record in files.records(files.needs("video", video=PATH, image_id=ID)):
        if record.get("image_id") is None:
            record["image_id"] = record["video"]
        yield record
