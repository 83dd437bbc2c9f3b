"""A check that images under one `image_id` are copies of one picture; their contents are compared once.

In shards and tables a picture may be there once per caption, so that paths do not tell.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os.path
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lavis_lite.common.checkpoint import write_text
from lavis_lite.common.errors import UnreadableSample
from lavis_lite.common.members import Member, find_member
from lavis_lite.common.progress import progress
from lavis_lite.common.records import Record, StoredImage
from lavis_lite.common.sources import download

logger = logging.getLogger(__name__)


Picture = str | StoredImage
"""The path of a file, or an image in a shard or table."""


def visual_path(record: Record) -> Any:
    """Return the path of the record's video, or else of its image."""
    return record["image"] if record.get("video") is None else record["video"]


def picture_of(image: Any, root: Path) -> Picture:
    """Return the shortest form of an image's path, or where it is in a shard or table."""
    if isinstance(image, StoredImage):
        return image
    return find_member(root / image) or os.path.normpath(root / image)


def first_different(
    pairs: Iterable[tuple[Picture, Picture]], count: int, *, name: str, key: Iterable[str] | None
) -> int | None:
    """Return the number of the first of `count` pairs that are not copies of one picture; None if all are.

    That they are is noted in the cache under `key`, if there is one, and they are not read again. An image that cannot
    be read differs from none: reading its sample fails.
    """
    note = None if key is None else _note(key)
    if not count or (note is not None and note.is_file()):
        return None
    logger.info(f"{name}: comparing {count:,} pairs of images that have one image_id")
    for number, (one, other) in enumerate(progress(pairs, count, name="comparing", unit="pair")):
        if _differ(one, other):
            return number
    if note is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, f"{name}\n")
    return None


def _note(key: Iterable[str]) -> Path:
    digest = hashlib.blake2b("|".join(key).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return download.cache_dir() / "tables" / f"copies-{digest}"


def shards_key(pairs: Sequence[tuple[Picture, Picture]]) -> list[str] | None:
    """Return what identifies pairs of members of shards: their paths, and the shards' sizes and times of change; None
    for other images.
    """
    images = list(itertools.chain(*pairs))
    names = sorted({image.shard for image in images if isinstance(image, Member)})
    if not all(isinstance(image, Member) for image in images) or not all(Path(name).is_file() for name in names):
        return None
    states = [(name, Path(name).stat()) for name in names]
    return [*(f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in states), *map(str, images)]


def _differ(one: Picture, other: Picture) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one != other
    if isinstance(one, Member) and isinstance(other, Member) and one.size != other.size:
        return True
    digests = _digest(one), _digest(other)
    return None not in digests and digests[0] != digests[1]


@functools.lru_cache(maxsize=4)  # the copies of a picture follow each other
def _digest(image: StoredImage) -> bytes | None:
    try:
        return hashlib.blake2b(image.read()).digest()
    except (UnreadableSample, OSError):
        return None
