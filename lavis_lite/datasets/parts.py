"""Splits that are cut from another one, `split_off`, and images that are in two splits."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Protocol

from lavis_lite.common.errors import InputError
from lavis_lite.common.members import find_member
from lavis_lite.common.records import Record, StoredImage, digest_of

logger = logging.getLogger(__name__)

WHOLE = "train"
"""The split that others are cut from."""
CUT_BY = "_cut_by"
"""The key under which a reader notes what `split_off` cuts by where the image's path differs from machine to machine;
the dataset removes it."""
MAX_COMPARED = 5_000_000
"""Samples up to which the images of splits are compared."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The images of a split that is cut from another, or those that are left: a range of their hashes in [0, 1)."""

    start: float
    end: float

    def has(self, record: Record) -> bool:
        """Return whether the record's image is in this part; all records of one image are."""
        return self.start <= fraction(record) < self.end


def cut_splits(shares: Mapping[str, float], named: Sequence[str], *, has_stream: bool) -> list[str]:
    """Return the splits that are cut off. `named` are the splits with files of their own.

    Raises InputError without a split to cut from, if that is a stream, or if a split has files too.
    """
    if shares and WHOLE not in named:
        raise InputError(f"split_off: cuts splits from {WHOLE!r}, which build_info.annotations does not name")
    if shares and has_stream:
        raise InputError(f"split_off: {WHOLE!r} is a stream, of which nothing can be cut; name shards of their own")
    for name in shares:
        if name in named and name != WHOLE:
            raise InputError(f"split_off.{name}: build_info.annotations names files of this split; leave out one")
    return [name for name in shares if name != WHOLE]


def part_of(split: str, shares: Mapping[str, float]) -> Part | None:
    """Return the part of a split that `split_off: {val: 0.05}` cuts from `train`, or leaves of it; None for others.

    The parts lie at the end, so that a share can be added without moving those that are there.

    Raises InputError for shares that are not above 0, or of which nothing is left.
    """
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share < 1:
            raise InputError(f"split_off.{name}: must be a share between 0 and 1, got {share!r}")
    if shares and math.fsum(shares.values()) >= 1:
        raise InputError(f"split_off: the shares sum up to {math.fsum(shares.values()):g}, so nothing is left to train")
    if WHOLE in shares:
        raise InputError(f"split_off.{WHOLE}: is what the others are cut from; leave it out")
    end = 1.0
    for name, share in shares.items():
        if name == split:
            return Part(start=end - share, end=end)
        end -= share
    return Part(start=0.0, end=end) if split == WHOLE and shares else None


def fraction(record: Record) -> float:
    """Return a number in [0, 1) that depends on the record's image alone, not on its place in the file: of one inside a
    table without an id on its content.
    """
    image = record.get("image")
    if isinstance(image, StoredImage) and not record.get("video") and record.get("image_id") is None:
        digest = image.digest()
    else:
        digest = digest_of(image_identity(record))
    return int.from_bytes(digest, "big") / 2**64


def image_identity(record: Record) -> bytes:
    """Return what identifies a record's image: what the reader says, or its path; in a shard the names of both; of one
    inside a table its id, of several their contents; of a record without one all of it.
    """
    if CUT_BY in record:
        return os.fsencode(record[CUT_BY])
    value = record.get("video") or record.get("image") or record.get("images")
    if value is None and record.get("image0") is not None:
        value = [record["image0"], record.get("image1")]
    if isinstance(value, StoredImage):
        return str(record["image_id"]).encode()
    if value is None:
        value = json.dumps(record, sort_keys=True, default=str)
    elif isinstance(value, list):
        value = "\0".join(one.digest().hex() if isinstance(one, StoredImage) else _place_of(one) for one in value)
    else:
        value = _place_of(value)
    return os.fsencode(value)


def _place_of(path: object) -> str:
    """Return a path in its shortest form; of a member of a shard the names of both, wherever the shard is."""
    member = find_member(str(path))
    return f"{os.path.basename(member.shard)}/{member.name}" if member else os.path.normpath(str(path))


class HasFiles(Protocol):
    """A dataset whose samples name files; `part` is what `split_off` leaves of its annotation files."""

    vis_root: Path
    annotation_paths: list[Path]
    part: Part | None
    annotation: Sequence[Record]

    def __len__(self) -> int: ...

    def files_of(self, record: Record, /) -> list[str]:
        """Return the files of a record's sample."""
        ...


def warn_of_overlap(built: Mapping[str, HasFiles]) -> None:
    """Log how many images of other splits are in the training split too.

    Images inside tables are not compared; that the splits read one table is logged.
    """
    if WHOLE not in built or len(built) < 2:
        return
    if (count := sum(map(len, built.values()))) > MAX_COMPARED:
        logger.info("%d samples: whether splits share images is not checked above %d", count, MAX_COMPARED)
        return
    trained = set(_hashes(built[WHOLE]))
    for split, dataset in built.items():
        shared = len(trained.intersection(_hashes(dataset))) if split != WHOLE and trained else 0
        if shared:
            logger.warning(
                f"{split}: {shared:,} of its images are in the split {WHOLE!r} too, so its figures are those of images "
                "that were trained on; `split_off` cuts a file without such images"
            )
        elif split != WHOLE and (table := _table_of_both(built[WHOLE], dataset)):
            logger.warning(
                f"{split}: reads {table}, as the split {WHOLE!r} does, so its figures are those of images that were "
                "trained on; `split_off` cuts a file without such images"
            )


def _table_of_both(one: HasFiles, other: HasFiles) -> Path | None:
    """Return the parquet or Arrow file that both splits read whole; None without one."""
    shared = [path for path in other.annotation_paths if path in one.annotation_paths and other.part is None]
    return next((path for path in shared if path.suffix.lower() in (".parquet", ".arrow")), None)


def _hashes(dataset: HasFiles) -> Iterator[int]:
    root = os.fspath(dataset.vis_root)
    return (
        hash(os.path.normpath(os.path.join(root, file)))
        for record in dataset.annotation
        for file in dataset.files_of(record)
    )
