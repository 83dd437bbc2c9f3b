"""The check of a table's rows by columns: those that are surely valid, as almost all are, need no further look.

A row is plain if every field that is read is an ASCII text that begins with a letter, digit or underscore (or a list of
these), a whole number where one is allowed, or an image; and if every required field is there. `RecordCheck` looks at
the others, one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lavis_lite.common.records import Kind, RecordCheck

if TYPE_CHECKING:
    import pyarrow as pa


def plain_rows(columns: Mapping[str, pa.Array], images: set[str], check: RecordCheck, count: int) -> np.ndarray:
    """Return which of `count` rows are plain (N). `images` are the fields that hold images inside the table."""
    plain = np.ones(count, dtype=bool)
    for name, kind in check.fields.items():
        if name in columns:
            plain &= _are_plain(columns[name], kind)
        elif name in images:
            plain &= kind.is_path
    for names in check.required:
        given = np.zeros(count, dtype=bool)
        for name in names.split("|"):
            if name in images:
                given |= True
            elif name in columns:
                given |= ~_flags(columns[name].is_null())
        plain &= given
    return plain


def _are_plain(values: pa.Array, kind: Kind) -> np.ndarray:
    """Return which values are plain (N); null is, since a missing field that is required is found elsewhere."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_integer(values.type) and int in kind.types:
        return np.ones(len(values), dtype=bool)
    if kind.types[0] is not str:
        return np.zeros(len(values), dtype=bool)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        plain = pc.and_(pc.string_is_ascii(values), pc.match_substring_regex(values, "^[0-9A-Za-z_]"))
        if kind.is_path:
            plain = pc.and_(plain, pc.invert(pc.match_substring(values, "\0")))
        return _flags(plain.fill_null(True))
    if kind.many and (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        lengths = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
        items = values.flatten()
        are_plain = _flags(pc.and_(pc.is_valid(items), pa.array(_are_plain(items, kind))))
        owners = np.repeat(np.arange(len(values)), lengths)
        plain_list = _flags(values.is_null()) | (lengths > 0)  # an empty list may be a missing field
        plain_list[owners[~are_plain]] = False
        return plain_list
    return np.zeros(len(values), dtype=bool)


def _flags(values: pa.Array) -> np.ndarray:
    found: np.ndarray = values.to_numpy(zero_copy_only=False)
    return found.astype(bool)
