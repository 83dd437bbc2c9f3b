"""A member of a tar file as a path that says where its bytes are: `/data/train-0007.tar/@5120+34567/000123.jpg`.

An image in a shard is thus a text like any other image's: it can be an annotation's field, is read without an index,
and its name ends as the member's does. The tar file must not be compressed.
"""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from lavis_lite.common.errors import UnreadableSample
from lavis_lite.common.records import StoredImage

_MEMBER = re.compile(r"(?P<shard>.+\.tar)/@(?P<offset>\d{1,18})\+(?P<size>\d{1,18})/(?P<name>.+)", re.DOTALL)
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member(StoredImage):
    """A member of a tar file: `size` bytes from `offset` on."""

    shard: str
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        """Return the path that `find_member` reads."""
        return f"{self.shard}/@{self.offset}+{self.size}/{self.name}"

    def read(self) -> bytes:
        """Return the content. Raises UnreadableSample if the file is missing, or has another member there."""
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset - BLOCK)
                data = file.read(BLOCK + self.size)
        except OSError as error:
            raise UnreadableSample(f"{self.shard}: cannot be read ({error.strerror}); member {self.name}") from None
        if len(data) != BLOCK + self.size or not self._is_header(data[:BLOCK]):
            raise UnreadableSample(
                f"{self.shard}: has no member {self.name} of {self.size:,} bytes at byte {self.offset:,}: the file was "
                "changed or cut since its members were listed; start again, so that they are listed anew"
            )
        return data[BLOCK:]

    def _is_header(self, block: bytes) -> bool:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        return info.size == self.size


def find_member(path: str | os.PathLike[str]) -> Member | None:
    """Return the member that a path names; None for a path of any other form."""
    text = os.fspath(path)
    found = _MEMBER.fullmatch(text) if ".tar/@" in text else None
    return Member(found["shard"], int(found["offset"]), int(found["size"]), found["name"]) if found else None


def file_on_disk(path: str | Path) -> str:
    """Return the file that holds what the path names: of a member its tar file, else the path itself."""
    member = find_member(path)
    return member.shard if member else os.fspath(path)
