"""Annotation files (JSON, JSONL, CSV, TSV) as one list of records.

The kind of a file follows from its suffix. A JSON object of records becomes records with `sample_id` (its key), as in
LAVIS; a `.tsv` is split at tabs, which LAVIS doesn't do. Every error names the file and the place in it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lavis_lite.errors import InputError, MissingFileError

Record = dict[str, Any]


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises FileNotFoundError, or ValueError with file, line and column."""
    try:
        return json.loads(_read_text(Path(path)))
    except json.JSONDecodeError as error:
        raise _broken_json(path, error.lineno, error) from error


def read_records(path: str | Path) -> list[Record]:
    """The records of one annotation file, in file order."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _read_table(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".jsonl":
        content: Any = _read_json_lines(path)
    elif suffix == ".json":
        content = read_json(path)
    else:
        raise InputError(f"{path}: unknown kind of annotation file {suffix!r}; use .json, .jsonl, .csv or .tsv")
    return as_records(content, path)


def as_records(content: Any, path: str | Path) -> list[Record]:
    """JSON content as records: a list as it is, an object's values with their key as `sample_id`."""
    if isinstance(content, dict):
        return [{"sample_id": key, **(v if isinstance(v, dict) else {"data": v})} for key, v in content.items()]
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a list or an object of records, found {type(content).__name__}")
    for number, record in enumerate(content):
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise InputError(f"{place_of(path, number)} is a {kind}, expected an object with fields")
    return content


def place_of(path: str | Path, number: int) -> str:
    """Where a record is: the line, counted from 1, of a JSONL file, whose blank lines are no records; else its number.

    `path` is the file that has the record as its `number`th (from 0), or, as a text, words for where it's from.
    """
    if not isinstance(path, Path) or path.suffix.lower() != ".jsonl":
        return f"{path}: record {number}"
    lines = _read_text(path).split("\n")
    return f"{path}: line {[at for at, line in enumerate(lines, start=1) if line.strip()][number]}"


def require_fields(records: Iterable[Record], fields: Sequence[str], path: str | Path) -> None:
    """Raise ValueError for the first record that lacks a field; `"answer|answers"` stands for either of two.

    `path` is what `place_of` takes.
    """
    wanted = [field.split("|") for field in fields]
    for number, record in enumerate(records):
        for names in wanted:
            if all(record.get(name) is None for name in names):
                there = ", ".join(repr(key) for key in record) or "none"
                needed = " or ".join(repr(name) for name in names)
                raise InputError(f"{place_of(path, number)} has no field {needed}; fields there: {there}")


def add_instance_ids(records: list[Record]) -> list[Record]:
    """Give each record `instance_id`, its index as a string, unless it has such a field of its own."""
    for index, record in enumerate(records):
        record.setdefault("instance_id", str(index))
    return records


def load_annotations(paths: Sequence[str | Path], required: Sequence[str] = ()) -> list[Record]:
    """All files' records one after another, checked for the required fields; without instance ids."""
    records: list[Record] = []
    for path in map(Path, paths):
        part = read_records(path)
        require_fields(part, required, path)
        records += part
    return records


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MissingFileError(f"annotation file not found: {path}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from error


def _broken_json(path: str | Path, line: int, error: json.JSONDecodeError) -> InputError:
    return InputError(
        f"{path}: broken or truncated JSON at line {line}, column {error.colno}: {error.msg}. "
        "Correct it; a file that was downloaded can be deleted, and is then fetched again."
    )


def _read_json_lines(path: Path) -> list[Any]:
    rows = []
    # Not splitlines(): JSON may hold U+2028 unescaped, which is no end of line here.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise _broken_json(path, number, error) from error
    return rows


def _read_table(path: Path, delimiter: str) -> list[Record]:
    lines = _read_text(path).splitlines(keepends=True)
    records = []
    for record in csv.DictReader(lines, delimiter=delimiter, strict=True):
        if None in record:
            raise InputError(f"{path}: record {len(records)} has more columns than the header; quote the field")
        records.append(record)
    return records
