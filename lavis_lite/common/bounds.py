"""Numbers that make sense: what is outside would only fail later, in torch's words, or take all memory."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from lavis_lite.common.errors import InputError

MAX_IMAGE_SIZE = 4096
"""Pixels of an image's side."""
MAX_WIDTH = 2**16
"""Width of a layer, and of what is projected."""
MAX_LAYERS = 512
MAX_TOKENS = 100_000
"""Tokens of a text."""

Bounds = tuple[float, float]


def check_numbers(section: str, values: Mapping[str, Any], **bounds: Bounds) -> None:
    """Raise InputError, which begins with `<section>.<key>`, for a value that is not a number within its bounds.

    Bounds are the least and the most that is allowed; two integers ask for a whole number. A key that `values` lacks is
    left alone.
    """
    for key, (least, most) in bounds.items():
        if key in values:
            check_number(f"{section}.{key}", values[key], least, most)


def check_number(name: str, value: Any, least: float, most: float) -> Any:
    """Return the number. InputError, which begins with `name`, if it is none, or outside of `least` to `most`."""
    is_whole = isinstance(least, int) and isinstance(most, int)
    kind, what = (Integral, "a whole number") if is_whole else (Real, "a number")
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name}: must be {what} from {least:,} to {most:,}, got {value!r}")
    return value


def check_divides(section: str, values: Mapping[str, Any], *, divisor: str, number: str) -> None:
    """Raise InputError unless `values[number]` is a multiple of `values[divisor]`."""
    if values[number] % values[divisor]:
        raise InputError(
            f"{section}.{divisor}: {number} {values[number]} is not a multiple of {divisor} {values[divisor]}"
        )
