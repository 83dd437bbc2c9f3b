"""Scenes of the generated dataset `shapes`: coloured shapes on a plain background, and what is true of them.

Two objects of a scene never overlap and differ in colour or shape. On each axis two centres are either about level or
clearly apart (`margin`), so every relation is clearly true or clearly false. The split of a scene follows from a hash
of its objects on a coarse grid, so train, val and test share no scene, whatever their sizes.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "brown")
SIZES = {"small": 10.0, "large": 18.0, "medium": 14.0}  # diameters in pixels at 48 x 48
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "val", "test")

MOST = {
    "num_train": 10**7,
    "num_val": 10**7,
    "num_test": 10**7,
    "questions_per_image": 1000,
    "gallery_size": 10**7,
}
MOST_PIXELS = 4096

_SPLIT_SHARES = {"train": 70, "val": 15, "test": 15}  # of the hash's hundred buckets
_MAX_TRIES = 20_000


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object: `x`, `y` its centre and `diameter`, in pixels."""

    shape: str
    color: str
    size: str
    x: int
    y: int
    diameter: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """`things` in the order of drawing; `margin` is the least distance in pixels that makes a relation true."""

    things: tuple[SceneObject, ...]
    background: tuple[int, int, int]
    margin: int

    def holds(self, a: SceneObject, relation: str, b: SceneObject) -> bool:
        """Return whether a is left of (right of, above, below) b by at least the margin."""
        ahead = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
        return ahead[relation] >= self.margin

    def relations(self, a: SceneObject, b: SceneObject) -> list[str]:
        """Return all relations that hold from a to b: one or two, at least one."""
        return [relation for relation in RELATIONS if self.holds(a, relation, b)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        """Return the scene of `to_dict`'s data, also after it was JSON."""
        things = tuple(SceneObject(**thing) for thing in data["things"])
        return cls(things=things, background=tuple(data["background"]), margin=data["margin"])


@dataclass(kw_only=True)
class ShapesConfig:
    """The settings of the dataset. `shapes`, `colors`, `sizes`: how many of the known ones, or a list of names.

    `noise_share`: share of wrong texts among the web-style pairs. `gallery_size`: images of the retrieval test.
    `relations`: whether captions also say which object is left of or above which, or list and count them only.
    """

    num_train: int = 5000
    num_val: int = 500
    num_test: int = 500
    image_size: int = 48
    min_objects: int = 1
    max_objects: int = 3
    shapes: int | list[str] = 4
    colors: int | list[str] = 6
    sizes: int | list[str] = 2
    seed: int = 0
    noise_share: float = 0.3
    gallery_size: int = 200
    questions_per_image: int = 5
    jpeg_quality: int = 92
    relations: bool = True

    def check(self) -> None:
        """Raise InputError for values that no dataset can be made of."""
        for name, most in MOST.items():
            check_number(f"shapes: {name}", vars(self)[name], 1, most)
        if not 1 <= self.min_objects <= self.max_objects <= 4:
            raise InputError(
                f"shapes: need 1 <= min_objects <= max_objects <= 4, found {self.min_objects}, {self.max_objects}"
            )
        check_number("shapes: image_size", self.image_size, 32, MOST_PIXELS)
        check_number("shapes: noise_share", self.noise_share, 0.0, 1.0)
        check_number("shapes: jpeg_quality", self.jpeg_quality, 1, 100)
        for name, known, least in (("shapes", SHAPES, 2), ("colors", COLORS, 2), ("sizes", tuple(SIZES), 1)):
            choose(name, vars(self)[name], known, least)

    @property
    def shape_names(self) -> list[str]:
        return choose("shapes", self.shapes, SHAPES, 2)

    @property
    def color_names(self) -> list[str]:
        return choose("colors", self.colors, COLORS, 2)

    @property
    def size_names(self) -> list[str]:
        return choose("sizes", self.sizes, tuple(SIZES), 1)

    def resolved(self) -> dict[str, Any]:
        """Return the fields with names instead of counts: all that the dataset's content depends on."""
        names = {"shapes": self.shape_names, "colors": self.color_names, "sizes": self.size_names}
        return {f.name: names.get(f.name, vars(self)[f.name]) for f in fields(ShapesConfig)}


def choose(name: str, wanted: int | list[str], known: tuple[str, ...], least: int) -> list[str]:
    """Return the first `wanted` of the known names, or the named ones. Raises InputError."""
    if isinstance(wanted, int):
        if not least <= wanted <= len(known):
            raise InputError(f"shapes: {name} must be {least} to {len(known)} or a list of names, found {wanted}")
        return list(known[:wanted])
    unknown = [item for item in wanted if item not in known]
    if unknown or len(set(wanted)) != len(wanted) or len(wanted) < least:
        raise InputError(f"shapes: {name} must be {least} or more different ones of {', '.join(known)}; found {wanted}")
    return list(wanted)


@dataclass
class SceneMaker:
    """Draws the scenes of one config."""

    config: ShapesConfig
    scale: float = field(init=False)
    margin: int = field(init=False)

    def __post_init__(self) -> None:
        self.scale = self.config.image_size / 48
        self.margin = round(8 * self.scale)

    def make(self, split: str, rng: random.Random) -> Scene:
        """Return a random scene of the split; all draws come from `rng`."""
        low, high = self.config.min_objects, self.config.max_objects
        # Weighted by the number of objects: there are far fewer different scenes of one object than of several.
        count = rng.choices(range(low, high + 1), weights=range(low, high + 1))[0]
        for _ in range(_MAX_TRIES):
            things = self._things(count, rng)
            if self._valid(things) and self.split_of(things) == split:
                return Scene(things=tuple(things), background=self._background(rng), margin=self.margin)
        raise InputError(f"shapes: {count} objects do not fit into {self.config.image_size} pixels; lower max_objects")

    def key(self, things: list[SceneObject]) -> str:
        """Return the scene as a string: objects, attributes and cells of 4 pixels (at 48 x 48), in no order."""
        cell = 4 * self.scale
        return ";".join(sorted(f"{t.size} {t.color} {t.shape} {int(t.x / cell)} {int(t.y / cell)}" for t in things))

    def split_of(self, things: list[SceneObject]) -> str:
        """Return the only split that may have the scene."""
        bucket = int.from_bytes(hashlib.sha256(self.key(things).encode()).digest()[:4], "big") % 100
        for split, share in _SPLIT_SHARES.items():
            if bucket < share:
                return split
            bucket -= share
        raise AssertionError(bucket)

    def _things(self, count: int, rng: random.Random) -> list[SceneObject]:
        config = self.config
        kinds = [(color, shape) for color in config.color_names for shape in config.shape_names]
        things = []
        for color, shape in rng.sample(kinds, count):
            size = rng.choice(config.size_names)
            diameter = round((SIZES[size] + rng.uniform(-1, 1)) * self.scale)
            low = diameter // 2 + 2
            high = config.image_size - low
            things.append(
                SceneObject(
                    shape=shape,
                    color=color,
                    size=size,
                    x=rng.randint(low, high),
                    y=rng.randint(low, high),
                    diameter=diameter,
                )
            )
        return things

    def _valid(self, things: list[SceneObject]) -> bool:
        level = round(3 * self.scale)
        for i, a in enumerate(things):
            for b in things[:i]:
                dx, dy = abs(a.x - b.x), abs(a.y - b.y)
                if max(dx, dy) < (a.diameter + b.diameter) / 2 + 2:
                    return False
                if level < dx < self.margin or level < dy < self.margin:
                    return False
        return True

    def _background(self, rng: random.Random) -> tuple[int, int, int]:
        tone = rng.randint(205, 245)
        return tuple(min(255, tone + rng.randint(-8, 8)) for _ in range(3))  # type: ignore[return-value]
