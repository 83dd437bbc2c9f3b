"""Local WebDataset shards as annotation files: an index says where each member is, so that samples have random access.

The index of a shard is made once, by reading its headers and texts, and kept in the cache under the shard's path, size
and time of change. Images stay in the shards; a record names one by its position (`common/members.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lavis_lite.common.checkpoint import write_text
from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.members import BLOCK, Member
from lavis_lite.common.progress import progress
from lavis_lite.common.records import Record
from lavis_lite.common.sources import download
from lavis_lite.datasets.shard_records import is_image, is_text, make_record, split_name

logger = logging.getLogger(__name__)

IncompleteSamples = Literal["error", "skip"]
SUFFIX = ".tar"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
VERSION = 2
"""Of the form of index files; another one makes them anew."""
NUM_THREADS = 4  # a network drive answers several at once
SHOWN = 3


@dataclass(kw_only=True)
class ShardIndex:
    """The samples of one shard, and what is wrong with it."""

    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Samples without image or text, those whose texts cannot be read, and links in place of files."""
    cut_at: int | None = None
    """The byte at which a shard ends in the middle of a member, or without its end marker."""


def is_shard(path: str | Path) -> bool:
    """Return whether a path names a tar file that is not compressed."""
    return os.fspath(path).lower().endswith(SUFFIX)


def shard_records(path: Path, incomplete: IncompleteSamples) -> tuple[list[Record], str]:
    """Return the samples of a shard, in order, and what is left out of it, in words.

    Raises:
        InputError: the shard is compressed or has no whole sample; or `incomplete` is "error" and the shard is cut, or
            samples in it lack image or text.
    """
    index = indexed(path)
    problems = list(index.problems)
    if index.cut_at is not None:
        cut = f"is cut at byte {index.cut_at:,}, after {len(index.records):,} whole samples (fetch it again)"
        problems.insert(0, cut)
    more = f", and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
    left_out = f"{path}: {'; '.join(problems[:SHOWN])}{more}" if problems else ""
    if left_out and incomplete == "error":
        raise InputError(f"{left_out}. Correct the shard, or set the dataset's incomplete_samples: skip")
    if not index.records:
        raise InputError(f"{path}: has no whole sample: expected members such as 000.jpg and 000.txt")
    return index.records, left_out


def index_all(paths: Sequence[Path]) -> None:
    """Make the indices of these shards that are not in the cache yet."""
    missing = [path for path in paths if not index_path(path).is_file()]
    if missing:
        logger.info(f"listing the members of {len(missing):,} shards, once: {missing[0]} ...")
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for _ in progress(pool.map(indexed, missing), len(missing), name="listing", unit="shard"):
            pass


def index_path(path: Path) -> Path:
    """Return where the index of a shard is kept. Raises MissingFileError if the shard is not there."""
    try:
        status = path.stat()
    except OSError as error:
        raise MissingFileError(f"shard not found: {path} ({error.strerror})") from None
    name = f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}|{VERSION}"
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return download.cache_dir() / "shards" / f"{path.stem[:80]}-{digest}.json"


def indexed(path: Path) -> ShardIndex:
    """Return the index of a shard, from the cache if it is there."""
    cached = index_path(path)
    if cached.is_file():
        return ShardIndex(**json.loads(cached.read_bytes()))
    index = make_index(path)
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_text(cached, json.dumps(asdict(index), ensure_ascii=True))
    return index


def make_index(path: Path) -> ShardIndex:
    """Read the headers and texts of a shard. Raises InputError for a compressed file, and one that is not a tar."""
    with path.open("rb") as file:
        start = file.read(BLOCK)
    kind = next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None)
    if kind:
        raise InputError(f"{path}: is compressed ({kind}), and has no random access: decompress it")
    try:
        with tarfile.open(path.absolute(), "r:", encoding="utf-8") as tar:
            return _index_of(tar, path.stat().st_size)
    except tarfile.ReadError as error:
        raise InputError(f"{path}: is not a tar file, or is damaged at its start ({error})") from error


def _index_of(tar: tarfile.TarFile, num_bytes: int) -> ShardIndex:
    index, samples, end = ShardIndex(), dict[str, dict[str, str | bytes]](), 0
    try:
        for info in tar:
            end = info.offset
            if info.offset_data + info.size > num_bytes:
                raise tarfile.ReadError("cut")
            name = split_name(info.name)
            if name is not None and (info.issym() or info.islnk()):
                index.problems.append(
                    f"{info.name} is a link to {info.linkname} (tar --dereference --hard-dereference)"
                )
            if name is None or not info.isreg() or info.issparse():
                continue
            members = samples.setdefault(name[0], {})
            if name[1] in members:
                index.problems.append(f"{info.name} is there twice")
            members[name[1]] = _content(tar, info, name[1])
        end = tar.offset
    except tarfile.ReadError:
        index.cut_at = end
    if index.cut_at is None and not _ends(tar, end):
        index.cut_at = end
    if index.cut_at is not None and samples:
        _drop_last_unless_whole(samples)
    needs_image, needs_text = (
        2 * sum(any(map(kind, members)) for members in samples.values()) > len(samples) for kind in (is_image, is_text)
    )
    for key, members in samples.items():
        if needs_image and not any(map(is_image, members)):
            index.problems.append(f"sample {key} has no image")
        elif needs_text and not any(map(is_text, members)):
            index.problems.append(f"sample {key} has no text")
        else:
            try:
                index.records.append(make_record(key, members))
            except InputError as error:
                index.problems.append(str(error))
    return index


def _drop_last_unless_whole(samples: dict[str, dict[str, str | bytes]]) -> None:
    """Drop the last sample before a cut if it has fewer members than the first one, or is alone and has no pair."""
    first, last = next(iter(samples)), next(reversed(samples))
    has_pair = any(map(is_image, samples[last])) and any(map(is_text, samples[last]))
    if not samples[last].keys() >= samples[first].keys() or (first == last and not has_pair):
        del samples[last]


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo, extension: str) -> str | bytes:
    """Return a text's bytes, or the path of any other member."""
    if not is_text(extension):
        return str(Member(str(tar.name), info.offset_data, info.size, info.name))
    assert tar.fileobj is not None
    tar.fileobj.seek(info.offset_data)
    return tar.fileobj.read(info.size)


def _ends(tar: tarfile.TarFile, offset: int) -> bool:
    """Return whether the end marker, a block of zeros, is at this byte."""
    assert tar.fileobj is not None
    tar.fileobj.seek(offset)
    return tar.fileobj.read(BLOCK) == bytes(BLOCK)
