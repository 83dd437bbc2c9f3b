"""Rows of a fixed size on disk, found by a digest: the tokens of a frozen image encoder (`model.cache_features`).

Each process appends to files of its own: `<name>.rows`, one row after another, and `<name>.index`, an entry per row,
written after the row. A row without an entry, as a killed process leaves it, is never read. The entry has a checksum
of the row, so one that a power failure or a cut file spoilt counts as missing.

Note: rows are read by position and not mapped: if a mapped file is cut meanwhile, a signal ends the process.
"""

import hashlib
import os
import secrets
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from lavis_lite.common.disk import why_unwritable
from lavis_lite.common.errors import WriteError

ROWS, INDEX = ".rows", ".index"
ENTRY = np.dtype([("key", "<u8"), ("rest", "<u8"), ("checksum", "<u4")])
"""An entry of an index: both halves of the digest, and the checksum of digest and row."""
PLACE = np.dtype([("rest", "<u8"), ("checksum", "<u4"), ("file", "<u4"), ("row", "<u4")])
"""Memory of a process per row, besides the first half of the row's digest."""
MAX_FILE = 16 * 2**30
"""Bytes of rows after which a process begins another pair of files."""
DIGEST = 16
"""Bytes of a digest."""


def image_digests(images: Tensor) -> list[bytes]:
    """Return a digest of each image's values; `images` (B, ...) are on the CPU. About a second per gigabyte."""
    return [hashlib.blake2b(image, digest_size=DIGEST).digest() for image in images.contiguous().numpy()]


