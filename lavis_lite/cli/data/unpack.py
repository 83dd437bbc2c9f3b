"""Unpacking of archives from the network: nothing is written outside the folder, and nothing half-way.

An archive is unpacked into a hidden folder beside its place, whole, and its files are renamed into place.
"""

import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from lavis_lite.cli.data.table import size_text
from lavis_lite.common.errors import DamagedFileError, InputError

PREFIX = ".unpack-"
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError)
"""Errors of zipfile and tarfile for a damaged, encrypted or unknown archive."""
_LINK = 0o120000
_KIND = 0o170000
_REGULAR = (0, 0o100000, 0o040000)
"""File types of a zip's members that are unpacked: none said, files, folders."""


def unpack(archive: Path, folder: Path, *, strip: int = 0) -> int:
    """Unpack a zip or tar file into `folder` and return the number of files; existing files are replaced.

    `strip` leading parts of the members' paths are removed. The caller holds a lock on the folder.

    Raises:
        ValueError: a member is absolute, has `..` in its path, or is a link or device; the archive is damaged, of
            another kind, or larger than the free space. Nothing is then changed in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{PREFIX}*"):  # of a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder, prefix=PREFIX) as aside:
        count = 0
        try:
            for name, file in members(archive, free=shutil.disk_usage(folder).free):
                target = aside_path(Path(aside), name, strip, archive)
                if target is not None:
                    count += 1
                    _write(file, target, name, archive)
        except BROKEN as error:
            raise DamagedFileError(f"{archive}: cannot be unpacked ({type(error).__name__}: {error})") from error
        if not count:
            raise InputError(f"{archive}: has no files" + (f" below {strip} folders" if strip else ""))
        _merge(Path(aside), folder)
    return count


def members(archive: Path, *, free: int) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the path and content of each file in a zip or tar archive, in order.

    Raises InputError, naming the member, for a link, a device or a path that leaves the folder, and if the archive has
    more than `free` bytes.
    """
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive, free)
    elif tarfile.is_tarfile(archive):
        yield from _tar_members(archive, free)
    else:
        raise InputError(f"{archive}: neither a zip nor a tar file; delete it, and check its address")


def _zip_members(archive: Path, free: int) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as opened:
        entries = opened.infolist()
        for entry in entries:
            kind = entry.external_attr >> 16 & _KIND
            if kind not in _REGULAR:
                what = "a link" if kind == _LINK else "not a plain file"
                raise InputError(f"{archive}: member {entry.orig_filename!r} is {what}: the archive is refused")
            check_path(entry.orig_filename, archive)
        _check_space(sum(entry.file_size for entry in entries), free, archive)
        for entry in entries:
            if not entry.is_dir():
                with opened.open(entry) as file:
                    yield entry.filename, file


def _tar_members(archive: Path, free: int) -> Iterator[tuple[str, IO[bytes]]]:
    total = 0
    with tarfile.open(archive) as opened:
        for member in opened:
            check_path(member.name, archive)
            if not (member.isfile() or member.isdir()):
                what = "a link" if member.issym() or member.islnk() else "not a plain file"
                raise InputError(f"{archive}: member {member.name!r} is {what}: the archive is refused")
            total += member.size
            _check_space(total, free, archive)
            file = opened.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file


def _check_space(needed: int, free: int, archive: Path) -> None:
    if needed > free:
        raise InputError(
            f"{archive}: its files have {size_text(needed)}, and {size_text(free)} are free: free some space, or set "
            "LAVIS_LITE_DATA to another disk"
        )


def check_path(name: str, archive: Path) -> None:
    """Raise InputError for a member's path that is absolute, here or on Windows, or has `..` or a NUL in it."""
    windows = PureWindowsPath(name)
    is_absolute = PurePosixPath(name).is_absolute() or windows.drive or windows.root
    if is_absolute or ".." in windows.parts or "\0" in name or not name:
        raise InputError(f"{archive}: member {name!r} would be written outside the folder: the archive is refused")


def aside_path(root: Path, name: str, strip: int, archive: Path) -> Path | None:
    """Return where a member is written below `root`, without its first `strip` parts; None if nothing is left."""
    parts = PurePosixPath(name).parts[strip:]
    if not parts:
        return None
    target = root.joinpath(*parts)
    assert target.is_relative_to(root), f"{archive}: {name} would be written to {target}"
    return target


def _write(file: IO[bytes], target: Path, name: str, archive: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:  # no member overwrites another
            shutil.copyfileobj(file, out, 2**20)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise InputError(f"{archive}: member {name!r} is there twice, or is a file and a folder") from error


def _merge(source: Path, target: Path) -> None:
    """Rename the files of `source` into `target`: whole folders where there is none of that name."""
    for entry in list(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir() and not place.is_symlink():
            _merge(entry, place)
        elif entry.is_dir() and place.is_symlink() and place.is_dir():  # the user's own link to another disk
            shutil.copytree(entry, place, dirs_exist_ok=True)
        else:
            os.replace(entry, place)
