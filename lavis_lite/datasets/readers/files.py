"""The annotation files of one split, as readers see them, and where each record is from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import InputError, did_you_mean
from lavis_lite.common.records import Kind, Record, RecordCheck
from lavis_lite.datasets.annotations import as_records, check_records, read_json, read_records, section
from lavis_lite.datasets.folders import folder_records, metadata_file
from lavis_lite.datasets.parts import CUT_BY
from lavis_lite.datasets.readers.owners import owners_records
from lavis_lite.datasets.shard_tables import source_name
from lavis_lite.datasets.tables import Table, is_table

PLACE = "_place"
"""The key under which a reader notes (file, number of the record in it); the dataset removes it, and errors name it."""
VISUALS = ("image", "images", "image0", "image1", "file_name", "video")
"""Fields whose columns of a table may hold images; other columns of bytes are not read."""


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """The annotation files of one split: what a reader turns into records."""

    paths: Sequence[Path]
    split: str
    root: Path = Path()
    """The folder that the records' paths of images or videos start from."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our name of a field to the file's: `{caption: text}`."""
    check: RecordCheck = field(default_factory=RecordCheck)
    """The dataset's rule for blank texts, without fields."""
    loaded: Sequence[Record] | None = None
    """Records of a stream that were read already, in place of the content of the (one) path."""

    def records(self, check: RecordCheck | None = None) -> Iterator[Record]:
        """Yield the records of all files, their columns renamed, checked, with their places."""
        for path in self.paths:
            content, where = self.content(path)
            yield from self.located(as_records(content, where), where, check)

    def content(self, path: Path) -> tuple[Any, str | Path]:
        """Return the content of a file, and its name for `place_of`; of an owner's form its records (owners.py), of a
        table (tables.py) or a folder of images (folders.py) its records.

        Raises InputError for an owner's file that has no record of the split, or a damaged one.
        """
        if self.loaded is not None:
            return list(self.loaded), path
        if is_table(path):
            table = Table([path], split=self.split, columns={}, root=self.root)
            for ours in VISUALS:
                table.check_images(self.columns.get(ours, ours))
            return table.records(range(len(table))), str(path)
        if path.is_dir():
            return self._folder(path)
        content = read_json(path) if path.suffix.lower() == ".json" else read_records(path)
        try:
            records = owners_records(content, split=self.split, root=self.root)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        if records is None:
            return content, path
        if not records:
            raise InputError(f"{path}: has no records of the split {self.split!r} below {self.root}")
        return records, f"{path} (as read from its owner's form)"

    def _folder(self, folder: Path) -> tuple[list[Record], Path]:
        """Return the records of a folder of images, with paths below the root, and the file or folder they are from."""
        described = metadata_file(folder)
        content = folder_records(folder) if described is None else self.content(described)[0]
        for record in as_records(content, described or folder):
            file = record.pop("file_name", None) or record.get("image")
            if isinstance(file, str) and folder == self.root:
                record["image"] = file
            elif isinstance(file, str):
                record |= {"image": os.path.join(folder, file), CUT_BY: f"{folder.name}/{os.path.normpath(file)}"}
        return content, described or folder

    def are_tables(self) -> bool:
        """Return whether all files are tables, which are read where they are."""
        return all(map(is_table, self.paths))

    def table(self) -> Table:
        """Return the rows of all files, which are tables, with our names of columns."""
        table = Table(self.paths, split=self.split, columns=self.columns, root=self.root)
        for ours in VISUALS:
            table.check_images(ours)
        return table

    def located(self, records: list[Record], where: str | Path, check: RecordCheck | None = None) -> Iterator[Record]:
        """Yield the records of one file, their columns renamed, checked, with their places."""
        records = rename_columns(records, self.columns, where) if self.columns else records
        return with_places(records if check is None else check_records(records, check, where), where)

    def section(self, content: dict[str, Any], name: str, path: Path, check: RecordCheck) -> Iterator[Record]:
        """Yield the records under one key of a JSON file, checked, with their places."""
        return with_places(section(content, name, path, check), f"{path} ({name})")

    def needs(self, *required: str, **fields: Kind) -> RecordCheck:
        """Return the check of records that must have the required fields, and whose fields are of these kinds."""
        return replace(self.check, required=required, fields=fields)

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))


Reader = Callable[[SplitFiles], Iterable[Record]]


def with_places(records: Iterable[Record], where: str | Path) -> Iterator[Record]:
    """Yield the records with their places: `where` and their number from 0."""
    for number, record in enumerate(records):
        record[PLACE] = (where, number)
        yield record


def derived(row: Record, **fields: Any) -> Record:
    """Return a record of these fields at the place of the row that it is made of."""
    noted = {key: row[key] for key in (PLACE, CUT_BY) if key in row}
    return {**fields, **noted}


def identified(reader: Reader, key: str) -> Reader:
    """Return the reader with the field `key` of each record as its `instance_id`, as text.

    Raises InputError for a record without the field.
    """

    def read(files: SplitFiles) -> Iterator[Record]:
        for number, record in enumerate(reader(files)):
            if record.get(key) is None:
                where, number = record.get(PLACE, (str(files), number))
                fields = ", ".join(name for name in record if name != PLACE)
                raise InputError(
                    f"{where}: record {number}: build_info.instance_id_key: no field {key!r}, there are {fields}"
                )
            yield record | {"instance_id": str(record[key])}

    return read


def rename_columns(records: list[Record], columns: Mapping[str, str], path: str | Path) -> list[Record]:
    """Return the records with our names of fields for the file's. Raises InputError if no record has such a field."""
    for ours, theirs in columns.items():
        if not any(theirs in record for record in records):
            name = source_name(Path(path))
            raise InputError(
                f"{name}: columns.{ours}: no record has a field {theirs!r}. {did_you_mean(theirs, records[0])}"
            )
    renamed = set(columns.values())
    return [
        {key: value for key, value in record.items() if key not in renamed}
        | {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
        for record in records
    ]
