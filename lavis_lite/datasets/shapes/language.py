"""The captions, pair texts and statements of `shapes`: about a hundred words, true of their scene by construction.

All wording is in the tables at the top, from which the tokenizer's vocabulary is read too.
`truth.parse_caption` parses every caption that is made here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence

from lavis_lite.datasets.shapes.scene import COLORS, SHAPES, SIZES, Scene, SceneObject

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

# {a}, {b}: object phrases without article; {n}, {color}, {shape}, {size}, {shapes}: words.
SINGLE_CAPTIONS = (
    "a {a}",
    "there is a {a}",
    "one shape a {a}",
    "a {a} on a plain background",
    "the {shape} is {color}",
    "a {color} {shape} on its own",
)
SIZED_SINGLE_CAPTIONS = ("the {color} {shape} is {size}", "a {color} {shape} that is {size}")
PAIR_CAPTIONS = (
    "a {a} {relation} a {b}",
    "a {a} is {relation} a {b}",
    "the {a} is {relation} the {b}",
    "there is a {a} {relation} a {b}",
)
LIST_CAPTIONS = ("{list}", "there are {n} shapes {list}", "{n} shapes {list}", "{list} on a plain background")
COUNT_CAPTIONS = ("there are {n} {kind}", "{n} {kind} on a plain background")
FULL_SINGLE_CAPTIONS = ("a {a}", "there is a {a}", "one shape a {a}", "a {a} on a plain background", "a {a} on its own")
FULL_PAIR_CAPTIONS = (
    "a {a} {relation} a {b}{rest}",
    "there is a {a} {relation} a {b}{rest}",
    "the {a} is {relation} the {b}{rest}",
)

MEANINGLESS_TEXTS = (
    "click here to download",
    "free photo of the day",
    "buy now free shipping",
    "image {digit} of {digit}",
    "home page photo",
    "new design for sale",
    "photo by the author",
    "img {digit} jpg",
)

STATEMENTS = (  # NLVR2: no relations, because training swaps the words left and right with the two images
    "both images contain a {kind}",
    "there is a {kind} in the left image",
    "there is a {kind} in the right image",
    "exactly one image contains a {kind}",
    "neither image contains a {kind}",
    "the left image has more shapes than the right image",
    "the right image has more shapes than the left image",
    "there are {n} shapes in total",
)


def phrase(thing: SceneObject, *, sized: bool) -> str:
    """Return an object as words without article: "small red circle"."""
    return f"{thing.size} {thing.color} {thing.shape}" if sized else f"{thing.color} {thing.shape}"


def with_articles(text: str) -> str:
    """Return the text with "an" where a vowel follows: "an orange circle"."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def plural(noun: str) -> str:
    """Return the plural of a shape's name."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def captions(
    scene: Scene, rng: random.Random, *, sizes: Sequence[str], relations: bool = True, count: int = 5
) -> list[str]:
    """Return `count` captions of the scene, all true, in random wording; different ones as far as there are enough."""
    sized = len(sizes) > 1
    return _different(lambda: _caption(scene, rng, sized=sized and rng.random() < 0.5, relations=relations), count)


def full_captions(scene: Scene, rng: random.Random, *, sizes: Sequence[str], count: int = 5) -> list[str]:
    """Return `count` true captions that each name every object with all its attributes, for retrieval."""
    return _different(lambda: _full_caption(scene, rng, sized=len(sizes) > 1), count)


def vocabulary() -> list[str]:
    """Return every word that captions, texts and statements can hold, sorted."""
    tables = (
        SINGLE_CAPTIONS, SIZED_SINGLE_CAPTIONS, PAIR_CAPTIONS, LIST_CAPTIONS, COUNT_CAPTIONS, FULL_SINGLE_CAPTIONS,
        FULL_PAIR_CAPTIONS, MEANINGLESS_TEXTS, STATEMENTS, *RELATION_WORDS.values(),
    )  # fmt: skip
    words = {*SHAPES, *map(plural, SHAPES), *COLORS, *SIZES, *NUMBERS.values(), "an", "and", "shape", "shapes"}
    return sorted(words | words_of(text for table in tables for text in table))


def words_of(templates: Iterable[str]) -> set[str]:
    """Return the fixed words of templates, placeholders left out."""
    return {word for text in templates for word in re.sub(r"\{\w+\}", " ", text).replace("?", " ").split()}


def counted_kinds(scene: Scene) -> list[tuple[int, str]]:
    """Return colours and shapes that several objects share, with their number: (2, "red shapes"), (2, "circles")."""
    kinds = []
    for values, name in (([t.color for t in scene.things], "{} shapes"), ([t.shape for t in scene.things], "{}")):
        for value in dict.fromkeys(values):
            if values.count(value) > 1:
                kinds.append((values.count(value), name.format(value if "{} " in name else plural(value))))
    return kinds


def _different(make: Callable[[], str], count: int) -> list[str]:
    """Return `count` texts, repeated only when several more tries bring no new one."""
    found: dict[str, None] = {}
    for _ in range(4 * count):
        found[with_articles(make())] = None
        if len(found) == count:
            break
    return (list(found) * count)[:count]


def _caption(scene: Scene, rng: random.Random, *, sized: bool, relations: bool) -> str:
    if len(scene.things) == 1:
        thing = scene.things[0]
        table = SINGLE_CAPTIONS + (SIZED_SINGLE_CAPTIONS if sized else ())
        return rng.choice(table).format(
            a=phrase(thing, sized=sized), shape=thing.shape, color=thing.color, size=thing.size
        )
    kinds = counted_kinds(scene)
    draw = rng.random()
    if kinds and draw < 0.15:
        number, kind = rng.choice(kinds)
        return rng.choice(COUNT_CAPTIONS).format(n=NUMBERS[number], kind=kind)
    things = rng.sample(scene.things, len(scene.things))
    if draw < 0.4 or not relations:
        listed = " and ".join(f"a {phrase(thing, sized=sized)}" for thing in things)
        return rng.choice(LIST_CAPTIONS).format(list=listed, n=NUMBERS[len(things)])
    a, b = things[:2]
    return rng.choice(PAIR_CAPTIONS).format(
        a=phrase(a, sized=sized), b=phrase(b, sized=sized), relation=_relation(scene, a, b, rng)
    )


def _full_caption(scene: Scene, rng: random.Random, *, sized: bool) -> str:
    if len(scene.things) == 1:
        return rng.choice(FULL_SINGLE_CAPTIONS).format(a=phrase(scene.things[0], sized=sized))
    a, b, *others = rng.sample(scene.things, len(scene.things))
    return rng.choice(FULL_PAIR_CAPTIONS).format(
        a=phrase(a, sized=sized),
        b=phrase(b, sized=sized),
        relation=_relation(scene, a, b, rng),
        rest="".join(f" and a {phrase(thing, sized=sized)}" for thing in others),
    )


def _relation(scene: Scene, a: SceneObject, b: SceneObject, rng: random.Random) -> str:
    return rng.choice(RELATION_WORDS[rng.choice(scene.relations(a, b))])
