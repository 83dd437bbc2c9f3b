"""Curves as inline SVG, by matplotlib. Ink is `currentColor`, so a figure takes the colours of the page's scheme."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

INK = "#010203"
"""Stands for `currentColor`, which matplotlib does not know."""
COLORS = ("#3b76e0", "#d2691e", "#2c9a5b", "#a45ac0", "#b8860b", "#d04a7a", "#3a9aa8", "#808a9a")
SIZE = (4.2, 2.5)
MAX_POINTS = 300
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lavis_lite",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
}
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_numbers = count(1)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An SVG with its title, and in words what it shows."""

    title: str
    svg: str
    alt: str


def curve(
    title: str, series: Mapping[str, Points], *, label: str, last_step: int, steps_per_epoch: int | None = None
) -> Figure:
    """Return the curves of series by step, with epochs on a second axis; `label` is that of the vertical axis."""
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]  # its keys are literals
        canvas = Canvas(figsize=SIZE, layout="constrained")
        axes = canvas.add_subplot()
        for color, (name, points) in zip(_cycle(len(series)), series.items(), strict=True):
            xs, ys = _binned(points)
            marker = "o" if len(xs) <= 30 else ""
            axes.plot(xs, ys, color=color, linewidth=1.6, marker=marker, markersize=3, label=name)
        axes.set_xlabel("step")
        axes.set_title(label, loc="left", fontsize=9)  # beside the axis, the page's wider font would cover its numbers
        axes.set_xlim(0, 1.03 * last_step)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(color=INK, alpha=0.12, linewidth=0.8)
        if steps_per_epoch:
            epochs = (partial(scaled, factor=1 / steps_per_epoch), partial(scaled, factor=float(steps_per_epoch)))
            top = axes.secondary_xaxis("top", functions=epochs)
            top.set_xlabel("epoch")
            top.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    alt = f"{title}: " + "; ".join(described(name, points) for name, points in series.items())
    return Figure(title=title, svg=inline(buffer.getvalue(), alt), alt=alt)


def scaled(values: Any, *, factor: float) -> Any:
    """Return steps as epochs, or epochs as steps; a number or an array, as matplotlib gives it."""
    return values * factor


def described(name: str, points: Points) -> str:
    """Return in words how a curve begins and ends."""
    (first, start), (last, end) = points[0], points[-1]
    if len(points) == 1:
        return f"{name} is {start:.4g} at step {first:,.0f}"
    return f"{name} goes from {start:.4g} at step {first:,.0f} to {end:.4g} at step {last:,.0f}"


def inline(svg: str, alt: str) -> str:
    """Return matplotlib's SVG as part of a page: without headers, with ids of its own and a text for readers."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    prefix = f"f{next(_numbers)}-"
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r"(url\(#|href=\"#)", rf"\1{prefix}", body)
    box = re.search(r'viewBox="[^"]*"', body)
    assert box is not None, body[:300]
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg {names} {box[0]} role="img" aria-label="{label}">'
    return head + body[body.index(">") + 1 :].replace(INK, "currentColor")


def _cycle(number: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(number)]


def _binned(points: Points) -> tuple[list[float], list[float]]:
    """Return the points, of long curves the means of equal numbers of them."""
    xs, ys = (np.array(values, dtype=np.float64) for values in zip(*points, strict=True))
    if len(xs) > MAX_POINTS:
        parts = [np.array_split(values, MAX_POINTS) for values in (xs, ys)]
        xs, ys = (np.array([part.mean() for part in own]) for own in parts)
    return xs.tolist(), ys.tolist()
