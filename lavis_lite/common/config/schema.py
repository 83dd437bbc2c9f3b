"""Signatures as schemas: keys and values of a mapping are checked against a constructor's or dataclass's parameters.

Values are converted only without loss: 1 to 1.0 for a number, 2e4 to 20000 for a whole number. Annotations that the
checker does not know (a class, Any) accept everything. docs/architecture.md says why this is not pydantic.
"""

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import OmegaConf

from lavis_lite.common.config.files import ConfigError, KeyPath, Layer, origin
from lavis_lite.common.registry import did_you_mean

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """One key of a schema."""

    annotation: Any
    default: Any = None


Schema = dict[str, Parameter]


def schema_of(item: Callable[..., Any]) -> tuple[Schema, bool]:
    """Return the parameters of a class or function, and whether it takes any further keyword."""
    if reads_config(item):
        return {}, True
    if is_dataclass(item):
        hints, schema = _hints(item), {}
        for own in fields(item):
            default = own.default if own.default_factory is MISSING else own.default_factory()
            if own.init:
                schema[own.name] = Parameter(hints.get(own.name, Any), REQUIRED if default is MISSING else default)
        return schema, False
    if typing.is_typeddict(item):
        return {name: Parameter(annotation) for name, annotation in _hints(item).items()}, False
    parameters = signature_of(item).parameters.values()
    schema = {p.name: Parameter(p.annotation, p.default) for p in parameters if p.kind is not p.VAR_KEYWORD}
    return schema, len(schema) < len(parameters)


def reads_config(item: object) -> bool:
    """Return whether a class outside this package builds itself, as in LAVIS's tutorials.

    It defines `from_config(cfg)`, or a task `setup_task(cfg)`. Its keys are what that reads, so none is checked here.
    """
    owners = item.__mro__ if isinstance(item, type) else ()
    builds = ("from_config", "setup_task")
    return any(name in vars(one) for one in owners if one.__module__.split(".")[0] != "lavis_lite" for name in builds)


def as_read(item: object, section: dict[str, Any]) -> Any:
    """Return a section as the class reads it: one that builds itself expects OmegaConf's attributes and `get`."""
    return OmegaConf.create(section) if reads_config(item) else section


def signature_of(item: Callable[..., Any]) -> inspect.Signature:
    """Return a constructor's (or function's) signature, with all parameters by keyword and resolved annotations.

    `**kwargs` of a constructor stands for its parent's keyword-only parameters, as in `super().__init__(**kwargs)`; it
    stays in the signature if the last constructor that is reached has it.
    """
    owners: list[Any] = [item]
    if isinstance(item, type):
        owners = [vars(owner)["__init__"] for owner in item.__mro__ if "__init__" in vars(owner)]
    found: dict[str, inspect.Parameter] = {}
    rest: list[inspect.Parameter] = []
    for function in owners:
        if function is object.__init__:
            break
        if function.__module__.startswith("torch."):  # Module takes **kwargs only to refuse them
            rest = []
            break
        hints = _hints(function)
        parameters = list(inspect.signature(function).parameters.values())[1 if isinstance(item, type) else 0 :]
        for parameter in parameters:
            is_inherited = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and function is not owners[0]
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD) and not is_inherited:
                annotation = hints.get(parameter.name, Any)
                found.setdefault(parameter.name, parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=annotation))
        rest = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
        if not rest:
            break
    return inspect.Signature([*found.values(), *rest])


