"""A folder of images as records: of its `metadata` file, or of the images' names, sub-folders and `.txt` files.

The names of files are listed once and kept in the cache, since listing a million files takes minutes on a network
drive. A folder that has changed since, by its time stamp, is listed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lavis_lite.common.errors import InputError
from lavis_lite.common.image_io import SUFFIXES
from lavis_lite.common.records import Record
from lavis_lite.common.sources import download

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of the file that describes a folder's images, as `datasets` has them; its column `file_name` is the path."""
SETTLED = 2.0
"""Seconds after which a folder's time stamp shows every later change; a listing of a younger one is not kept."""


def metadata_file(folder: Path) -> Path | None:
    """Return the file that describes the folder's images; None without one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def folder_records(folder: Path) -> list[Record]:
    """Return a record per image, sorted by path: `image` (the path below the folder), `name` (without suffix),
    `folder` and `label` (its sub-folder, if it is in one), `caption` (of the `.txt` file of the same name, if any).

    Raises InputError for a folder without images, and for a `.txt` file that is not UTF-8.
    """
    files = list_files(folder)
    texts = {os.path.splitext(file)[0] for file in files if file.endswith(".txt")}
    images = [file for file in files if os.path.splitext(file)[1].lower() in SUFFIXES]
    if not images:
        raise InputError(
            f"{folder} is a folder; name an annotation file (.json, .jsonl, .csv, .tsv, .parquet), or a folder with "
            f"images: this one has none ({len(files):,} other files)"
        )
    records = []
    for image in images:
        stem = os.path.splitext(image)[0]
        parent, _, name = stem.rpartition("/")
        record = {"image": image, "name": name}
        if parent:
            record |= {"folder": parent, "label": parent}
        if stem in texts:
            record["caption"] = _text(folder / f"{stem}.txt")
        records.append(record)
    return records


def class_names(folder: Path) -> list[str]:
    """Return the sub-folders with images, sorted: the names of the classes."""
    files = (file for file in list_files(folder) if os.path.splitext(file)[1].lower() in SUFFIXES)
    return sorted({file.rpartition("/")[0] for file in files} - {""})


def list_files(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it, sorted; hidden ones are left out.

    Raises InputError for a folder that cannot be listed.
    """
    folder = folder.absolute()
    cached = download.cache_dir() / "listings" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"
    try:
        stamps, files = json.loads(cached.read_text(encoding="utf-8"))
        if all(os.stat(folder / name).st_mtime_ns == stamp for name, stamp in stamps.items()):
            return list(files)
    except (OSError, ValueError):
        pass  # not there, of a folder that is gone, or damaged: it is listed again
    stamps = {}
    try:
        files = sorted(_walk(folder, "", stamps))
    except OSError as error:  # no permission, or links in a circle
        raise InputError(f"{folder}: cannot be listed ({error}); correct its rights or links") from error
    if time.time() - max(stamps.values()) / 1e9 > SETTLED:
        _write(cached, json.dumps([stamps, files]))
    return files


def _walk(root: Path, below: str, stamps: dict[str, int]) -> Iterator[str]:
    """Yield the files below a folder, and note the time stamp of each folder before it is listed."""
    stamps[below] = os.stat(root / below).st_mtime_ns
    with os.scandir(root / below) as entries:
        for entry in entries:
            path = f"{below}{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(root, f"{path}/", stamps)
            else:
                yield path


def _write(path: Path, text: str) -> None:
    """Write a file so that it is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as aside:
        aside.write(text)
    os.replace(aside.name, path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a caption in UTF-8 ({error})") from error
