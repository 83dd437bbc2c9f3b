"""Render scenes of `shapes`: drawn at four times the size and averaged down, so that edges are smooth."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from lavis_lite.datasets.shapes.scene import Scene, SceneObject

RGB = {
    "red": (214, 38, 38),
    "green": (40, 158, 60),
    "blue": (40, 84, 212),
    "yellow": (236, 204, 28),
    "purple": (140, 54, 176),
    "orange": (244, 132, 26),
    "black": (24, 24, 24),
    "brown": (124, 76, 40),
}
_OVERSAMPLING = 4

Points = list[tuple[float, float]]


def render(scene: Scene, image_size: int) -> Image.Image:
    """Return the scene as an RGB image of `image_size` x `image_size` pixels."""
    side = image_size * _OVERSAMPLING
    image = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _DRAW[thing.shape](draw, thing)
    return image.reduce(_OVERSAMPLING)


def save_jpeg(scene: Scene, path: Path, *, image_size: int, quality: int) -> None:
    """Render into a JPEG file; without chroma subsampling, which would smear colours at this size."""
    render(scene, image_size).save(path, "JPEG", quality=quality, subsampling=0)


def _circle(draw: ImageDraw.ImageDraw, thing: SceneObject) -> None:
    x, y, r = _place(thing)
    draw.ellipse((x - r, y - r, x + r, y + r), fill=RGB[thing.color])


def _polygon(corners: Points) -> Callable[[ImageDraw.ImageDraw, SceneObject], None]:
    """Return the function that draws a polygon with these corners, in units of the radius, y downwards."""

    def draw_polygon(draw: ImageDraw.ImageDraw, thing: SceneObject) -> None:
        x, y, r = _place(thing)
        draw.polygon([(round(x + dx * r), round(y + dy * r)) for dx, dy in corners], fill=RGB[thing.color])

    return draw_polygon


def _place(thing: SceneObject) -> tuple[float, float, float]:
    return thing.x * _OVERSAMPLING, thing.y * _OVERSAMPLING, thing.diameter * _OVERSAMPLING / 2


def _star_corners() -> Points:
    turns = [(math.pi * (i / 5 - 0.5), 1.0 if i % 2 == 0 else 0.45) for i in range(10)]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for turn, radius in turns]


def _cross_corners() -> Points:
    a = 0.36
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


_DRAW: dict[str, Callable[[ImageDraw.ImageDraw, SceneObject], None]] = {
    "circle": _circle,
    "square": _polygon([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
    "triangle": _polygon([(0, -1), (1, 0.9), (-1, 0.9)]),
    "cross": _polygon(_cross_corners()),
    "diamond": _polygon([(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]),
    "star": _polygon(_star_corners()),
}