class TokenStore:
    """Rows of `row_bytes` bytes in `folder`, which any number of processes may read and append to."""

    def __init__(self, folder: Path, *, row_bytes: int) -> None:
        self.folder, self.row_bytes = folder, row_bytes
        self.keys = np.empty(0, "<u8")
        """First halves of the digests, sorted."""
        self.places = np.empty(0, PLACE)
        self.names: list[str] = []
        """Names of the pairs of files, by number."""
        self.counts: dict[str, int] = {}
        """Entries that were read of each."""
        self.descriptors: dict[int, int] = {}
        self.appended: tuple[int, int, int] | None = None
        """The number of the pair that this process appends to, and its two descriptors."""
        self.refresh()

    def __len__(self) -> int:
        return len(self.keys)

    def has_all(self, digests: Sequence[bytes]) -> bool:
        """Return whether all rows are there; rows that other processes have added are found too."""
        if self._knows(digests):
            return True
        self.refresh()
        return self._knows(digests)

    def _knows(self, digests: Sequence[bytes]) -> bool:
        return all(next(self._positions(digest), None) is not None for digest in digests)

    def read(self, digests: Sequence[bytes], rows: np.ndarray) -> list[bool]:
        """Read rows into `rows` (B, row_bytes), bytes; return which were there and whole."""
        if not self._knows(digests):
            self.refresh()
        return [self._read(digest, row) for digest, row in zip(digests, rows, strict=True)]

    def _read(self, digest: bytes, row: np.ndarray) -> bool:
        while (position := next(self._positions(digest), None)) is not None:
            place = self.places[position]
            if self._fill(int(place["file"]), int(place["row"]), row) and checksum(digest, row) == place["checksum"]:
                return True
            self.keys, self.places = np.delete(self.keys, position), np.delete(self.places, position)
        return False

    def _positions(self, digest: bytes) -> Iterator[int]:
        """Yield the positions of a digest's entries: several, if processes added the same image at the same time."""
        key, rest = np.frombuffer(digest, "<u8")
        for position in range(int(np.searchsorted(self.keys, key)), len(self.keys)):
            if self.keys[position] != key:
                return
            if self.places[position]["rest"] == rest:
                yield position

    def _fill(self, file: int, number: int, row: np.ndarray) -> bool:
        """Read a row of a file, and return whether it is there as a whole."""
        try:
            if file not in self.descriptors:
                self.descriptors[file] = os.open(self.folder / (self.names[file] + ROWS), os.O_RDONLY)
        except FileNotFoundError:
            return False
        view, done = row.data, 0
        while done < self.row_bytes:
            count = os.preadv(self.descriptors[file], [view[done:]], number * self.row_bytes + done)
            if count == 0:
                return False
            done += count
        return True

    def refresh(self) -> None:
        """Read the entries that processes have added since the last time."""
        if not self.folder.is_dir():
            return
        for path in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            name, suffix = os.path.splitext(path.name)
            known = self.counts.get(name, 0)
            count = path.stat().st_size // ENTRY.itemsize - known if suffix == INDEX else 0
            if count > 0:
                with open(path, "rb") as file:
                    file.seek(known * ENTRY.itemsize)
                    self._insert(name, np.frombuffer(file.read(count * ENTRY.itemsize), ENTRY))

    def _insert(self, name: str, entries: np.ndarray) -> None:
        """Add the next entries of an index to those in memory."""
        if name not in self.counts:
            self.names.append(name)
            self.counts[name] = 0
        places = np.empty(len(entries), PLACE)
        places["rest"], places["checksum"] = entries["rest"], entries["checksum"]
        places["file"] = self.names.index(name)
        places["row"] = np.arange(self.counts[name], self.counts[name] + len(entries))
        keys = np.concatenate([self.keys, entries["key"]])
        order = np.argsort(keys, kind="stable")  # fast for two sorted parts
        self.keys, self.places = keys[order], np.concatenate([self.places, places])[order]
        self.counts[name] += len(entries)

    def add(self, digests: Sequence[bytes], rows: np.ndarray) -> None:
        """Append rows (B, row_bytes), bytes.

        Raises:
            WriteError: the folder cannot be written, naming it; all earlier rows stay valid.
        """
        entries = np.empty(len(digests), ENTRY)
        halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        entries["key"], entries["rest"] = halves[:, 0], halves[:, 1]
        entries["checksum"] = [checksum(digest, row) for digest, row in zip(digests, rows, strict=True)]
        try:
            file, to_rows, to_index = self._appended()
            name = self.names[file]
            first = self.counts[name]
            write_at(to_rows, rows.tobytes(), first * self.row_bytes)
            write_at(to_index, entries.tobytes(), first * ENTRY.itemsize)
        except OSError as error:
            raise self._unwritable(error) from error
        self._insert(name, entries)

    def _appended(self) -> tuple[int, int, int]:
        """Return the pair of files that this process appends to; a new one if there is none, or it is full."""
        if self.appended is None or self.counts[self.names[self.appended[0]]] * self.row_bytes >= MAX_FILE:
            self._end_pair()
            self.folder.mkdir(parents=True, exist_ok=True)
            name, flags = secrets.token_hex(8), os.O_WRONLY | os.O_CREAT | os.O_EXCL
            to_rows, to_index = (os.open(self.folder / (name + suffix), flags, 0o666) for suffix in (ROWS, INDEX))
            self.names.append(name)
            self.counts[name] = 0
            self.appended = len(self.names) - 1, to_rows, to_index
        return self.appended

    def _end_pair(self) -> None:
        """Close the files that this process appends to."""
        for descriptor in self.appended[1:] if self.appended else ():
            os.close(descriptor)
        self.appended = None

    def _unwritable(self, error: OSError) -> WriteError:
        advice = "free some space, or name a folder on another disk; the rows that are there stay valid"
        why = why_unwritable(self.folder, error)
        problem = f"cannot write to {self.folder}: {why}; an image takes {self.row_bytes:,} bytes: {advice}"
        return WriteError(error.errno, f"model.cache_features: {problem}")

    def close(self) -> None:
        """Close all files."""
        self._end_pair()
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors = {}


def checksum(digest: bytes, row: np.ndarray) -> int:
    """Return the checksum of a row (bytes) under its digest."""
    return zlib.crc32(row.data, zlib.crc32(digest))


def write_at(descriptor: int, content: bytes, offset: int) -> None:
    """Write all of the content at a position of a file."""
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
