"""The table of `lavis-lite capfilt`: each row's metrics over the seeds, and their gains over the first row."""

import math
import statistics
from collections.abc import Mapping, Sequence

QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 after these is at most 14 % too small."""

Found = Mapping[str, Mapping[str, Sequence[float]]]
"""Row -> column -> one value per seed, in the same order in every row."""


def interval(values: Sequence[float]) -> float | None:
    """Return half the 95 % interval of the mean of a few seeds' values, by Student's t; None for a single one."""
    count = len(values)
    if count < 2:
        return None
    quantile = QUANTILES[count - 2] if count - 2 < len(QUANTILES) else 1.96
    return quantile * statistics.stdev(values) / math.sqrt(count)


def shown(values: Sequence[float], *, sign: str = "") -> str:
    """Return mean and interval as text."""
    half = interval(values)
    return f"{statistics.fmean(values):{sign}.2f}" + ("" if half is None else f" ± {half:.2f}")


def table(found: Found) -> list[str]:
    """Return the lines: a row each, then the gain of each row over the first one, seed by seed."""
    columns = list(dict.fromkeys(column for values in found.values() for column in values))
    lines = [["", *columns]]
    lines += [[row, *(shown(values[column]) for column in columns)] for row, values in found.items()]
    first, *others = found
    for row in others:
        gains = {
            column: [b - a for a, b in zip(found[first][column], found[row][column], strict=True)] for column in columns
        }
        lines.append([f"{row} - {first}", *(shown(values, sign="+") for values in gains.values())])
    widths = [max(len(line[number]) for line in lines) for number in range(len(lines[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
