"""Rows of tables of text, `.csv` and `.tsv`.

A quotation mark that begins a cell encloses it, up to the next one that is not doubled, as in RFC 4180. Tables of
captions often mean none of it: in a `.tsv` of which every line has all columns, a mark that no other one ends in its
cell is part of the text. In other tables it would join rows, which is an error.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePath

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record, shown

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
TABLES = {".csv": ",", ".tsv": "\t"}
"""The suffixes of tables, and the separators of their columns."""
PEEKED = 20
"""Lines of a table that are looked at for its separator; a quoted field may have several."""
ADDRESSES = ("http://", "https://")
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}")

Row = tuple[int, Record]
"""The number of a row's first line, from 1, and its record."""


def table_rows(text: str, path: Path) -> list[Row]:
    """Return the rows of a table with a header, or of CC3M's and CC12M's addresses and captions without one.

    Raises InputError, with file and line, for a row that has not as many columns as the header, a quotation mark that
    is not ended or joins rows, and a header with another separator or one name twice.
    """
    first = text.partition("\n")[0].rstrip("\r").split("\t")
    if path.suffix.lower() == ".tsv" and len(first) == 2 and any(cell.startswith(ADDRESSES) for cell in first):
        return list(_address_rows(text, path))
    before = csv.field_size_limit(sys.maxsize // 2**32)  # a C long, which has 32 bits on some systems
    try:
        delimiter = _delimiter(text, path.suffix.lower())
        rows = _plain_rows(text) if delimiter == "\t" else None
        rows = list(_quoted_rows(text, path, delimiter)) if rows is None else rows
    finally:
        csv.field_size_limit(before)
    line, header = rows[0] if rows else (1, [])
    _check_header(header, path, line)
    records = []
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise InputError(
                f"{path}: line {line} has {len(row)} columns, not {len(header)} as the header; quote a field "
                "that holds the separator"
            )
        records.append((line, dict(zip(header, row, strict=True))))
    return records


def _address_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        cells = line.rstrip("\r").split("\t")
        urls = [cell for cell in cells if cell.startswith(ADDRESSES)]
        if len(cells) == 2 and urls:
            yield number, {"url": urls[-1], "caption": cells[1 - cells.index(urls[-1])]}
        elif line.strip():
            raise InputError(f"{path}: line {number}: expected an address, a tab and a caption, got {shown(line)}")


def _plain_rows(text: str) -> list[tuple[int, list[str]]] | None:
    """Return the lines of a table of tabs as rows, cells that are quoted as a whole without the marks; None if a line
    has other than the first one's number of columns, so that cells may hold tabs and line feeds.
    """
    rows: list[tuple[int, list[str]]] = []
    # Not splitlines(): a text may hold U+2028 or a form feed, which end no line here.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line:
            continue
        cells = line.split("\t")
        if "\r" in line or (rows and len(cells) != len(rows[0][1])) or len(cells) < 2:
            return None
        rows.append((number, [_unquoted(cell) for cell in cells] if '"' in line else cells))
    return rows


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell


def _quoted_rows(text: str, path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that the `csv` module reads. InputError for a mark that is not ended, or that joins rows."""
    lines = text.split("\n")
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    start = 1
    try:
        for row in reader:
            if reader.line_num > start and (joined := _joined(row, lines, start, reader.line_num, delimiter)):
                raise InputError(
                    f"{path}: line {start}: a quotation mark begins a cell and ends on line {reader.line_num}, though "
                    f"line {joined} is a row of its own: {_ADVICE}"
                )
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}: line {start} is not a row of a table ({error}): {_ADVICE}") from error


_ADVICE = (
    'enclose a cell that begins with a quotation mark in further ones, and double those inside ("""Hi"" he said"), or '
    "write a .jsonl file"
)


def _joined(row: Sequence[str], lines: Sequence[str], start: int, end: int, delimiter: str) -> int | None:
    """Return the number of a line inside the row, which has the lines `start` to `end`, that looks like a row: it has
    all columns, and a file or an address where the row has one; None without one.
    """
    for number in range(start + 1, end + 1):
        cells = next(csv.reader([lines[number - 1]], delimiter=delimiter), [])
        if len(cells) == len(row) and any(_are_alike(*pair) for pair in zip(row, cells, strict=True)):
            return number
    return None


def _are_alike(one: str, other: str) -> bool:
    """Return whether both cells are names of files of one kind, or both are addresses."""
    if one.startswith(ADDRESSES) and other.startswith(ADDRESSES):
        return True
    suffixes = [PurePath(cell).suffix.lower() for cell in (one, other)]
    return bool(_SUFFIX.fullmatch(suffixes[0])) and suffixes[0] == suffixes[1]


def _delimiter(text: str, suffix: str) -> str:
    """Return the separator of a table's columns: of a `.csv` the mark in its header that splits the first row into as
    many columns, a comma if there are several or none.
    """
    if suffix != ".csv":
        return TABLES[suffix]
    lines = text.split("\n", PEEKED)[:PEEKED]
    for mark in DELIMITERS:
        with contextlib.suppress(csv.Error, ValueError):  # ValueError: fewer than two rows
            header, row = islice(filter(None, csv.reader(lines, delimiter=mark)), 2)
            if len(header) == len(row) > 1:
                return mark
    return TABLES[suffix]


def _check_header(header: Sequence[str], path: Path, line: int) -> None:
    """Raise InputError for a header with another delimiter than the suffix says, or with one name twice."""
    wanted = TABLES[path.suffix.lower()]
    other = next((mark for mark in DELIMITERS if mark != wanted and mark in header[0]), None) if header else None
    if len(header) == 1 and other:
        raise InputError(
            f"{path}: the columns are separated by {DELIMITERS[other]} ({other!r}), those of a {path.suffix} file by "
            f"{DELIMITERS[wanted]}: save it so" + (", or call it .tsv" if other == "\t" else "")
        )
    twice = next((name for name in header if header.count(name) > 1 and name), None)
    if twice is not None:
        raise InputError(f"{path}: line {line} names the column {shown(twice)} twice")
