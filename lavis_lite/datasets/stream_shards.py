"""Reading shards from start to end by the `webdataset` package: local files, addresses and pipes.

A shard that is cut or unreachable gives what it has, and then the problem as a text: whether it ends the run is decided
by the reader's caller. The number of samples in a shard is not known before it is read.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlparse

from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.common.members import BLOCK
from lavis_lite.common.records import Record, StoredImage
from lavis_lite.datasets.shard_records import KEY, is_text, make_record

COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
"""The first bytes of compressed files, and what opens these."""
BROKEN = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)
"""Errors of `webdataset`, `tarfile` and the openers about a shard."""

MOST_KEYS = 100_000
"""Samples of a shard that are remembered, to find members of one that do not follow each other."""


@dataclass(frozen=True)
class LoadedFile(StoredImage):
    """The content of a member that was read, and its place for messages."""

    place: str
    content: bytes = field(repr=False)

    def read(self) -> bytes:
        return self.content

    def __str__(self) -> str:
        return self.place

    def __fspath__(self) -> str:
        return self.place


class Loaded(NamedTuple):
    """One sample of a shard: its record, whose images are loaded files; or a problem."""

    shard: str
    record: Record
    problem: str = ""
    is_scattered: bool = False
    """Whether the problem is that members of a sample do not follow each other."""


class _FromStart:
    """A file of which the first bytes have been read, from its start."""

    def __init__(self, file: BinaryIO, head: bytes) -> None:
        self.file, self.head = file, head

    def read(self, size: int = -1) -> bytes:
        if not self.head:
            return self.file.read(size)
        data, self.head = (self.head, b"") if size < 0 else (self.head[:size], self.head[size:])
        return data + self.file.read(size) if size < 0 else data


class _Tail:
    """A tar, compressed or not, that is read once, and remembers its last bytes.

    Note: it is decompressed here, since `tarfile` would leave the compressed file's checksum unread, and with it what
    shows that the file is whole.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.last = file, b""
        head = file.read(max(map(len, COMPRESSIONS)))
        opened = next((open_as for magic, open_as in COMPRESSIONS.items() if head.startswith(magic)), None)
        source = _FromStart(file, head)
        self.content = source if opened is None else opened(source)

    def read(self, size: int = -1) -> bytes:
        data = self.content.read(size)
        self.last = (self.last + data)[-BLOCK:]
        return data

    def check_end(self) -> None:
        """Read the rest; raise EOFError if it is not padding, or if the end marker of a tar is missing.

        Note: `tarfile` takes a damaged header, and a file that ends between two members, for the end.
        """
        while rest := self.read(2**20):
            if rest.strip(b"\0"):
                raise EOFError("a header is damaged")
        if self.last != bytes(BLOCK):
            raise EOFError("its end marker is missing")

    def close(self) -> None:
        self.file.close()


def check_installed() -> None:
    """Raise MissingPackageError if the `webdataset` package is not installed."""
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("streams of shards need `pip install lavis-lite[shards]`") from error


def is_address(name: str) -> bool:
    """Return whether a name is an address or a command (`pipe:`), not a local path."""
    return "://" in name or name.startswith("pipe:")


def open_shard(name: str) -> BinaryIO:
    """Open a local file, or what `webdataset` or else `fsspec` opens: http, gs, s3, hf, `pipe:COMMAND` ..."""
    from webdataset.gopen import gopen, gopen_schemes

    scheme = urlparse(name).scheme
    opened: BinaryIO
    if not is_address(name) or scheme in gopen_schemes or scheme == "file":
        opened = gopen(name)
        return opened
    import fsspec  # type: ignore[import-untyped]

    try:
        opened = fsspec.open(name, "rb").open()
    except ImportError as error:
        raise MissingPackageError(f"{name}: {error}") from error
    return opened


def read_shard(name: str) -> Iterator[Loaded]:
    """Yield the samples of a shard in their order, and last a problem if the shard is cut or cannot be read, or if the
    members of a sample do not follow each other.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    count, file, seen = 0, None, dict[str, frozenset[str]]()
    try:
        file = _Tail(open_shard(name))
        for sample in group_by_keys(tar_file_expander([{"url": name, "stream": file}])):
            key, extensions = sample[KEY], frozenset(one for one in sample if not one.startswith("__"))
            if key in seen and seen[key].isdisjoint(extensions):
                yield Loaded(name, {}, _scattered(name, key, seen[key], extensions), is_scattered=True)
                return
            if len(seen) < MOST_KEYS:
                seen[key] = extensions
            yield _loaded(sample, name)
            count += 1
        file.check_end()
        file.close()
        if not count:
            yield Loaded(name, {}, f"shard {name}: has no samples: expected members such as 000.jpg and 000.txt")
    except BROKEN as error:
        problem = f"cut, damaged or unreachable after {count:,} samples ({_exit_of(file) or _reason(error)})"
        yield Loaded(name, {}, f"shard {name}: {problem}")
    finally:
        if file is not None:
            with suppress(OSError):  # of a command that is ended early
                file.close()


def _scattered(shard: str, key: str, first: Collection[str], later: Collection[str]) -> str:
    parts = [", ".join(f"{key}.{extension}" for extension in sorted(one)) for one in (first, later)]
    return (
        f"shard {shard}: sample {key}: its members do not follow each other ({parts[0]}, and later {parts[1]}), as a "
        "stream needs: write the shard again, sorted by name (tar --sort=name), or leave out the key `stream`, so that "
        "it is read with an index"
    )


def scattered_problem(name: str) -> str:
    """Return the problem of a shard of which the members of a sample do not follow each other; empty without one."""
    return next((loaded.problem for loaded in read_shard(name) if loaded.is_scattered), "")


def _exit_of(file: _Tail | None) -> str:
    """Return the exit status of the command that a shard is read from, such as curl, if it failed; else nothing."""
    try:
        if file is not None:
            file.close()
    except OSError as error:
        program, status = re.search(r"\w+", str(error)), re.search(r"exit -?\d+", str(error))
        return f"{program[0]}: {status[0]}" if program and status else str(error)[:200]
    return ""


def _reason(error: Exception) -> str:
    """Return an error's text without what `webdataset` appends to it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error.args[0] if error.args else "").partition(" @ ")[0]
    return text.partition(" in tar file ")[0] or type(error).__name__


def _loaded(sample: dict[str, Any], shard: str) -> Loaded:
    key = sample[KEY]
    members = {
        extension: value if is_text(extension) else LoadedFile(f"{shard}/{key}.{extension}", value)
        for extension, value in sample.items()
        if not extension.startswith("__")
    }
    try:
        return Loaded(shard, make_record(key, members))
    except InputError as error:
        return Loaded(shard, {}, f"shard {shard}: {error}")
