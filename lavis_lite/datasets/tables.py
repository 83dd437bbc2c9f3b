"""Tables of records (parquet, Arrow, folders of `datasets`) that are read where they are: memory-mapped, row by row.

14 million records then cost a few hundred megabytes: some integers per sample. `datasets` does the reading. It
converts parquet once into Arrow files in the cache, since single rows of parquet cannot be read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from lavis_lite.common.errors import InputError, UnreadableSample, did_you_mean
from lavis_lite.common.records import Record, StoredImage
from lavis_lite.common.sources import download
from lavis_lite.datasets.arrow_files import check_end
from lavis_lite.datasets.hub import bars_on_a_terminal, datasets_library
from lavis_lite.datasets.image_digests import ImageDigests
from lavis_lite.datasets.shard_tables import is_shard_table, sample_place, source_name

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SUFFIXES = (".parquet", ".arrow")
CHUNK = 1000
"""Rows that are made into records at a time."""


def is_table(path: Path) -> bool:
    """Return whether a path is a parquet or Arrow file, or a folder that `save_to_disk` wrote."""
    return path.suffix.lower() in SUFFIXES or is_saved(path)


def is_saved(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`, of one split or of several."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_tables(paths: Sequence[Path], *, split: str) -> Dataset:
    """Return the rows of several tables, one after another. InputError for a damaged one, and for different columns."""
    library = datasets_library()
    paths = with_rows(paths)
    if all(map(_is_parquet, paths)):
        return _converted("parquet", paths)
    parts = [_open(path, split) for path in paths]
    if len(parts) == 1:
        return parts[0]
    try:
        joined: Dataset = library.concatenate_datasets(parts)
    except ValueError as error:
        raise InputError(f"{_different(paths, [part.features.arrow_schema for part in parts]) or error}") from error
    return joined


def with_rows(paths: Sequence[Path]) -> list[Path]:
    """Return the tables without the parquet files that have no rows, as several writers leave them.

    Raises InputError for a damaged parquet file, for columns of different kinds, and if none has rows.
    """
    import pyarrow as pa
    import pyarrow.parquet

    parts: dict[Path, pa.Schema] = {}
    for path in filter(_is_parquet, paths):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if file.metadata.num_rows:
                    parts[path] = file.schema_arrow
                names = file.schema_arrow.names
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: is not a parquet file, or is cut off ({error}); fetch it again") from error
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{path}: names the column {twice[0]!r} twice; rename one, or leave it out")
    if problem := _different([*parts], [*parts.values()]):
        raise InputError(problem)
    found = [path for path in paths if path in parts or not _is_parquet(path)]
    if not found:
        raise InputError(f"{paths[0]}: holds no records; fill it, or take it out of build_info.annotations")
    return found


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _open(path: Path, split: str) -> Dataset:
    if is_saved(path):
        return _from_disk(path, split)
    if _is_parquet(path):
        return _converted("parquet", [path])
    import pyarrow as pa

    check_end(path)
    try:
        opened: Dataset = datasets_library().Dataset.from_file(str(path))
    except (pa.ArrowInvalid, OSError):  # a file with an index at its end, not a stream: it is copied as one
        return _converted("arrow", [path])
    return opened


def _from_disk(path: Path, split: str) -> Dataset:
    """Return what `save_to_disk` wrote; of several splits that of our split's name."""
    library = datasets_library()
    try:
        found = library.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: is not a whole folder of `save_to_disk` ({error}); write it again") from error
    if isinstance(found, library.DatasetDict):
        if split not in found:
            raise InputError(f"{path}: has no split {split!r}; name the folder of one of {', '.join(found)}")
        found = found[split]
    opened: Dataset = found
    return opened


def _converted(kind: str, paths: Sequence[Path]) -> Dataset:
    """Return tables that `datasets` has to convert into Arrow files in our cache; they are converted once."""
    library = datasets_library()
    cache = str(download.cache_dir() / "tables")
    try:
        with bars_on_a_terminal():
            found: Dataset = library.load_dataset(
                kind, data_files=[str(path.absolute()) for path in paths], split="train", cache_dir=cache
            )
    except FileNotFoundError as error:
        raise InputError(f"{paths[0]}: {error}") from error
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        names = ", ".join(map(str, paths[:3]))
        cause = error.__cause__ or error
        raise InputError(f"{names}: cannot be read as {kind} ({str(cause).partition(chr(10))[0]})") from error
    return found


