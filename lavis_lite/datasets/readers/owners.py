"""Annotation files as their owners publish them, made into the records that the readers know.

A form is recognised by the content: its keys and those of its first record. Images get the path that they have where
the owner's archive is unpacked below the dataset's image folder; of several usual layouts the one that is there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record

logger = logging.getLogger(__name__)

KARPATHY_SPLITS = {"restval": "train"}
"""Karpathy's names of splits that count as another."""
SHARD_SIZE = 10_000
"""Images per folder as img2dataset writes them."""


@dataclass(frozen=True)
class Place:
    """The split that is read, and the folder of its images."""

    split: str
    root: Path

    def first(self, *paths: str) -> str:
        """Return the first path that exists below the image folder, or else the first."""
        return next((path for path in paths if (self.root / path).is_file()), paths[0])

    def names(self, folder: str) -> set[str]:
        """Return the names in a folder of the image folder; none if it does not exist."""
        path = self.root / folder
        return set(os.listdir(path)) if path.is_dir() else set()


class Rows(list[Any]):
    """The records of a file; `number` is that of the one being read, for messages."""

    number = 0

    def __iter__(self) -> Iterator[Any]:
        for self.number, row in enumerate(super().__iter__()):
            yield row


def owners_records(content: Any, *, split: str, root: Path) -> list[Record] | None:
    """Return the records of an owner's file, or None for content of another form.

    Raises InputError for a record that is not as the first one: without a key, or with a value of another kind.
    """
    first = _first(content)
    form = next((form for form in FORMS if form.recognises(content, first)), None)
    if form is None:
        return None
    rows = form.rows(content)
    try:
        return list(form.records(rows, Place(split, root)))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        where = f"record {rows.number}" if isinstance(rows, Rows) else " and ".join(sorted(form.keys))
        name = form.records.__name__
        problem = f"not as in the other records of a file of the form {name!r} ({type(error).__name__}: {error})"
        raise InputError(f"{where}: {problem}; download the file again, or remove the record") from error


def _first(content: Any) -> dict[str, Any]:
    """Return the first record of a list, or of an object's values; an empty one if there is none."""
    values = iter(content.values() if isinstance(content, dict) else content if isinstance(content, list) else ())
    first = next(values, None)
    return first if isinstance(first, dict) else {}


def karpathy(images: list[Record], place: Place) -> Iterator[Record]:
    """COCO's and Flickr30K's images with their sentences, in Karpathy's split."""
    for image in images:
        if KARPATHY_SPLITS.get(image["split"], image["split"]) == place.split:
            folder = f"{image['filepath']}/" if image.get("filepath") else ""
            yield {
                "image": place.first(f"{folder}{image['filename']}", image["filename"]),
                "image_id": image.get("cocoid", image.get("imgid")),
                "caption": [sentence["raw"] for sentence in image["sentences"]],
            }


def nocaps(images: list[Record], place: Place) -> Iterator[Record]:
    """The images of nocaps, with their domain."""
    for image in images:
        yield {**image, "image": image["file_name"], "image_id": image["id"]}


def gqa(content: list[tuple[str, Record]], place: Place) -> Iterator[Record]:
    """GQA's questions, with the fields that its metrics need."""
    kept = ("question", "answer", "types", "groups", "semantic")
    for key, row in content:
        yield {
            **{name: row[name] for name in kept if name in row},
            "image": f"{row['imageId']}.jpg",
            "question_id": key,
            "entailed": list(row.get("entailed") or ()),
            "is_balanced": row.get("isBalanced", True),
        }


def coco_path(place: Place, image_id: int, split: str) -> str:
    """Return the path of a COCO image, whose file is named by its release of 2014 or 2017."""
    by_year = [f"{name}2014/COCO_{name}2014_{image_id:012d}.jpg" for name in ("train", "val", "test")]
    own = f"{split}2017/{image_id:012d}.jpg"
    return place.first(own, *by_year, f"train2017/{image_id:012d}.jpg", f"val2017/{image_id:012d}.jpg")


def aokvqa(content: list[Record], place: Place) -> Iterator[Record]:
    """A-OKVQA's questions; those of other splits are left out."""
    for row in content:
        split = row.get("split", place.split)
        if split == place.split:
            yield {**row, "image": coco_path(place, row["image_id"], split)}


def nlvr2(content: list[Record], place: Place) -> Iterator[Record]:
    """NLVR2's statements; the images of a pair are named by the statement's identifier."""
    for row in content:
        pair = row["identifier"].rpartition("-")[0]
        split = pair.partition("-")[0]
        folder = f"{split}/{row['directory']}" if "directory" in row else split
        names = [f"{pair}-img{side}.png" for side in (0, 1)]
        images = [place.first(f"images/{folder}/{name}", f"{folder}/{name}", f"{split}/{name}", name) for name in names]
        yield {**row, "images": images}


def snli_ve(content: list[Record], place: Place) -> Iterator[Record]:
    """SNLI-VE's statements about images of Flickr30K."""
    for row in content:
        yield {"image": row["Flickr30K_ID"], "sentence": row["sentence2"], "label": row["gold_label"]}


def iconqa(content: list[tuple[str, Record]], place: Place) -> Iterator[Record]:
    """IconQA's questions with choices in words."""
    for key, row in content:
        if row["ques_type"] == "choose_txt" and row["split"] == place.split:
            folder = f"{place.split}/choose_txt/{key}"
            image = place.first(f"{folder}/image.png", f"iconqa/{folder}/image.png")
            yield {**row, "image": image, "question_id": key}


