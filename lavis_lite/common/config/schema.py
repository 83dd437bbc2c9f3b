"""Signatures as schemas: keys and values of a mapping are checked against a constructor's or dataclass's parameters.

Values are converted only where nothing is lost: 1 to 1.0 for a number, 2e4 to 20000 for a whole number.
Annotations the checker does not know (a class, Any) accept everything.
"""

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from lavis_lite.common.config.files import (
    ConfigError,
    KeyPath,
    Layer,
    origin,
    quoting,
)
from lavis_lite.common.registry import did_you_mean


@dataclass(frozen=True)
class Parameter:
    """One key of a schema."""

    annotation: Any
    required: bool = False


Schema = dict[str, Parameter]


def schema_of(item: Callable[..., Any]) -> tuple[Schema, bool]:
    """Return a class's (or function's) parameters, and whether it takes any further keyword.

    `**kwargs` of a constructor stands for its parent's keyword-only parameters, as it does in
    `super().__init__(**kwargs)`; the parent's others are the constructor's own business.
    """
    if is_dataclass(item):
        hints = _hints(item)
        return {
            f.name: Parameter(hints.get(f.name, Any), f.default is MISSING and f.default_factory is MISSING)
            for f in fields(item)
            if f.init
        }, False
    schema: Schema = {}
    owners = [c.__init__ for c in item.__mro__ if "__init__" in vars(c)] if inspect.isclass(item) else [item]
    open_ended = False
    for function in owners:
        if function is object.__init__:
            break
        if function.__module__.startswith("torch."):
            return schema, False  # torch's Module takes **kwargs only to refuse them
        open_ended, hints = False, _hints(function)
        for name, parameter in inspect.signature(function).parameters.items():
            open_ended |= parameter.kind is parameter.VAR_KEYWORD
            is_settable = parameter.kind is parameter.KEYWORD_ONLY
            is_settable |= parameter.kind is parameter.POSITIONAL_OR_KEYWORD and function is owners[0]
            if name != "self" and is_settable:
                schema.setdefault(name, Parameter(hints.get(name, Any), parameter.default is parameter.empty))
        if not open_ended:
            break
    return schema, open_ended


