"""Annotation files of text (JSON, JSONL, CSV, TSV) as one list of records.

The kind of a file follows from its suffix. A JSON object of records becomes records with `sample_id` (its key), as in
LAVIS; a `.tsv` is split at tabs, unlike there, and a `.csv` at the mark that its header has. Every error names the file
and the place in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.records import Record, RecordCheck, shown
from lavis_lite.datasets.folders import folder_records
from lavis_lite.datasets.shard_records import TABLE_SUFFIX
from lavis_lite.datasets.text_tables import TABLES, table_rows


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raises FileNotFoundError, or InputError with file, line and column."""
    text = _read_text(Path(path))
    if re.match(r"\{[^\n]*\}\s*\n\s*\{", text):  # one object per line, as NLVR2's owners call it .json too
        return _json_lines(text, path)
    return _parsed(text, path)


def _json_lines(text: str, path: str | Path) -> list[Any]:
    # Not splitlines(): JSON may hold U+2028 unescaped, which does not end a line here.
    return [_parsed(line, path, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def read_records(path: str | Path) -> list[Record]:
    """Return the records of one annotation file, in file order. Raises InputError if there are none."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in TABLES:
        content: Any = [record for _, record in table_rows(_read_text(path), path)]
    elif suffix == ".jsonl":
        content = _json_lines(_read_text(path), path)
    elif suffix == ".token":
        content = _token_rows(path)
    elif suffix == ".json":
        content = read_json(path)
    else:
        known = ".json, .jsonl, .csv, .tsv, .token, .parquet, .arrow, or a folder"
        raise InputError(f"{path}: unknown kind of annotation file {suffix!r}; use {known}")
    return as_records(content, path)


def as_records(content: Any, path: str | Path) -> list[Record]:
    """Return JSON content as records: a list as it is, an object's values with their key as `sample_id`."""
    if isinstance(content, dict):
        content = [{"sample_id": key, **(v if isinstance(v, dict) else {"data": v})} for key, v in content.items()]
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a list or an object of records, found {shown(content)}")
    if not content:
        raise InputError(f"{path}: holds no records; fill it, or take it out of build_info.annotations")
    for number, record in enumerate(content):
        if not isinstance(record, dict):
            raise InputError(f"{place_of(path, number)} is a {type(record).__name__}, expected an object with fields")
    return content


def place_of(path: str | Path, number: int) -> str:
    """Return where a record is: the line, counted from 1, of a JSONL file or a table; else its number, from 0.

    `path` is the file that has the record as its `number`th (from 0), or a text that describes its source.
    """
    if str(path).endswith(TABLE_SUFFIX):
        from lavis_lite.datasets.shard_tables import sample_place  # which loads torch

        return sample_place(Path(path), number)
    if isinstance(path, Path) and path.is_dir():
        return f"{path}: {folder_records(path)[number]['image']}"
    suffix = path.suffix.lower() if isinstance(path, Path) else ""
    if isinstance(path, str) or suffix not in (".jsonl", *TABLES):
        return f"{path}: record {number}"
    if suffix == ".jsonl":
        lines = [at for at, line in enumerate(_read_text(path).split("\n"), start=1) if line.strip()]
    else:
        lines = [line for line, _ in table_rows(_read_text(path), path)]
    return f"{path}: line {lines[number]}"


def check_records(records: list[Record], check: RecordCheck, path: str | Path) -> list[Record]:
    """Check the records and return them; `path` is as for `place_of`."""
    check(records, partial(place_of, path))
    return records


def section(content: dict[str, Any], name: str, path: str | Path, check: RecordCheck) -> list[Record]:
    """Return the records under one key of a JSON file, such as the `annotations` of a COCO file, checked."""
    found = content.get(name)
    if not isinstance(found, list):
        raise InputError(f"{path}: expected a list of records under {name!r}, found {shown(found)}")
    where = f"{path} ({name})"
    return check_records(as_records(found, where), check, where)


def check_unique(records: Sequence[Record], name: str, place: Callable[[int], str]) -> None:
    """Raise InputError, with both places, if two records have the same `name`; compared as texts, without null."""
    first: dict[str, int] = {}
    for number, record in enumerate(records):
        value = record.get(name)
        if value is not None and first.setdefault(str(value), number) != number:
            raise InputError(
                f"{place(first[str(value)])} and {place(number)} have the same {name} {value!r}; give each its own"
            )


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MissingFileError(f"annotation file not found: {path}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as an annotation file in UTF-8 ({error})") from error
    if not text.strip():
        raise InputError(f"{path}: is empty; an annotation file holds records")
    return text


def _parsed(text: str, path: str | Path, line: int | None = None) -> Any:
    """Return the value of a JSON text: a file, or one line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: broken or truncated JSON at line {line or error.lineno}, column {error.colno}: {error.msg}. "
            "Correct it, or delete and fetch it again; a file with one object per line is called .jsonl"
        ) from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: JSON at line {line or 1} that cannot be read ({error})") from error


def _token_rows(path: Path) -> list[Record]:
    """Return the captions of Flickr30K's own file, lines of <image>#<number>, a tab and the caption."""
    records = []
    for number, line in enumerate(_read_text(path).rstrip("\n").split("\n"), start=1):
        name, tab, caption = line.partition("\t")
        image, mark, _ = name.rpartition("#")
        if not (tab and mark and image):
            raise InputError(
                f"{path}: line {number}: expected <image>#<number>, a tab and a caption, got {shown(line)}"
            )
        records.append({"image": image, "caption": caption})
    return records