def video_questions(content: list[Record], place: Place) -> Iterator[Record]:
    """MSVD-QA's and MSRVTT-QA's questions, whose videos are numbers."""
    for row in content:
        number = row["video_id"]
        video = place.first(f"video{number}.mp4", f"vid{number}.avi", f"vid{number}.mp4")
        yield {"video": video, "question": row["question"], "answer": row["answer"], "question_id": row.get("id")}


def msrvtt_retrieval(content: list[Record], place: Place) -> Iterator[Record]:
    """The sentences of MSRVTT's 1k test split, one per clip: the table of JSFusion, or the lines that BLIP reads."""
    for row in content:
        clip, caption = (row["clip_name"], row["caption"]) if "clip_name" in row else (row["video_id"], row["sentence"])
        yield {"video": place.first(f"{clip}.mp4", f"{clip}.avi"), "caption": caption}


def genome_path(first_folder: set[str], image_id: int) -> str:
    """Return the path of an image of Visual Genome, which is in one of its two archives."""
    name = f"{image_id}.jpg"
    return f"VG_100K/{name}" if not first_folder or name in first_folder else f"VG_100K_2/{name}"


def genome_regions(content: list[Record], place: Place) -> Iterator[Record]:
    """Visual Genome's phrases about regions."""
    names = place.names("VG_100K")
    for image in content:
        path = genome_path(names, image.get("id") or image["image_id"])
        for region in image["regions"]:
            yield {"image": path, "caption": region["phrase"]}


def genome_questions(content: list[Record], place: Place) -> Iterator[Record]:
    """Visual Genome's questions and answers."""
    names = place.names("VG_100K")
    for image in content:
        path = genome_path(names, image.get("id") or image["image_id"])
        for row in image["qas"]:
            yield {"image": path, "question": row["question"], "answer": row["answer"], "question_id": row["qa_id"]}


def sbu(content: dict[str, Any], place: Place) -> Iterator[Record]:
    """SBU's captions; an image's file is called as in its address."""
    for url, caption in zip(content["image_urls"], content["captions"], strict=True):
        yield {"image": PurePosixPath(urlsplit(url).path).name, "caption": caption}


def url_pairs(content: list[Record], place: Place) -> Iterator[Record]:
    """Addresses of images with captions, as BLIP, CC3M and CC12M publish them, of images that img2dataset fetched:
    <shard>/<shard><number>.jpg in the file's order. Images that could not be fetched are left out, and counted.
    """
    num_missing, folder, names = 0, "", set[str]()
    for number, row in enumerate(content):
        shard = f"{number // SHARD_SIZE:05d}"
        if shard != folder:
            folder, names = shard, place.names(shard)
        name = f"{shard}{number % SHARD_SIZE:04d}.jpg"
        if name in names:
            yield {"image": f"{shard}/{name}", "caption": row["caption"]}
        else:
            num_missing += 1
    if num_missing:
        logger.warning("%s: %d of %d images are not there and are left out", place.root, num_missing, len(content))


@dataclass(frozen=True)
class Form:
    """An owner's form: the kind of its content, its keys, those of its first record, and those it must not have."""

    kind: type
    records: Callable[[Any, Place], Iterator[Record]]
    keys: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()

    def recognises(self, content: Any, first: dict[str, Any]) -> bool:
        """Return whether the content is of this form."""
        is_kind = isinstance(content, self.kind)
        if not is_kind or not self.keys <= set(content if self.kind is dict else ()):
            return False
        if self.keys == {"images"}:  # the record is below the key
            return self.fields <= _first(content["images"]).keys() and not self.absent & content.keys()
        return self.fields <= first.keys() and not self.absent & first.keys()

    def rows(self, content: Any) -> Any:
        """Return the records to read: of an object its items, or what is below the key; SBU's lists as they are."""
        if self.keys:
            return Rows(content["images"]) if self.keys == {"images"} else content
        return Rows(content.items() if self.kind is dict else content)


def _form(
    kind: type, records: Callable[[Any, Place], Iterator[Record]], fields: str, *, keys: str = "", absent: str = ""
) -> Form:
    return Form(kind, records, *(frozenset(names.split()) for names in (keys, fields, absent)))


FORMS = (
    _form(dict, karpathy, "split sentences filename", keys="images"),
    _form(dict, nocaps, "id file_name open_images_id", keys="images", absent="annotations"),
    _form(dict, sbu, "", keys="image_urls captions"),
    _form(dict, gqa, "imageId question", absent="image"),
    _form(dict, iconqa, "ques_type question choices split", absent="image"),
    _form(list, aokvqa, "question choices image_id", absent="image"),
    _form(list, nlvr2, "identifier sentence label", absent="images"),
    _form(list, snli_ve, "Flickr30K_ID sentence2 gold_label"),
    _form(list, video_questions, "video_id question answer", absent="video image"),
    _form(list, msrvtt_retrieval, "clip_name caption", absent="video image"),
    _form(list, msrvtt_retrieval, "vid_key video_id sentence"),
    _form(list, genome_regions, "regions"),
    _form(list, genome_questions, "qas"),
    _form(list, url_pairs, "url caption", absent="image file_name"),
)
