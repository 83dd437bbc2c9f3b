"""The samples of many shards as one Arrow table in the cache, so that they are memory-mapped, not loaded.

Columns are the fields of the records. JSON fields need not be alike in all samples: a field that some lack is null
there, texts and lists of texts become lists, and values of other different types become texts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

from lavis_lite.common.bounds import one_of
from lavis_lite.common.checkpoint import atomic_write
from lavis_lite.common.members import find_member
from lavis_lite.common.records import Record
from lavis_lite.datasets.hub import datasets_library
from lavis_lite.datasets.shard_records import KEY, TABLE_SUFFIX
from lavis_lite.datasets.shards import IncompleteSamples, index_all, index_path, shard_records

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

DIGEST, LEFT_OUT = b"lavis_lite.digest", b"lavis_lite.left_out"
"""Keys of a table's metadata: the digest of its content, without the place of the shards; what was left out."""
SHOWN = 3
MIXED = (ValueError, TypeError, OverflowError)
"""Errors of Arrow about values of different types, and about numbers of more than 64 bits."""


def shard_table(paths: Sequence[Path], incomplete: IncompleteSamples) -> Path:
    """Return the table of the samples of these shards, made if it is not in the cache.

    Raises InputError as `shard_records`, MissingPackageError without the package that reads tables.
    """
    datasets_library()
    names = [index_path(path) for path in paths]
    parts = [one_of("incomplete_samples", incomplete, get_args(IncompleteSamples)), *(name.name for name in names)]
    key = hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()
    table = names[0].with_name(f"{paths[0].stem[:80]}-{len(paths)}-{key}{TABLE_SUFFIX}")
    if not table.is_file():
        _make_table(paths, incomplete, table)
    left_out = _metadata(table)[LEFT_OUT].decode()
    if left_out:
        _warn_once(f"left out of the shards: {left_out}")
    return table


def _make_table(paths: Sequence[Path], incomplete: IncompleteSamples, table: Path) -> None:
    import pyarrow as pa

    index_all(paths)
    schema, digest, left_out = pa.schema([]), hashlib.blake2b(digest_size=8), []
    for path in paths:
        records, problem = shard_records(path, incomplete)
        left_out += [problem] if problem else []
        schema = _joined(schema, records)
        place = json.dumps(os.fspath(path.absolute()))[1:-1]
        digest.update(json.dumps(records).replace(place, "").encode())
    more = f" | and {len(left_out) - SHOWN:,} more shards" if len(left_out) > SHOWN else ""
    schema = schema.with_metadata({DIGEST: digest.hexdigest(), LEFT_OUT: " | ".join(left_out[:SHOWN]) + more})

    def write(file: BinaryIO) -> None:
        with pa.ipc.new_stream(file, schema) as writer:
            for path in paths:
                writer.write_table(_table(shard_records(path, incomplete)[0], schema))

    atomic_write(table, write)


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def is_shard_table(path: Path) -> bool:
    """Return whether a file is a table of shards."""
    return path.name.endswith(TABLE_SUFFIX)


def content_digest(path: Path) -> bytes | None:
    """Return the digest of a table of shards; None for any other file."""
    return _metadata(path)[DIGEST] if is_shard_table(path) else None


def sample_place(table: Path, row: int) -> str:
    """Return the location of a sample, for messages: its shard, if it has a member that is not a text, and its key."""
    import pyarrow as pa

    with pa.memory_map(os.fspath(table)) as file:
        (record,) = pa.ipc.open_stream(file).read_all().slice(row, 1).to_pylist()
    values = [record.get("image"), *record.values()]
    members = [find_member(value) for value in values if isinstance(value, str)]
    shard = next((f"{member.shard}: " for member in members if member), "")
    return f"{shard}sample {record[KEY]}"


def source_name(path: Path) -> str:
    """Return the name of a file, for messages; of a table of shards the first shard's, where a member says it."""
    if not is_shard_table(path):
        return str(path)
    shard, _, _ = sample_place(path, 0).rpartition("sample ")
    return shard.removesuffix(": ") or str(path)


def _metadata(table: Path) -> dict[bytes, bytes]:
    import pyarrow as pa

    with pa.OSFile(os.fspath(table)) as file:
        found: dict[bytes, bytes] = pa.ipc.open_stream(file).schema.metadata
    return found


def _joined(schema: pa.Schema, records: Sequence[Record]) -> pa.Schema:
    """Return the schema with the fields of further records."""
    import pyarrow as pa

    kinds = dict(zip(schema.names, schema.types, strict=True))
    for name in dict.fromkeys(key for record in records for key in record):
        kinds[name] = _common(kinds.get(name, pa.null()), _kind([record.get(name) for record in records]))
    return pa.schema(list(kinds.items()))


def _kind(values: Sequence[Any]) -> pa.DataType:
    import pyarrow as pa

    if len({type(value) for value in values if value is not None}) < 2:  # Arrow takes the first type for all
        with contextlib.suppress(*MIXED):
            return pa.array(values).type
    return functools.reduce(_common, map(_kind_of_one, values))


def _kind_of_one(value: Any) -> pa.DataType:
    import pyarrow as pa

    try:
        return pa.array([value]).type
    except MIXED:
        return pa.string()


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return the type that holds the values of both."""
    import pyarrow as pa

    texts, lists = {pa.string(), pa.null()}, {pa.list_(pa.string()), pa.list_(pa.null())}
    if {one, other} <= texts | lists and {one, other} & lists:
        return pa.list_(pa.string())
    try:
        fields = [pa.schema([("field", kind)]) for kind in (one, other)]
        return pa.unify_schemas(fields, promote_options="permissive").field("field").type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()


def _table(records: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return the records as rows of the schema."""
    import pyarrow as pa

    records = list(records)
    columns = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        values = [record.get(name) for record in records]
        if pa.types.is_list(kind):  # Arrow would make a list of a text's characters
            values = [[value] if isinstance(value, str) else value for value in values]
        try:
            columns.append(pa.array(values, kind))
        except MIXED:  # of another type than in other samples
            columns.append(pa.array([_as(value, kind) for value in values], kind))
    return pa.Table.from_arrays(columns, schema=schema)


def _as(value: Any, kind: pa.DataType) -> Any:
    import pyarrow as pa

    if kind == pa.string() and not isinstance(value, str | None):
        return json.dumps(value, ensure_ascii=False)
    if kind == pa.list_(pa.string()) and value is not None:
        return [_as(one, pa.string()) for one in (value if isinstance(value, list) else [value])]
    return float(value) if kind == pa.float64() and isinstance(value, int) else value
