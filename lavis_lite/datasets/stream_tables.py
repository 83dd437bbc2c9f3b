"""Streams of rows by the library `datasets`: data sets of the hub, local folders that it knows, and parquet files.

Nothing is converted or kept. A data set is divided as `datasets` divides it, by files; each part is read like a shard,
`hf://owner/name:train#3-of-16`. A run is resumed at a row by reading the rows of its part before it again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec  # type: ignore[import-untyped]

from lavis_lite.common.errors import InputError, MissingFileError, UnreachableError
from lavis_lite.common.records import Record
from lavis_lite.common.sources import reach
from lavis_lite.datasets.hub import datasets_library, is_hub, parse
from lavis_lite.datasets.shard_records import KEY
from lavis_lite.datasets.stream_shards import BROKEN, Loaded, LoadedFile, read_shard

if TYPE_CHECKING:
    from datasets import IterableDataset

_PART = re.compile(r"(?P<address>.+)#(?P<number>\d+)-of-(?P<count>\d+)")


def is_rows(name: str) -> bool:
    """Return whether a storage of a stream is of rows: a data set of the hub, a folder, or a parquet file."""
    is_shard = name.lower().endswith(".tar")
    return (is_hub(name) and not is_shard) or name.lower().endswith(".parquet") or Path(name).is_dir()


def is_part(name: str) -> bool:
    """Return whether a name is that of a part of rows."""
    return _PART.fullmatch(name) is not None


def part_names(address: str, split: str, *, where: str) -> list[str]:
    """Return the names of the parts of rows, as `datasets` divides them; none of a local parquet file without rows,
    which it cannot read.

    Raises InputError, MissingFileError or UnreachableError if they cannot be opened.
    """
    if is_hub(address):
        hub_split = parse(address, split, where=where)
        if "[" in hub_split.split:
            raise InputError(f"{where}: {address}: a slice cannot be streamed; leave it out, or the key `stream`")
        if problem := reach.hub_problem():
            kind = UnreachableError if reach.may_ask() else MissingFileError
            raise kind(f"{where}: {address} is read as a stream from the hub; {problem}")
        address = str(hub_split)
    elif not address.lower().endswith(".parquet"):
        address = f"{address}:{split}"
    elif "://" not in address and not _has_rows(address, where):
        return []
    try:
        count = _opened(address).num_shards
    except _broken() as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{where}: {address} cannot be opened as a stream by `datasets` ({reason})") from error
    return [f"{address}#{number}-of-{count}" for number in range(count)]


def _has_rows(path: str, where: str) -> bool:
    """Return whether a parquet file has rows. Raises InputError if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            num_rows: int = file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where}: {path}: is not a parquet file, or is cut off ({error}); fetch it again") from error
    return num_rows > 0


def read_part(name: str) -> Iterator[Loaded]:
    """Yield the samples of a part of rows, or of a shard, in their order, and last a problem if it cannot be read.

    Note: in a loader worker, `iter` of a data set of `datasets` gives the worker's share of its rows alone. A part is a
    worker's share already; of one file, all workers but the first would get nothing.
    """
    match = _PART.fullmatch(name)
    if match is None:
        yield from read_shard(name)
        return
    number = -1
    try:
        rows = _opened(match["address"]).shard(int(match["count"]), int(match["number"]))
        labels = {key: kind.names for key, kind in (rows.features or {}).items() if _is_label(kind)}
        for number, batch in enumerate(rows.iter(batch_size=1)):  # not iter(rows): see above
            row = {key: value for key, (value,) in batch.items()}
            yield Loaded(name, {KEY: str(number), **_record(row, labels, f"{name} row {number}")})
    except _broken() as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        yield Loaded(name, {}, f"{name}: damaged or unreachable after {number + 1:,} rows ({reason})")


@functools.lru_cache(maxsize=8)
def _opened(address: str) -> IterableDataset:
    """Return the rows of an address, images not decoded."""
    library = datasets_library()
    streaming: dict[str, Any] = {"streaming": True}
    if is_hub(address):
        one = parse(address, "", where=address)
        found = library.load_dataset(one.repo, one.config, split=one.split, revision=one.revision, **streaming)
    elif address.lower().endswith(".parquet"):
        found = library.load_dataset("parquet", data_files=[address], split="train", **streaming)
    else:
        folder, _, split = address.rpartition(":")
        found = library.load_dataset(folder, split=split, **streaming)
    for name, feature in (found.features or {}).items():
        if (undecoded := _undecoded(feature)) is not feature:
            found = found.cast_column(name, undecoded)
    opened: IterableDataset = found
    return opened


def _record(row: Record, labels: dict[str, list[str]], place: str) -> Record:
    """Return a row with names in place of numbers of classes, and loaded files in place of bytes."""
    record = {}
    for name, value in row.items():
        if name in labels:
            value = labels[name][value] if value is not None and value >= 0 else None
        record[name] = _loaded(value, f"{place}, column {name!r}")
    return record


def _undecoded(feature: Any) -> Any:
    """Return the type of a column whose images, also those of lists, are not decoded; a column without any as it is."""
    library = datasets_library()
    if isinstance(feature, library.Image | library.Audio):
        return type(feature)(decode=False)
    if isinstance(feature, library.List) and (inner := _undecoded(feature.feature)) is not feature.feature:
        return library.List(inner, feature.length)
    return feature


def _loaded(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_loaded(one, place) for one in value]
    if isinstance(value, bytes):
        return LoadedFile(place, value)
    if not isinstance(value, dict) or not value.keys() >= {"bytes", "path"}:
        return value
    if value["bytes"] is not None:
        return LoadedFile(place, value["bytes"])
    if value["path"] is None:
        return None
    with fsspec.open(value["path"], "rb") as file:
        return LoadedFile(value["path"], file.read())


def _is_label(feature: object) -> bool:
    return isinstance(feature, datasets_library().ClassLabel)


def _broken() -> tuple[type[Exception], ...]:
    """Return the errors of `datasets`, and of what it reads with, about files."""
    import httpx
    import pyarrow as pa

    return (*BROKEN, datasets_library().exceptions.DatasetsError, httpx.HTTPError, pa.ArrowException)