def _different(paths: Sequence[Path], schemas: Sequence[pa.Schema]) -> str | None:
    """Return the message about the first column that the first table lacks, or has of another kind; None without one.

    Note: a column that another table lacks is null there. Texts would be made of numbers, so their kinds are compared.
    """
    for path, schema in zip(paths[1:], schemas[1:], strict=True):
        for name in schema.names:
            there = name in schemas[0].names
            kinds = [schemas[0].field(name).type if there else "missing", schema.field(name).type]
            if not there or (_kind_of(kinds[0]) != _kind_of(kinds[1]) and "null" not in map(str, kinds)):
                problem = f"column {name!r} is {kinds[0]} in {paths[0]}, and {kinds[1]} in {path}"
                return f"{problem}: give all tables of a split the same columns"
    return None


def _kind_of(kind: pa.DataType) -> str:
    """Return the kind of a column: one name for all types of texts, one for those of numbers ..."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    words = {
        "number": pa.types.is_integer(kind) or pa.types.is_floating(kind),
        "text": pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind),
        "bytes": pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind),
        "list": pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind),
        "object": pa.types.is_struct(kind),
    }
    return next((word for word, is_one in words.items() if is_one), str(kind))


@dataclass(frozen=True)
class TableImage(StoredImage):
    """The image in one row of a table; it is read at access."""

    images: Dataset
    column: str
    row: int
    name: str
    """The tables, for messages."""
    root: Path
    digests: ImageDigests

    def digest(self) -> bytes:
        return self.digests.of(self.row, lambda row: replace(self, row=row).read())

    def read(self) -> bytes:
        (value,) = self.images[self.row][self.column].to_pylist()
        if isinstance(value, dict):  # as `datasets` stores images: bytes, or the path of a file
            if value.get("bytes") is None and value.get("path"):
                return (self.root / value["path"]).read_bytes()
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise UnreadableSample(f"{self}: holds no image")
        return value

    def __str__(self) -> str:
        return f"{self.name}: row {self.row}, column {self.column!r}"

    __repr__ = __str__


class Table:
    """The rows of a split's tables, with our names of columns; images inside are read only when they are opened."""

    def __init__(self, paths: Sequence[Path], *, split: str, columns: Mapping[str, str], root: Path) -> None:
        self.paths, self.split, self.root = with_rows(paths), split, root
        self.name = ", ".join(map(source_name, paths[:3])) + (", ..." if len(paths) > 3 else "")
        data = open_tables(paths, split=split).with_format("arrow")
        if not len(data):
            raise InputError(f"{self.name}: holds no records; fill it, or take it out of build_info.annotations")
        self.num_rows = len(data)
        names = our_names(data.column_names, columns, self.name)
        stored = stored_columns(data)
        labels = {name: feature.names for name, feature in data.features.items() if is_label(feature)}
        self.classes: dict[str, list[str]] = {ours: labels[name] for ours, name in names.items() if name in labels}
        """The names of the classes of our fields, where a table stores their numbers."""
        self.names = {ours: theirs for ours, theirs in names.items() if theirs not in stored}
        """Our names of the columns that are read for a record, and the table's."""
        self.stored = {ours: theirs for ours, theirs in names.items() if theirs in stored}
        """Our names of the columns of images, and the table's."""
        self.fields: Dataset = data.select_columns(list(dict.fromkeys(self.names.values())))
        self.images: Dataset = data.select_columns(list(dict.fromkeys(self.stored.values())))
        self.digests = {ours: ImageDigests(self.images, theirs, self.name) for ours, theirs in self.stored.items()}

    def __len__(self) -> int:
        return self.num_rows

    def column(self, name: str) -> pa.ChunkedArray | None:
        """Return a column by our name, memory-mapped; None if the table lacks it, or if it holds images."""
        if name not in self.names:
            return None
        found: pa.ChunkedArray = self.fields[:][self.names[name]]
        return found

    def columns(self, start: int, stop: int) -> dict[str, pa.Array]:
        """Return the columns of some rows by our names, without images; of labels, a number below 0 is null."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self.names:
            return {}
        table = self.fields[start:stop]
        found = {ours: table[theirs].combine_chunks() for ours, theirs in self.names.items()}
        for ours, values in found.items():
            if pa.types.is_fixed_size_list(values.type):
                found[ours] = values.cast(pa.list_(values.type.value_type))
        for ours in self.classes:
            found[ours] = pc.if_else(pc.greater_equal(found[ours], 0), found[ours], None)
        return found

    def records(self, rows: Iterable[int]) -> list[Record]:
        """Return the records of these rows, with images that are not read yet."""
        numbers = [int(row) for row in rows]
        low, high = min(numbers, default=0), max(numbers, default=0) + 1
        if high - low <= 2 * len(numbers):
            near = self._pylist(slice(low, high), high - low)
            found = [near[number - low] for number in numbers]
        else:
            found = self._pylist(numbers, len(numbers))
        return [self._record(row, number) for row, number in zip(found, numbers, strict=True)]

    def identity(self) -> list[str]:
        """Return the columns and, with size and time of change, the files on disk."""
        files = [Path(file["filename"]) for file in (self.fields.cache_files or self.images.cache_files)]
        states = [(file, file.stat()) for file in files]
        return [*map(str, self.names.items()), *(f"{file} {st.st_size} {st.st_mtime_ns}" for file, st in states)]

    def place(self, row: int) -> str:
        """Return the location of a row, for messages: the table and the row in it, from 0; of shards the sample."""
        if is_shard_table(self.paths[0]):
            return sample_place(self.paths[0], row)
        if len(self.paths) > 1:
            for path in self.paths:
                if row < (count := len(_open(path, self.split))):
                    return f"{path}: row {row}"
                row -= count
        return f"{self.name}: row {row}"

    def _record(self, row: Record, number: int) -> Record:
        record = {ours: row[theirs] for ours, theirs in self.names.items()}
        for ours, names in self.classes.items():
            label = record[ours]
            record[ours] = None if label is None or label < 0 else names[label]
        for ours, theirs in self.stored.items():
            record[ours] = TableImage(self.images, theirs, number, self.name, self.root, self.digests[ours])
        return record

    def _pylist(self, rows: slice | list[int], count: int) -> list[Record]:
        if not self.names:
            return [{}] * count
        found: list[Record] = self.fields[rows].to_pylist()
        return found

    def check_images(self, ours: str) -> None:
        """Raise InputError, with the number and the first, if a field's column is one of images, and rows hold none."""
        import pyarrow.compute as pc

        if ours not in self.stored:
            return
        theirs = self.stored[ours]
        values = self.images[:][theirs]
        is_empty = pc.is_null(values)
        if str(values.type).startswith("struct"):
            parts = [pc.is_null(pc.struct_field(values, name)) for name in _part_names(values.type)]
            is_empty = pc.or_(is_empty, functools.reduce(pc.and_, parts))
        count = pc.sum(is_empty).as_py()
        if count:
            first = pc.index(is_empty, True).as_py()
            raise InputError(
                f"{self.name}: column {theirs!r} ({ours}) is null in {count:,} of {len(values):,} rows, first in row "
                f"{first}; remove these rows, or fill them in"
            )


