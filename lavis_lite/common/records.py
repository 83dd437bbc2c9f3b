"""The check of annotation records: required fields, and the kind of each field.

A dataset declares `required` and `fields`; every record of its files is checked against them once, when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lavis_lite.common.errors import InputError

Record = dict[str, Any]

_WORD = re.compile(r"\w")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Surrogates, except those that represent the bytes of a file name that is not UTF-8."""
_LISTED = re.compile(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", re.DOTALL)


class StoredImage(ABC):
    """An image that a record has in place of a path: its bytes are in a table. `str()` says where, for messages."""

    @abstractmethod
    def read(self) -> bytes:
        """Return the bytes of the image file. OSError if they cannot be read."""

    def digest(self) -> bytes:
        """Return the digest of the content."""
        return digest_of(self.read())


def digest_of(content: bytes) -> bytes:
    """Return 8 bytes that identify a content."""
    return hashlib.blake2b(content, digest_size=8).digest()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The allowed values of a field: a value of `types`, or with `many` also a list of these; `name` in words."""

    name: str
    types: tuple[type, ...] = (str,)
    many: bool = False
    key: str = ""
    """Key of the value, if the items of a list may also be objects."""
    blank: bool = False
    """Whether an empty or blank text, and an empty list, are allowed."""
    cleaned: bool = False
    """Whether the dataset's text processor cleans it; some text must remain."""
    is_path: bool = False


_NUMBERS = (str, int, float)
PATH = Kind(name="the path of a file", is_path=True)
PATHS = Kind(name="a list of paths", is_path=True, many=True)
IMAGES = Kind(name="the path of a file", is_path=True, many=True)
NAME = Kind(name="a file name or number", types=(str, int), is_path=True)
ID = Kind(name="a text or a number", types=_NUMBERS)
GROUP = Kind(name="a text or a number", types=_NUMBERS, blank=True)
TEXT = Kind(name="a text", cleaned=True)
TEXTS = Kind(name="a text or a list of texts", many=True, cleaned=True)
ANY_TEXT = Kind(name="a text", blank=True)
ANSWERS = Kind(name="a text, a number or a list of these", types=_NUMBERS, many=True, key="answer")
TRUTHS = Kind(name=ANSWERS.name, types=_NUMBERS, many=True, key="answer", blank=True)
"""Answers to score: annotators leave some blank, which match no prediction."""
VALUES = Kind(name=ANSWERS.name, types=_NUMBERS, many=True, blank=True)
INDEX = Kind(name="a whole number", types=(int,))
WORDS = Kind(name="a list of texts", many=True, blank=True)


@dataclass(frozen=True, kw_only=True)
class RecordCheck:
    """The requirements for records of a file.

    `required`: names of fields, `"answer|answers"` for either of two. `fields`: the kind of each field that is read;
    null counts as missing. `clean` is the text processor. `allow_blank` leaves blank texts to `without_blank`.
    """

    required: Sequence[str] = ()
    fields: Mapping[str, Kind] = field(default_factory=dict)
    clean: Callable[[str], str] = str
    allow_blank: bool = False

    def __call__(self, records: Iterable[Record], place: Callable[[int], str]) -> None:
        """Raise InputError for the first invalid record; `place` returns the location of a record by its number."""
        for number, record in enumerate(records):
            problem = self.problem(record)
            if problem:
                raise InputError(place(number) + problem)

    def problem(self, record: Record) -> str | None:
        """Return the first problem of one record, to follow its location in a message; None for a valid record."""
        return self._missing(record) or self._wrong_kind(record)

    def without_blank(self, record: Record) -> Record | None:
        """Return the record without its blank texts; None if a required field is empty then."""
        changed = {}
        for name, kind in self.fields.items():
            value = record.get(name)
            if value is None or kind.blank:
                continue
            kept = [item for item in value if not self.is_blank(item, kind)] if isinstance(value, list) else value
            if isinstance(kept, str) and self.is_blank(kept, kind):
                kept = None
            if kept != value:  # a list without blanks is a copy of itself
                changed[name] = kept
        found = {**record, **changed} if changed else record
        is_empty = any(all(found.get(name) in (None, []) for name in names) for names in self._required)
        return None if is_empty else found

    def is_blank(self, value: Any, kind: Kind) -> bool:
        """Return whether this is a blank text, or one of which the text processor leaves nothing."""
        if isinstance(value, dict):
            value = value.get(kind.key)
        if not isinstance(value, str) or _WORD.search(value):
            return False
        if not value.strip() or not kind.cleaned:
            return not value.strip()
        cleaned = self.clean(value)
        return isinstance(cleaned, str) and (not cleaned.strip() or cleaned == self.clean(""))

    @cached_property
    def _required(self) -> list[list[str]]:
        """The alternatives of each required field."""
        return [names.split("|") for names in self.required]

    def _missing(self, record: Record) -> str | None:
        for names in self._required:
            if not any(self._is_given(name, record.get(name)) for name in names):
                return missing_field(record, names)
        return None

    def _is_given(self, name: str, value: Any) -> bool:
        kind = self.fields.get(name)
        may_be_empty = self.allow_blank or kind is None or kind.blank or not kind.many
        return value is not None and (value != [] or may_be_empty)

    def _wrong_kind(self, record: Record) -> str | None:
        for name, kind in self.fields.items():
            value = record.get(name)
            if value is None or (type(value) is str and value.isascii() and self._is_plain(value, kind)):
                continue
            problem = self._of_list(value, kind) if type(value) is list and kind.many else self._of_value(value, kind)
            if problem:
                return f": field {name!r} {problem}"
        return None

    def _is_plain(self, text: str, kind: Kind) -> bool:
        """Return whether an ASCII text needs no further check, as almost every one."""
        return kind.types[0] is str and _WORD.match(text) is not None and not (kind.is_path and "\0" in text)

    def _of_list(self, values: list[Any], kind: Kind) -> str | None:
        for number, item in enumerate(values):
            if kind.key and type(item) is dict:
                item = item.get(kind.key)
            problem = self._of_value(item, kind)
            if problem:
                return f"(item {number} of the list) {problem}"
        return None

    def _of_value(self, value: Any, kind: Kind) -> str | None:
        if type(value) is float and not math.isfinite(value):
            hint = "; a table's empty cell was written so: leave the field out" if math.isnan(value) else ""
            return f"is {shown(value)}; expected {kind.name}{hint}"
        if kind.is_path and isinstance(value, StoredImage):
            return None
        if isinstance(value, StoredImage):
            return f"holds bytes, such as an image; expected {kind.name}"
        if type(value) not in kind.types:
            given = "null" if value is None else f"{shown(value)}, {_TYPE_WORDS.get(type(value), type(value).__name__)}"
            return f"is {given}; expected {kind.name}"
        if type(value) is not str:
            return None
        if (_NO_BYTE if kind.is_path else _SURROGATE).search(value):
            return f"is {shown(value)}, which holds half a character (a lone surrogate); correct or remove it"
        if kind.is_path and "\0" in value:
            return f"is {shown(value)}, which holds a NUL character; expected {kind.name}"
        if kind.many and _LISTED.fullmatch(value):
            return f"is {shown(value)}, a list written as one text; write the list itself, in a .json or .jsonl file"
        if kind.blank or self.allow_blank or not self.is_blank(value, kind):
            return None
        what = "is empty" if not value else f"is {shown(value)}, blank" + (" once cleaned" if value.strip() else "")
        is_text = kind.cleaned or (kind.many and not kind.is_path)
        correction = "remove the record, or set the dataset's blank_texts: skip" if is_text else "or remove the record"
        return f"{what}; expected {kind.name}: fill it in, {correction}"


_TYPE_WORDS = {bool: "a truth value", str: "a text", list: "a list", dict: "an object"}
_TYPE_WORDS |= dict.fromkeys((int, float), "a number")


def missing_field(record: Record, names: Sequence[str]) -> str:
    """Return the problem of a record that has none of these fields, or only null or an empty list."""
    needed = " or ".join(map(repr, names))
    for name in names:
        if name in record:
            return f": field {name!r} is {'null' if record[name] is None else 'an empty list'}; fill it in"
    return f" has no field {needed}; fields there: {', '.join(map(repr, record)) or 'none'}"


def shown(value: Any, limit: int = 80) -> str:
    """Return the value as printable JSON of at most `limit` characters."""
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= limit else f"{text[:limit]}..."


def printable(text: str) -> str:
    r"""Return the text with lone surrogates as `\udXXX`, so that it can be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
