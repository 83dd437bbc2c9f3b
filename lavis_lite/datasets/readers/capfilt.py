"""The texts that the task `capfilt` wrote: a manifest, and shards of records {image, caption, source, itm, itc, kept}.

The manifest is a JSON file beside the shards. It says with which settings they were made, where their images are, and,
once all of them are there, their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.common.records import Record
from lavis_lite.datasets.annotations import read_json
from lavis_lite.datasets.parts import CUT_BY
from lavis_lite.datasets.readers.files import SplitFiles

KIND = "lavis_lite capfilt 1"
"""Goes up when the form of the files changes."""


class Manifest(TypedDict):
    """The content of a manifest."""

    kind: str
    image_root: str
    """The folder that the records' paths of images start from; empty if the images are in tables."""
    settings: dict[str, Any]
    """Settings by which the texts were made; a run with others does not continue these files."""
    shards: list[str]
    """File names, in the order of the samples; empty until all of them are there."""


def read_manifest(path: Path) -> Manifest:
    """Return the content of a manifest. InputError if it is another file."""
    content = read_json(path)
    keys = Manifest.__annotations__.keys()
    if not isinstance(content, dict) or content.get("kind") != KIND or not content.keys() >= keys:
        raise InputError(f"{path}: is not a manifest of the task capfilt ({KIND}): name its manifest.json")
    return Manifest(**{key: content[key] for key in keys})  # type: ignore[typeddict-item]


def finished_manifest(path: Path) -> Manifest:
    """Return the content of a manifest with all of its shards. InputError if some are still to be written."""
    manifest = read_manifest(path)
    if not manifest["shards"]:
        raise InputError(f"{path}: the task capfilt has not finished these texts: run it again to complete them")
    return manifest


def read_shard(path: Path) -> Iterator[Record]:
    """Yield the records of a shard, `.jsonl` or `.parquet`. InputError if it is damaged."""
    if path.suffix == ".parquet":
        yield from _parquet_records(path)
        return
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{path}: line {number} is damaged ({error}): delete the file, and run capfilt again"
                    ) from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}): run capfilt again, which writes it anew"
        ) from error


def _parquet_records(path: Path) -> Iterator[Record]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingPackageError(f"{path}: parquet files need pyarrow: pip install 'lavis-lite[data]'") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                yield {key: value for key, value in record.items() if value is not None}
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}): delete it, and run capfilt again") from error


def read_texts(files: SplitFiles) -> Iterator[Record]:
    """Yield the texts of each manifest, with absolute paths of images: the reader `capfilt`."""
    for path in files.paths:
        manifest = finished_manifest(path)
        if not manifest["image_root"]:
            raise InputError(f"{path}: the images of its texts are in tables: train on the .tar files beside it")
        root = Path(manifest["image_root"])
        for name in manifest["shards"]:
            records = [
                {**record, "image": str(root / record["image"]), CUT_BY: record["image"]}
                for record in read_shard(path.parent / name)
            ]
            yield from files.located(records, path.parent / name)
