"""Is a caption true of a `shapes` scene? A parser of the dataset's language, and the metric `true_rate`.

A caption is true if it can be read and every claim in it holds, with different objects for the different ones it lists
("a red circle and a red circle" needs two). It need not be complete; but a caption without colour, shape and size
counts as false, and so does one that cannot be parsed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from lavis_lite.common.errors import InputError, UnknownNameError
from lavis_lite.datasets.shapes.language import NUMBERS, RELATION_WORDS, plural
from lavis_lite.datasets.shapes.scene import COLORS, SHAPES, SIZES, Scene, SceneObject


@dataclass(frozen=True)
class Phrase:
    """The attributes that a noun phrase names; None for the others."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    def fits(self, thing: SceneObject) -> bool:
        """Return whether the object has these attributes."""
        return all(
            named in (None, actual) for named, actual in zip(self, (thing.size, thing.color, thing.shape), strict=True)
        )

    def __iter__(self) -> Any:
        return iter((self.size, self.color, self.shape))


@dataclass(frozen=True)
class Exists:
    """The claim that such an object exists, other than those of the caption's other `Exists` claims."""

    phrase: Phrase


@dataclass(frozen=True)
class Count:
    """Exactly `number` objects fit the phrase."""

    number: int
    phrase: Phrase


@dataclass(frozen=True)
class Relation:
    """The object of the caption's `Exists` claim number `a` (from 0) has this relation to that of number `b`."""

    a: int
    relation: str
    b: int


Claim = Exists | Count | Relation

_NUMBERS = {word: number for number, word in NUMBERS.items()}
_PLURALS = {plural(shape): shape for shape in SHAPES} | {"shapes": None}
_SINGULARS = {shape: shape for shape in SHAPES} | {"shape": None}
_RELATIONS = sorted(
    ((words.split(), relation) for relation, wordings in RELATION_WORDS.items() for words in wordings),
    key=lambda item: -len(item[0]),
)
_ARTICLES = ("a", "an", "the")
_OPENINGS = (["there", "is"], ["there", "are"], ["a", "picture", "of"], ["a", "photo", "of"])


def parse_caption(text: str) -> list[Claim] | None:
    """Return the claims of a caption, or None if it is not in the language. Case and punctuation are ignored."""
    words = re.sub(r"[^a-z ]+", " ", text.lower()).split()
    try:
        return _Parser(words).caption()
    except _UnreadableCaption:
        return None


def is_true(text: str, scene: Scene | dict[str, Any]) -> bool:
    """Return whether the caption can be parsed, names an attribute, and is true of the scene (or its JSON form)."""
    scene = scene if isinstance(scene, Scene) else Scene.from_dict(scene)
    claims = parse_caption(text)
    if claims is None or not any(any(c.phrase) for c in claims if not isinstance(c, Relation)):
        return False
    if any(sum(c.phrase.fits(t) for t in scene.things) != c.number for c in claims if isinstance(c, Count)):
        return False
    phrases = [claim.phrase for claim in claims if isinstance(claim, Exists)]
    relations = [claim for claim in claims if isinstance(claim, Relation)]
    return any(_fits(chosen, phrases, relations, scene) for chosen in permutations(scene.things, len(phrases)))


def true_rate(captions: Mapping[Any, str], scenes: Mapping[Any, Scene | dict[str, Any]]) -> float:
    """Return the percentage of captions that are true of the scene with the same id; ids are compared as strings."""
    if not captions:
        raise InputError("true_rate needs at least one caption")
    by_id = {str(key): scene for key, scene in scenes.items()}
    missing = [key for key in captions if str(key) not in by_id]
    if missing:
        raise UnknownNameError(f"no scene for image id {missing[0]!r} ({len(missing)} of {len(captions)} captions)")
    return 100.0 * sum(is_true(text, by_id[str(key)]) for key, text in captions.items()) / len(captions)


def _fits(chosen: tuple[SceneObject, ...], phrases: list[Phrase], relations: list[Relation], scene: Scene) -> bool:
    return all(phrase.fits(thing) for phrase, thing in zip(phrases, chosen, strict=True)) and all(
        scene.holds(chosen[claim.a], claim.relation, chosen[claim.b]) for claim in relations
    )


class _UnreadableCaption(Exception):
    pass


class _Parser:
    """Recursive descent: caption = [opening] item {"and" item} [ending]; item = counted kind | object [what it is]."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.claims: list[Claim] = []
        self.num_objects = 0

    def caption(self) -> list[Claim]:
        while self._take_any(_OPENINGS):
            pass
        self._item()
        while self.words and not self._ending():
            # "two shapes a red circle and ..." has no "and" after its number.
            if not self._take("and") and not isinstance(self.claims[-1], Count):
                raise _UnreadableCaption
            self._item()
        if self.words:
            raise _UnreadableCaption
        return self.claims

    def _item(self) -> None:
        if self.words and self.words[0] in _NUMBERS:
            number = _NUMBERS[self.words.pop(0)]
            self.claims.append(Count(number, self._phrase(_SINGULARS if number == 1 else _PLURALS)))
            return
        subject = self._object()
        linked = self._take("is") or self._take("that", "is")
        relation = self._relation()
        if relation:
            self.claims.append(Relation(subject, relation, self._object()))
        elif linked:
            self._attribute(subject)

    def _ending(self) -> bool:
        if self._take("on", "its", "own"):
            self.claims.append(Count(1, Phrase()))
            return True
        return self._take("on", "a", "plain", "background")

    def _object(self) -> int:
        if not self._take_any([[article] for article in _ARTICLES]):
            raise _UnreadableCaption
        self.claims.append(Exists(self._phrase(_SINGULARS)))
        self.num_objects += 1
        return self.num_objects - 1

    def _phrase(self, nouns: dict[str, str | None]) -> Phrase:
        size = self.words.pop(0) if self.words and self.words[0] in SIZES else None
        color = self.words.pop(0) if self.words and self.words[0] in COLORS else None
        if not self.words or self.words[0] not in nouns:
            raise _UnreadableCaption
        return Phrase(size, color, nouns[self.words.pop(0)])

    def _attribute(self, subject: int) -> None:
        """ "the circle is red": add the attribute to the last object's phrase, unless it has one."""
        word = self.words.pop(0) if self.words else ""
        claim = self.claims[-1]
        assert isinstance(claim, Exists), claim
        assert subject == self.num_objects - 1, subject
        size, color, shape = claim.phrase
        if word in SIZES and size in (None, word):
            size = word
        elif word in COLORS and color in (None, word):
            color = word
        else:
            raise _UnreadableCaption
        self.claims[-1] = Exists(Phrase(size, color, shape))

    def _relation(self) -> str | None:
        for words, relation in _RELATIONS:
            if self._take(*words):
                return relation
        return None

    def _take_any(self, options: Any) -> bool:
        return any(self._take(*words) for words in options)

    def _take(self, *words: str) -> bool:
        if self.words[: len(words)] != list(words):
            return False
        del self.words[: len(words)]
        return True
