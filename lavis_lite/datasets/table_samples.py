"""The samples of a table: its rows are checked in chunks and forgotten; what is kept is some integers per sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record, RecordCheck
from lavis_lite.datasets.copies import Picture, first_different, picture_of, visual_path
from lavis_lite.datasets.parts import Part
from lavis_lite.datasets.table_check import plain_rows
from lavis_lite.datasets.tables import CHUNK, Table, TableRecords

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 20_000
"""Rows that are checked at a time."""
VISUALS = ("video", "image")
"""Fields of the path of what a record shows; the first that it has counts."""
WHOLE_FIELD = -1
"""The item of a sample that has all of its row."""


class Selection:
    """Chooses the samples of a table's rows: those of the part, without blank texts, one per item of `item_field`."""

    def __init__(self, table: Table, check: RecordCheck, *, item_field: str, part: Part | None) -> None:
        self.table, self.check, self.item_field, self.part = table, check, item_field, part
        self.num_blank, self.note = 0, ""
        """Records of which blank texts were left out, and the same in words."""

    def samples(self) -> TableRecords:
        """Return the samples. InputError for the first invalid record, and if nothing is left."""
        chunks = [self._chunk(start, min(start + ROWS, len(self.table))) for start in range(0, len(self.table), ROWS)]
        rows, items = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
        if not len(rows):
            reason = "all texts are blank, or split_off leaves no image"
            raise InputError(f"{self.table.name}: no record of {len(self.table):,} is left: {reason}")
        if self.num_blank:
            counts = f"{self.num_blank} of {len(self.table)} records"
            self.note = f"{self.table.name}: blank texts of {counts} are left out"
        check_unique_ids(self.table, rows[np.diff(rows, prepend=-1) != 0])
        return TableRecords(self.table, rows, items, item_field=self.item_field)

    def _chunk(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row and item of the samples of some rows (N); the item -1 is all of the row."""
        columns = self.table.columns(start, stop)
        plain = plain_rows(columns, set(self.table.stored), self.check, stop - start)
        rows, items = _items(columns.get(self.item_field), stop - start)
        is_kept = np.ones(len(rows), dtype=bool)
        odd = np.nonzero(~plain)[0]
        for row, record in zip(odd, self.table.records(start + odd), strict=True):
            if problem := self.check.problem(record):
                raise InputError(self.table.place(int(start + row)) + problem)
            if self.check.allow_blank:
                self._leave_out_blank(record, is_kept[np.searchsorted(rows, row) : np.searchsorted(rows, row + 1)])
        if self.part is not None:
            has = [self.part.has(record) for record in self.table.records(range(start, stop))]
            is_kept &= np.array(has)[rows]
        return (rows[is_kept] + start).astype(np.int32), items[is_kept].astype(np.int32)

    def _leave_out_blank(self, record: Record, is_kept: np.ndarray) -> None:
        """Set `is_kept` of a record's samples to False where their text is blank."""
        cleaned = self.check.without_blank(record)
        self.num_blank += cleaned is not record
        values = record.get(self.item_field)
        if cleaned is None:
            is_kept[:] = False
        elif isinstance(values, list):
            kind = self.check.fields[self.item_field]
            is_kept[:] = [not self.check.is_blank(value, kind) for value in values]


def _items(values: pa.Array | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the number of each item (N) of a column of lists; of another column its rows, with -1."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if values is None or not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        return np.arange(count), np.full(count, WHOLE_FIELD)
    lengths = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(count), lengths)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def codes(table: Table, *names: str) -> np.ndarray | None:
    """Return a number per row (N), the same for rows whose texts are equal: of the first column of `names` that has a
    value in the row. None if no row has one.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [column.cast(pa.large_string()) for name in names if (column := table.column(name)) is not None]
    if not columns:
        return None
    texts = pc.coalesce(*columns).combine_chunks()
    encoded = (texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts).dictionary_encode()
    found: np.ndarray = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    return found if (found >= 0).any() else None


def in_first_seen_order(values: np.ndarray) -> np.ndarray:
    """Return the values numbered from 0 by their first occurrence."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int32)


def check_unique_ids(table: Table, rows: np.ndarray) -> None:
    """Raise InputError, with both places, if two of the rows have the same `instance_id`; null is none."""
    pair = first_equal(table, rows, "instance_id")
    if pair is not None:
        one, other = map(table.place, pair)
        value = table.records(pair)[0]["instance_id"]
        raise InputError(f"{one} and {other} have the same instance_id {value!r}; give each its own")


def first_equal(table: Table, rows: np.ndarray, name: str) -> tuple[int, int] | None:
    """Return two rows with the same text in a column; None without such rows."""
    found = codes(table, name)
    if found is None:
        return None
    rows = rows[found[rows] >= 0]
    order = np.argsort(found[rows], kind="stable")
    ordered = found[rows][order]
    (equal,) = np.nonzero(ordered[1:] == ordered[:-1])
    return (int(rows[order[equal[0]]]), int(rows[order[equal[0] + 1]])) if len(equal) else None


def image_numbers(samples: TableRecords) -> np.ndarray:
    """Return the index of each sample's image or video, in first-seen order (N): by `image_id`, else by its path; those
    inside a table without an id are one per row.

    Raises InputError, with both rows, if two images have the same `image_id`.
    """
    table, rows = samples.table, samples.rows
    found = codes(table, "image_id", *VISUALS)
    if found is None:
        return in_first_seen_order(rows)
    unnamed = found < 0
    found = np.where(unnamed, found.max() + 1 + np.arange(len(found)), found)
    if table.column("image_id") is not None:
        _check_images(table, rows, found)
    return in_first_seen_order(found[rows])


def _check_images(table: Table, rows: np.ndarray, ids: np.ndarray) -> None:
    """Raise InputError, with both rows, if two different images of these rows have the same id; copies of one image,
    in shards or tables, are recognised by their content.
    """
    paths = codes(table, *VISUALS)
    if paths is None:  # the images themselves are in the table
        paths = np.arange(len(ids))
    order = np.lexsort((paths[rows], ids[rows]))
    chosen = rows[order]
    (differ,) = np.nonzero((ids[chosen][1:] == ids[chosen][:-1]) & (paths[chosen][1:] != paths[chosen][:-1]))
    ones, others = chosen[differ], chosen[differ + 1]

    def pairs() -> Iterator[tuple[Picture, Picture]]:
        for start in range(0, len(ones), CHUNK):
            part = slice(start, start + CHUNK)
            for one, other in zip(table.records(ones[part]), table.records(others[part]), strict=True):
                yield picture_of(visual_path(one), table.root), picture_of(visual_path(other), table.root)

    rows_digest = hashlib.blake2b(ones.tobytes() + others.tobytes()).hexdigest()
    found = first_different(pairs(), len(ones), name=table.name, key=[*table.identity(), rows_digest])
    if found is not None:
        pair = [int(ones[found]), int(others[found])]
        one, other = table.records(pair)
        raise InputError(
            f"{table.place(pair[0])} ({visual_path(one)}) and {table.place(pair[1])} ({visual_path(other)}) are two "
            f"pictures under one image_id {one['image_id']!r}; give each picture an id of its own, or leave it out"
        )
