"""The check of annotation records: which fields a record must have, and of what kind each one is.

A dataset declares `required` and `fields`; every record of its files is compared with them once, when it is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lavis_lite.common.errors import InputError

Record = dict[str, Any]

_WORD = re.compile(r"\w")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Surrogates but for those that stand for the bytes of a file name that is not UTF-8."""
_LISTED = re.compile(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", re.DOTALL)
_OTHER_NAMES = {
    "image": "file_name filename file path filepath image_path img_path image_file image_name img picture photo",
    "caption": "text title captions description sentence",
    "question": "query prompt",
    "answer": "answers response output",
    "instruction": "prompt question query input",
    "output": "answer response target completion",
    "sentence": "text caption statement",
    "label": "class category",
    "video": "video_path video_name video_id clip",
}
"""What others call a field: named in the error about the one that is missing."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a field may hold: a value of `types`, or with `many` a list of these. `name` says it in words."""

    name: str
    types: tuple[type, ...] = (str,)
    many: bool = False
    key: str = ""
    """Where the items of a list may also be objects: the name under which these hold the value."""
    blank: bool = False
    """An empty or blank text, and an empty list, are fine."""
    cleaned: bool = False
    """The dataset's text processor cleans it, and must leave something of it."""
    is_path: bool = False


_NUMBERS = (str, int, float)
PATH = Kind(name="the path of a file", is_path=True)
PATHS = Kind(name="a list of paths", is_path=True, many=True)
NAME = Kind(name="a file name or number", types=(str, int), is_path=True)
ID = Kind(name="a text or a number", types=_NUMBERS)
GROUP = Kind(name="a text or a number", types=_NUMBERS, blank=True)
TEXT = Kind(name="a text", cleaned=True)
TEXTS = Kind(name="a text or a list of texts", many=True, cleaned=True)
ANY_TEXT = Kind(name="a text", blank=True)
ANSWERS = Kind(name="a text, a number or a list of these", types=_NUMBERS, many=True, key="answer")
TRUTHS = Kind(name=ANSWERS.name, types=_NUMBERS, many=True, key="answer", blank=True)
"""Answers to score: people do leave some blank, which matches no prediction."""
VALUES = Kind(name=ANSWERS.name, types=_NUMBERS, many=True, blank=True)
INDEX = Kind(name="a whole number", types=(int,))
WORDS = Kind(name="a list of texts", many=True, blank=True)


@dataclass(frozen=True, kw_only=True)
class RecordCheck:
    """What the records of a file must be like.

    `required`: names of fields, `"answer|answers"` for either of two. `fields`: the kind of each field that is read;
    null is a field that is left out. `clean` is the text processor. `allow_blank` leaves blank texts to
    `without_blank`.
    """

    required: Sequence[str] = ()
    fields: Mapping[str, Kind] = field(default_factory=dict)
    clean: Callable[[str], str] = str
    allow_blank: bool = False

    def __call__(self, records: Iterable[Record], place: Callable[[int], str]) -> None:
        """Raise InputError for the first record with a fault; `place` says where the record of a number is."""
        wanted = [names.split("|") for names in self.required]
        for number, record in enumerate(records):
            problem = self._absence(record, wanted) or self._fault(record)
            if problem:
                raise InputError(place(number) + problem)

    def problem(self, record: Record) -> str | None:
        """What is wrong with one record, as the rest of a sentence that begins with its place; None if it is right."""
        return self._absence(record, [names.split("|") for names in self.required]) or self._fault(record)

    def without_blank(self, record: Record) -> Record | None:
        """The record without its blank texts; None if nothing is left of a required field."""
        changed = {}
        for name, kind in self.fields.items():
            value = record.get(name)
            if value is None or kind.blank:
                continue
            kept = [item for item in value if not self.is_blank(item, kind)] if isinstance(value, list) else value
            if isinstance(kept, str) and self.is_blank(kept, kind):
                kept = None
            if kept is not value:
                changed[name] = kept
        found = {**record, **changed} if changed else record
        lacks = any(all(found.get(n) in (None, []) for n in names.split("|")) for names in self.required)
        return None if lacks else found

    def is_blank(self, value: Any, kind: Kind) -> bool:
        """Whether this is a text with nothing in it, or nothing that the text processor leaves."""
        if isinstance(value, dict):
            value = value.get(kind.key)
        if not isinstance(value, str) or _WORD.search(value):
            return False
        if not value.strip() or not kind.cleaned:
            return not value.strip()
        cleaned = self.clean(value)
        return isinstance(cleaned, str) and (not cleaned.strip() or cleaned == self.clean(""))

    def _absence(self, record: Record, wanted: Sequence[Sequence[str]]) -> str | None:
        for names in wanted:
            for name in names:
                value = record.get(name)
                if value is not None and (value != [] or self._may_be_empty(name)):
                    break
            else:
                return lacking(record, names)
        return None

    def _may_be_empty(self, name: str) -> bool:
        kind = self.fields.get(name)
        return self.allow_blank or kind is None or kind.blank or not kind.many

    def _fault(self, record: Record) -> str | None:
        for name, kind in self.fields.items():
            value = record.get(name)
            if value is None or (type(value) is str and value.isascii() and self._is_plain(value, kind)):
                continue
            problem = self._list_fault(value, kind) if type(value) is list and kind.many else self._one(value, kind)
            if problem:
                return f": field {name!r} {problem}"
        return None

    def _is_plain(self, text: str, kind: Kind) -> bool:
        """Whether an ASCII text needs no closer look: almost every one."""
        return kind.types[0] is str and _WORD.match(text) is not None and not (kind.is_path and "\0" in text)

    def _list_fault(self, values: list[Any], kind: Kind) -> str | None:
        for number, item in enumerate(values):
            if kind.key and type(item) is dict:
                item = item.get(kind.key)
            problem = self._one(item, kind)
            if problem:
                return f"(item {number} of the list) {problem}"
        return None

    def _one(self, value: Any, kind: Kind) -> str | None:
        if type(value) is float and not math.isfinite(value):
            hint = "; a table's empty cell was written so: leave the field out" if math.isnan(value) else ""
            return f"is {shown(value)}; expected {kind.name}{hint}"
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
        way_out = "remove the record, or set the dataset's blank_texts: skip" if is_text else "or remove the record"
        return f"{what}; expected {kind.name}: fill it in, {way_out}"


_TYPE_WORDS = {
    **{bool: "a truth value", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
}


def lacking(record: Record, names: Sequence[str]) -> str:
    """The words after a record's place when it has none of these fields, or only null, or an empty list."""
    needed = " or ".join(map(repr, names))
    for name in names:
        if name in record:
            return f": field {name!r} is {'null' if record[name] is None else 'an empty list'}; fill it in"
    there = ", ".join(repr(key) for key in record) or "none"
    return f" has no field {needed}; fields there: {there}{renaming(record, names)}"


def renaming(record: Record, names: Sequence[str]) -> str:
    """The advice to rename a field, if one there is what others call one of `names`."""
    for name in names:
        others = {name, *_OTHER_NAMES.get(name, "").split()}
        for key in record:
            if isinstance(key, str) and key.strip().lower() in others:
                return f". Rename {key!r} to {name!r} if that is meant"
    return ""


def shown(value: Any, limit: int = 80) -> str:
    """The value as JSON has it, cut to `limit` characters, without anything that cannot be printed."""
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= limit else f"{text[:limit]}..."


def printable(text: str) -> str:
    r"""The text with lone surrogates as `\udXXX`, so that it can be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
