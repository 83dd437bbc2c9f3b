"""Digests of the images in a table, by which `split_off` tells them apart. All images are read for it, once."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lavis_lite.common.checkpoint import atomic_write
from lavis_lite.common.records import digest_of
from lavis_lite.common.sources import download

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


class ImageDigests:
    """The digest of each row's image, kept in the cache under the table's files, their sizes and times of change."""

    def __init__(self, images: Dataset, column: str, name: str) -> None:
        self.images, self.column, self.name = images, column, name
        self.values: np.ndarray | None = None

    def of(self, row: int, read: Callable[[int], bytes]) -> bytes:
        """Return the digest of a row's image; `read` returns the content of any row's."""
        if self.values is None:
            path = self._file()
            if not path.is_file():
                logger.info(f"{self.name}: reading {len(self.images):,} images, once: split_off compares their content")
                found = b"".join(digest_of(read(number)) for number in range(len(self.images)))
                buffer = io.BytesIO()
                np.save(buffer, np.frombuffer(found, dtype=">u8"))
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, lambda file: file.write(buffer.getbuffer()))
            self.values = np.load(path)
        return int(self.values[row]).to_bytes(8, "big")

    def _file(self) -> Path:
        files = [Path(file["filename"]) for file in self.images.cache_files]
        parts = [self.column, *(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)]
        key = hashlib.blake2b("|".join(parts).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        return download.cache_dir() / "tables" / f"digests-{key}.npy"