def _hints(item: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(item)
    except NameError:  # a name that only type checkers import: the keys are still checked, the values are not
        return {}


def describe(annotation: Any) -> str:
    """Return an annotation in words: 'a whole number or null'."""
    args = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if get_origin(annotation) is Literal:
        return " or ".join(repr(arg) for arg in args)
    if get_origin(annotation) in (list, Sequence, tuple):
        return f"a list of {describe(args[0]).removeprefix('a ')}" if args else "a list"
    if get_origin(annotation) in (dict, Mapping) or is_dataclass(annotation):
        return "a mapping"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        types.NoneType: "null",
    }
    words |= {list: "a list", tuple: "a list", dict: "a mapping"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


MAX_WHOLE = 2**53
"""The largest whole number, up to which a float has all of them."""
MAX_NUMBER = 3e38
"""The largest number, which a 32-bit float can hold."""


class _Mismatch(Exception):
    """Internal: the value does not fit the annotation; perhaps with what else is expected of it."""


@dataclass(frozen=True)
class Checker:
    """Checks the merged tree, and knows from its layers which file to name in an error."""

    layers: Sequence[Layer]
    raw: Mapping[KeyPath, str] = field(default_factory=dict)

    def error(self, path: KeyPath, text: str) -> ConfigError:
        """Return (not raise) the ConfigError about the key at `path`."""
        return ConfigError(f"{origin(self.layers, path)}: {'.'.join(map(str, path))}: {text}")

    def section(
        self, values: Mapping[str, Any], schema: Schema, path: KeyPath, *, open_ended: bool = False
    ) -> dict[str, Any]:
        """Return the values, checked and converted; ConfigError for an unknown, missing or mistyped key."""
        for key in values:
            if key not in schema and not open_ended:
                raise self.error((*path, str(key)), f"unknown key. {did_you_mean(key, schema)}")
        for key, parameter in schema.items():
            if parameter.required and key not in values:
                raise self.error((*path, key), f"missing: it needs {describe(parameter.annotation)}")
        return {
            key: self.value(value, schema[key].annotation, (*path, key)) if key in schema else value
            for key, value in values.items()
        }

    def value(self, value: Any, annotation: Any, path: KeyPath) -> Any:
        """Return one value, checked and converted."""
        if path in self.raw:
            value = _as_typed(self.raw[path], value, annotation)
        if is_dataclass(annotation) and isinstance(value, Mapping):
            return self.section(value, schema_of(annotation)[0], path)
        try:
            return self._convert(value, annotation, path)
        except _Mismatch as mismatch:
            hint = f". {did_you_mean(value, get_args(annotation))}" if _is_text_choice(annotation) else ""
            given = f"{value!r} ({describe(type(value))})"
            if path in self.raw and isinstance(value, (dict, list)) and _takes_text(annotation):
                hint = "; " + quoting(f"{'.'.join(path)}={self.raw[path]}")
            raise self.error(path, f"expected {describe(annotation)}{mismatch}, got {given}{hint}") from None

    def _convert(self, value: Any, annotation: Any, path: KeyPath) -> Any:
        kind, args = get_origin(annotation), get_args(annotation)
        if kind in (Union, types.UnionType):
            return self._convert_union(value, args, path)
        if kind is Literal:
            return _require(value in args and type(value) in map(type, args), value)
        if annotation in (list, tuple) or kind in (list, tuple, Sequence):
            _require(isinstance(value, (list, tuple)), value)
            element = args[0] if args else Any
            return [self.value(v, element, (*path, str(i))) for i, v in enumerate(value)]
        if annotation is dict or kind in (dict, Mapping):
            _require(isinstance(value, Mapping), value)
            if args and args[0] is str:
                _require(all(isinstance(key, str) for key in value), value, " with text as keys")
            element = args[1] if args else Any
            return {key: self.value(v, element, (*path, str(key))) for key, v in value.items()}
        return _convert_scalar(value, annotation)

    def _convert_union(self, value: Any, args: tuple[Any, ...], path: KeyPath) -> Any:
        mappings = [a for a in args if is_dataclass(a) or a is dict or get_origin(a) in (dict, Mapping)]
        if isinstance(value, Mapping) and len(mappings) == 1:
            return self.value(value, mappings[0], path)
        why = ""
        for arg in sorted(args, key=lambda a: a is not type(value)):  # an exact match first: 1 stays 1 for float | int
            try:
                return self._convert(value, arg, path)
            except _Mismatch as mismatch:
                why = why or str(mismatch)
        raise _Mismatch(why)


def _require(fits: bool, value: Any, why: str = "") -> Any:
    if not fits:
        raise _Mismatch(why)
    return value


def _within(value: float, limit: float, shown: str) -> float:
    """Return a number that is neither NaN nor beyond `limit` on either side of 0."""
    _require(value >= -limit, value, f", -{shown} or more")
    return _require(value <= limit, value, f", {shown} or less")


def _convert_scalar(value: Any, annotation: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        _require(number and math.isfinite(value) and value == int(value), value)
        return int(_within(value, MAX_WHOLE, f"{MAX_WHOLE:,}"))
    if annotation is float:
        _require(number, value)
        return float(_within(value, MAX_NUMBER, f"{MAX_NUMBER:g}"))
    if annotation is Path:
        return Path(_require(isinstance(value, str), value))
    if annotation is str and isinstance(value, str):
        _require("\0" not in value, value, " without null characters")
    if annotation in (bool, str, types.NoneType):
        return _require(type(value) is annotation, value)
    if is_dataclass(annotation):
        return _require(isinstance(value, annotation), value)
    return value


def _is_text_choice(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and all(isinstance(arg, str) for arg in get_args(annotation))


def _takes_text(annotation: Any) -> bool:
    return str in (annotation, *get_args(annotation)) and get_origin(annotation) in (None, Union, types.UnionType)


def _as_typed(text: str, parsed: Any, annotation: Any) -> Any:
    """An option for a text key is the text as typed ('001', 'a picture of '), unless quoted; null is never text."""
    args = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    wants_text = _takes_text(annotation) and (not args or isinstance(parsed, str) or type(parsed) not in args)
    is_null = parsed is None and text.strip() != ""
    as_yaml = text[:1] in ("'", '"') or "${" in text or isinstance(parsed, (list, dict)) or is_null
    return text if wants_text and not as_yaml else parsed
