"""The digest of a dataset's annotations, by which a run that is continued knows that they are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.shard_tables import content_digest
from lavis_lite.datasets.tables import is_saved, is_table

EDGE = 2**20
"""Bytes at either end of a table that its digest is of; parquet's index, with the sizes of all parts, is at the end."""


def annotation_digest(*parts: BaseDataset) -> str | None:
    """Return the digest of the annotations of one or several splits, wherever they are; None if they have no files."""
    digest = hashlib.blake2b(digest_size=8)
    found = [(part, path) for part in parts for path in part.annotation_paths]
    for part, path in found:
        for content in _contents(part, path):
            digest.update(content)
    return digest.hexdigest() if found and all(path.exists() for _, path in found) else None


def _contents(part: BaseDataset, path: Path) -> Iterator[bytes]:
    """Yield what identifies the content of a file or folder."""
    if own := content_digest(path):  # of a table of shards
        yield own
    elif is_saved(path):
        for table in sorted(path.rglob("*.arrow")):
            yield from _edges(table)
    elif is_table(path):
        yield from _edges(path)
    elif path.is_file():
        with path.open("rb") as file:
            yield hashlib.file_digest(file, "blake2b").digest()
    elif path.is_dir():  # of images
        yield json.dumps(list(part.annotation), default=str).encode()


def _edges(table: Path) -> Iterator[bytes]:
    """Yield size, begin and end of a table, which may hold terabytes of images."""
    with table.open("rb") as file:
        size = table.stat().st_size
        yield f"{size} ".encode() + file.read(EDGE)
        file.seek(max(0, size - EDGE))
        yield file.read()