class ConstructorSignature:
    """Descriptor for `__signature__`: help and IDEs show a class with the parameters that it passes to its parents."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        return signature_of(owner)


def _hints(item: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(item)
    except NameError:  # a name that only type checkers import: the keys are checked, the values are not
        return {}


WORDS: dict[Any, str] = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"},
    **{types.NoneType: "null", list: "a list", tuple: "a list", dict: "a mapping"},
}


def describe(annotation: Any) -> str:
    """Return an annotation in words: 'a whole number or null'."""
    kind, args = get_origin(annotation), get_args(annotation)
    if kind in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if kind is Literal:
        return " or ".join(repr(arg) for arg in args)
    if kind in (list, Sequence, tuple):
        return f"a list of {describe(args[0]).removeprefix('a ')}" if args else "a list"
    if _takes_mapping(annotation):
        return "a mapping"
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return WORDS.get(annotation, name)


MAX_WHOLE = 2**53
"""Largest whole number up to which floats represent every one."""
MAX_NUMBER = 3e38
"""Largest number; a 32-bit float can hold it."""


class _Mismatch(Exception):
    """Internal: the value does not fit the annotation; its text is what else is expected."""


@dataclass(frozen=True)
class Checker:
    """Checks values of merged layers; errors name the layer that sets the key."""

    layers: Sequence[Layer]

    @cached_property
    def _raw(self) -> dict[KeyPath, str]:
        return {path: text for layer in self.layers for path, text in layer.raw.items()}

    def error(self, path: KeyPath, text: str) -> ConfigError:
        """Return (not raise) the ConfigError about the key at `path`."""
        source = f"{origin(self.layers, path)}: " if self.layers else ""
        return ConfigError(f"{source}{'.'.join(map(str, path))}: {text}")

    def section(
        self, values: Mapping[str, Any], schema: Schema, path: KeyPath, *, open_ended: bool = False
    ) -> dict[str, Any]:
        """Return the values, checked and converted; ConfigError for an unknown, missing or mistyped key."""
        for key in values:
            if key not in schema and not open_ended:
                raise self.error((*path, str(key)), f"unknown key. {did_you_mean(key, schema)}")
        for key, parameter in schema.items():
            if parameter.default is REQUIRED and key not in values:
                raise self.error((*path, key), f"missing: it needs {describe(parameter.annotation)}")
        return {
            key: self.value(value, schema[key].annotation, (*path, key)) if key in schema else value
            for key, value in values.items()
        }

    def value(self, value: Any, annotation: Any, path: KeyPath) -> Any:
        """Return one value, checked and converted."""
        if path in self._raw:
            value = _as_typed(self._raw[path], value, annotation)
        try:
            return self._convert(value, annotation, path)
        except _Mismatch as mismatch:
            is_unquoted = path in self._raw and isinstance(value, dict | list) and _takes_text(annotation)
            hint, choices = "; quote a text for YAML too" if is_unquoted else "", get_args(annotation)
            if get_origin(annotation) is Literal and all(isinstance(choice, str) for choice in choices):
                hint = f". {did_you_mean(value, choices)}"
            given = f"{value!r} ({describe(type(value))})"
            raise self.error(path, f"expected {describe(annotation)}{mismatch}, got {given}{hint}") from None

    def _convert(self, value: Any, annotation: Any, path: KeyPath) -> Any:
        kind: Any = get_origin(annotation) or annotation
        args = get_args(annotation)
        if kind in (Union, types.UnionType):
            return self._convert_union(value, args, path)
        if kind is Literal:
            return _require(value in args and type(value) in map(type, args), value)
        if is_dataclass(kind) or typing.is_typeddict(kind):
            if isinstance(value, Mapping):
                return self.section(value, schema_of(kind)[0], path)
            return _require(is_dataclass(type(value)) and isinstance(value, kind), value)
        if kind in (list, tuple, Sequence):
            _require(isinstance(value, list | tuple), value)
            element = args[0] if args else Any
            return [self.value(v, element, (*path, str(i))) for i, v in enumerate(value)]
        if kind in (dict, Mapping):
            _require(isinstance(value, Mapping), value)
            key_type, element = args or (Any, Any)
            _require(key_type is not str or all(isinstance(key, str) for key in value), value, " with text as keys")
            return {key: self.value(v, element, (*path, str(key))) for key, v in value.items()}
        return _convert_scalar(value, annotation)

    def _convert_union(self, value: Any, args: tuple[Any, ...], path: KeyPath) -> Any:
        mappings = [a for a in args if _takes_mapping(a)]
        if isinstance(value, Mapping) and len(mappings) == 1:
            return self.value(value, mappings[0], path)
        reason = ""
        for arg in sorted(args, key=lambda a: a is not type(value)):  # an exact match first: 1 stays 1 for float | int
            try:
                return self._convert(value, arg, path)
            except _Mismatch as mismatch:
                reason = reason or str(mismatch)
        raise _Mismatch(reason)


def _require(fits: bool, value: Any, expected: str = "") -> Any:
    if not fits:
        raise _Mismatch(expected)
    return value


def _convert_scalar(value: Any, annotation: Any) -> Any:
    if annotation in (int, float):
        _require(isinstance(value, int | float) and not isinstance(value, bool), value)
        limit, shown = (MAX_WHOLE, f"{MAX_WHOLE:,}") if annotation is int else (MAX_NUMBER, f"{MAX_NUMBER:g}")
        if annotation is int and isinstance(value, float):
            _require(math.isfinite(value) and value == int(value), value)
        _require(value >= -limit, value, f", -{shown} or more")  # neither NaN
        return annotation(_require(value <= limit, value, f", {shown} or less"))
    if annotation is Path:
        return Path(_require(isinstance(value, str), value))
    if annotation is str and isinstance(value, str):
        _require("\0" not in value, value, " without null characters")
    if annotation in (bool, str, types.NoneType):
        return _require(type(value) is annotation, value)
    return value


def _takes_mapping(annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    return kind in (dict, Mapping) or is_dataclass(kind) or typing.is_typeddict(kind)


def _takes_text(annotation: Any) -> bool:
    return str in (annotation, *get_args(annotation)) and get_origin(annotation) in (None, Union, types.UnionType)


def _as_typed(text: str, parsed: Any, annotation: Any) -> Any:
    """Return an option for a text key as typed ('001', 'a picture of '), unless it is quoted; null is never text."""
    args = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    wants_text = _takes_text(annotation) and (not args or isinstance(parsed, str) or type(parsed) not in args)
    is_null = parsed is None and text.strip() != ""
    as_yaml = text[:1] in ("'", '"') or "${" in text or isinstance(parsed, list | dict) or is_null
    return text if wants_text and not as_yaml else parsed