def our_names(theirs: Sequence[str], columns: Mapping[str, str], name: str) -> dict[str, str]:
    """Return our name of each column, and the table's. InputError for a column that is not there."""
    for ours, other in columns.items():
        if other not in theirs:
            raise InputError(f"{name}: columns.{ours}: unknown column {other!r}. {did_you_mean(other, theirs)}")
    return {one: one for one in theirs if one not in columns.values()} | dict(columns)


def is_label(feature: object) -> bool:
    """Return whether a column holds numbers of named classes."""
    return isinstance(feature, datasets_library().ClassLabel)


def stored_columns(data: Dataset) -> list[str]:
    """Return the columns that hold images: bytes, or {bytes, path} as `datasets` stores them."""
    import pyarrow as pa

    kinds = {field.name: field.type for field in data.features.arrow_schema}
    return [
        name
        for name, kind in kinds.items()
        if pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or (pa.types.is_struct(kind) and "bytes" in _part_names(kind))
    ]


def _part_names(kind: pa.StructType) -> list[str]:
    """Return those names of a struct's fields that an image has."""
    return [name for name in ("bytes", "path") if kind.get_field_index(name) >= 0]


class TableRecords(Sequence[Record]):
    """The samples of a table as records that are made at access: the row of each, and its item of a list.

    `item_field` names the field of which a sample has one item, such as `caption`; the item -1 stands for all of it.
    """

    def __init__(
        self, table: Table, rows: np.ndarray, items: np.ndarray, *, item_field: str = "", numbers: range | None = None
    ) -> None:
        self.table, self.rows, self.items, self.item_field = table, rows, items, item_field
        self.numbers = range(len(rows)) if numbers is None else numbers
        """The samples, of which a slice has a part."""

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> TableRecords: ...
    def __getitem__(self, index: int | slice) -> Record | TableRecords:
        if isinstance(index, slice):
            numbers = self.numbers[index]
            return TableRecords(self.table, self.rows, self.items, item_field=self.item_field, numbers=numbers)
        return self._records(range(self.numbers[index], self.numbers[index] + 1))[0]

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self.numbers), CHUNK):
            yield from self._records(self.numbers[start : start + CHUNK])

    def place(self, number: int) -> str:
        """Return the location of a sample, for messages."""
        return self.table.place(int(self.rows[number]))

    def _records(self, numbers: range) -> list[Record]:
        samples = np.asarray(numbers)
        records = self.table.records(self.rows[samples])
        for number, item, record in zip(numbers, self.items[samples], records, strict=True):
            if item >= 0:
                record[self.item_field] = record[self.item_field][item]
            if record.get("instance_id") is None:
                record["instance_id"] = str(number)
        return records
