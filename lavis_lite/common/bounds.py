"""Checks of single values: numbers within bounds and choices, for errors before torch fails or memory runs out."""

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

from lavis_lite.common.errors import SettingError

MAX_IMAGE_SIZE = 4096
"""Pixels per side of an image."""
MAX_WIDTH = 2**16
"""Width of a layer or projection."""
MAX_LAYERS = 512
MAX_TOKENS = 100_000
"""Tokens per text."""

Bounds = tuple[float, ...]
"""Least and greatest allowed number, and optionally one of the two that is itself excluded."""
T = TypeVar("T")
Number = TypeVar("Number", int, float)


def check_numbers(section: str, values: Mapping[str, Any], **bounds: Bounds) -> None:
    """Raise SettingError about `<section>.<key>` for a value that is not a number within its bounds.

    A key that is missing from `values` is not checked. See `check_number`.
    """
    for key, limits in bounds.items():
        if key in values:
            check_number(f"{section}.{key}", values[key], *limits)


def check_number(name: str, value: Any, least: Number, most: Number, excluded: float | None = None) -> Number:
    """Return the number; raise SettingError unless it is `least` to `most` and other than `excluded`.

    Integer bounds require a whole number.
    """
    is_whole = isinstance(least, int) and isinstance(most, int)
    kind, what = (Integral, "a whole number") if is_whole else (Real, "a number")
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or value == excluded:
        exception = "" if excluded is None else f", but not {excluded:g}"
        raise SettingError(name, f"must be {what} from {least:,} to {most:,}{exception}, got {value!r}")
    return value


def check_divides(section: str, values: Mapping[str, Any], *, divisor: str, number: str) -> None:
    """Raise SettingError unless `values[number]` is a multiple of `values[divisor]`."""
    if values[number] % values[divisor]:
        problem = f"{number} {values[number]} is not a multiple of {divisor} {values[divisor]}"
        raise SettingError(f"{section}.{divisor}", problem)


def one_of(name: str, value: T, known: Iterable[T]) -> T:
    """Return the value; raise SettingError unless it is one of the known ones, which the error lists."""
    choices = list(known)
    if value not in choices:
        raise SettingError(name, f"{value!r} is not one of {', '.join(map(str, choices))}")
    return value
