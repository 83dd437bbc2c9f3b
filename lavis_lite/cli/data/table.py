"""Tables and sizes of the reports."""

from collections.abc import Sequence

UNITS = ("B", "kB", "MB", "GB", "TB")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; columns that are empty in all rows are left out."""
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    cells = [[row[column] for column in kept] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def size_text(num_bytes: int | None) -> str:
    """Return a size in decimal units, such as `13.5 GB`; empty for None."""
    if num_bytes is None:
        return ""
    value, unit = float(num_bytes), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {UNITS[unit]}" if unit == 0 or value >= 99.5 else f"{value:.1f} {UNITS[unit]}"
