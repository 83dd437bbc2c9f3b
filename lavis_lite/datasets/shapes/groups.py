"""The instructions of `shapes` about one scene, by task group; instructions.py chooses among them.

Every word is one that captions and questions have too, so the small tokenizers know it: a dialogue speaks of "its
color", for instance, because "it" is not one of them. Wrong options are drawn so that only the picture shows which
one is right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from lavis_lite.datasets.shapes.language import NUMBERS, RELATION_WORDS, phrase, plural, with_articles
from lavis_lite.datasets.shapes.questions import AXES, YES_NO, Question, QuestionGenerator, refer
from lavis_lite.datasets.shapes.scene import COLORS, RELATIONS, SHAPES, SIZES, Scene, SceneObject, ShapesConfig

TRUE_FALSE = ("true", "false")
TRIES = 8
"""Random draws of instructions per scene."""

GROUPS = ("color", "count", "relation", "yesno", "options", "statement", "dialogue")
Kind = tuple[str, str]  # colour and shape
Round = tuple[str, str]  # question and answer


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction without its image: the record's fields, the answers to choose from, the index of the right one.

    Among all of the same kind, the answers whose indices are `balanced` (None: all) should be equally frequent.
    """

    fields: dict[str, Any]
    candidates: tuple[str, ...]
    label: int
    balanced: Sequence[int] | None = None

    @property
    def text(self) -> str:
        """The question or the statement itself."""
        return self.fields.get("question") or self.fields["statement"]

    @cached_property
    def kind(self) -> str:
        """The text with classes for its colours, shapes, sizes and directions, and the number of candidates."""
        return f"{_PATTERN.sub(lambda word: _CLASSES.get(word[0], 'side'), self.text)} ({len(self.candidates)})"


class InstructionGenerator:
    """Makes the instructions of one config; `makers` has one method per group."""

    def __init__(self, config: ShapesConfig) -> None:
        self.config = config
        self.questions = QuestionGenerator(config)
        self.attributes = {"color": self.questions.colors, "shape": self.questions.shapes, "size": self.questions.sizes}
        self.makers: dict[str, Callable[[Scene, random.Random], list[Instruction]]] = {
            "color": lambda scene, rng: self.drawn(self.questions.color, scene, rng),
            "count": self.count,
            "relation": lambda scene, rng: self.drawn(self.questions.relation, scene, rng),
            "yesno": lambda scene, rng: self.drawn(self.questions.exists, scene, rng),
            "options": self.options,
            "statement": self.statements,
            "dialogue": self.dialogues,
        }

    def make(self, group: str, scene: Scene, rng: random.Random) -> list[Instruction]:
        """Return different instructions about the scene, in random order; perhaps none."""
        made = {repr(instruction.fields): instruction for instruction in self.makers[group](scene, rng)}
        return rng.sample(list(made.values()), len(made))

    def drawn(
        self, make: Callable[[Scene, random.Random], Question | None], scene: Scene, rng: random.Random
    ) -> list[Instruction]:
        """Return questions that `make` draws."""
        drawn = [make(scene, rng) for _ in range(TRIES)]
        return [_question(q.text.lower(), q.answer, q.choices) for q in drawn if q is not None]

    def count(self, scene: Scene, rng: random.Random) -> list[Instruction]:
        """Return questions about numbers: of a colour or a shape none, one or two are balanced; three are too rare."""
        low, high = self.config.min_objects, self.config.max_objects
        made = []
        for counting in self.drawn(self.questions.number, scene, rng):
            numbers = range(low, high + 1) if "many shapes" in counting.text else range(min(2, high) + 1)
            made.append(replace(counting, balanced=numbers))
        return made

    def statements(self, scene: Scene, rng: random.Random) -> list[Instruction]:
        """Return yes/no questions and numbers as statements."""
        made = []
        for make in (self.questions.exists, self.questions.relation):
            for question in self.drawn(make, scene, rng):
                if question.candidates == YES_NO:
                    text = _SUBJECT.sub(r"\1 is", question.text.removesuffix("?"))
                    made.append(_statement(text, is_true=question.label == YES_NO.index("yes")))
        for instruction in self.drawn(self.questions.number, scene, rng):
            counted = instruction.text.removeprefix("how many ").removesuffix(" are there?")
            low, high = (self.config.min_objects, self.config.max_objects) if counted == "shapes" else (0, 2)
            number = rng.choice((instruction.label, rng.randint(low, high)))
            if number <= high:
                made.append(_statement(_numbered(number, counted), is_true=instruction.label == number))
        return made

    def options(self, scene: Scene, rng: random.Random) -> list[Instruction]:
        """Return questions with three or four options: what is in the picture, on one side of an object, or of a size.

        All are kinds that the scene could hold as well as the right one: those of its other objects, and absent ones
        at random; or the absent ones of two colours times two shapes.
        """
        there = {(t.color, t.shape) for t in scene.things}
        absent = [kind for kind in product(self.questions.colors, self.questions.shapes) if kind not in there]
        rng.shuffle(absent)
        thing = rng.choice(scene.things)
        questions: list[tuple[str, SceneObject, list[Kind]]] = [("what is in the picture?", thing, [])]
        questions += [("what is in the picture?", thing, grid) for grid in _grids(thing, absent)[:1]]
        questions += [
            (text, right, [(t.color, t.shape) for t in others]) for text, right, others in self._pointed(scene)
        ]
        made = []
        for text, right, wrong in questions:
            wrong = (wrong + absent)[: max(len(wrong), rng.choice((2, 3)))]
            if len(wrong) > 1:
                options = [" ".join(kind) for kind in rng.sample([(right.color, right.shape), *wrong], len(wrong) + 1)]
                made.append(_question(text, phrase(right, sized=False), options, options=options))
        return made

    def _pointed(self, scene: Scene) -> Iterator[tuple[str, SceneObject, list[SceneObject]]]:
        """Yield questions that mean one object, with the other objects that could be meant."""
        for size in self.questions.sizes if len(self.questions.sizes) > 1 else ():
            right = [t for t in scene.things if t.size == size]
            if len(right) == 1:
                yield f"what is the {size} shape?", right[0], [t for t in scene.things if t is not right[0]]
        for other, relation in product(scene.things, RELATIONS):
            right = [t for t in scene.things if scene.holds(t, relation, other)]
            if len(right) == 1:
                others = [t for t in scene.things if t is not other and t is not right[0]]
                for words in RELATION_WORDS[relation]:
                    yield f"what is {words} the {phrase(other, sized=False)}?", right[0], others

    def dialogues(self, scene: Scene, rng: random.Random) -> list[Instruction]:
        """Return later rounds of dialogues: questions about the object that the first round has named."""
        made = []
        for _ in range(TRIES):
            thing = rng.choice(scene.things)
            opening, revealed = rng.choice(list(self._openings(scene, thing, rng)))
            rounds = [opening]
            follow_ups = list(self._follow_ups(scene, thing, opening[0], revealed))
            for text, answer, choices in rng.sample(follow_ups, min(2, len(follow_ups))):
                history = " ".join(f"{question} {reply}." for question, reply in rounds)
                made.append(_question(text, answer, choices, history=history))
                rounds.append((text, answer))
        return made

    def _openings(self, scene: Scene, thing: SceneObject, rng: random.Random) -> Iterator[tuple[Round, set[str]]]:
        """Yield first rounds that name the object, with the attributes that they reveal."""
        yield (with_articles(f"is there a {thing.color} {thing.shape}?"), "yes"), {"color", "shape"}
        if refer(scene, thing) == thing.shape:
            yield (f"is there a {thing.shape}?", "yes"), {"shape"}
            yield (f"what color is the {thing.shape}?", thing.color), {"color", "shape"}
        if sum(t.color == thing.color for t in scene.things) == 1:
            yield (with_articles(f"is there a {thing.color} shape?"), "yes"), {"color"}
            yield (f"what is the {thing.color} shape?", thing.shape), {"color", "shape"}
        for other, relation in product(scene.things, RELATIONS):
            if [t for t in scene.things if scene.holds(t, relation, other)] == [thing]:
                place = f"{rng.choice(RELATION_WORDS[relation])} the {phrase(other, sized=False)}"
                yield (f"what is {place}?", thing.shape), {"shape"}
                yield (f"what color is the shape {place}?", thing.color), {"color"}

    def _follow_ups(
        self, scene: Scene, thing: SceneObject, opening: str, revealed: set[str]
    ) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Yield questions about the object that need the first round to be understood, with their candidates."""
        values_of = {"color": thing.color, "shape": thing.shape, "size": thing.size}
        for attribute, value in values_of.items():
            if attribute not in revealed and len(self.attributes[attribute]) > 1:
                yield f"what is its {attribute}?", value, self.attributes[attribute]
        for other in scene.things:
            name = phrase(other, sized=False)
            if other is not thing and name not in opening:
                for relation in scene.relations(thing, other):
                    side = relation.split()[0]
                    axis = AXES[0] if side in AXES[0] else AXES[1]
                    words = "left or right of" if axis == AXES[0] else "above or below"
                    yield f"is the shape {words} the {name}?", side, axis


def _question(text: str, answer: str, choices: Sequence[str], **fields: Any) -> Instruction:
    return Instruction(
        fields={**fields, "question": text}, candidates=tuple(choices), label=list(choices).index(answer)
    )


def _statement(text: str, *, is_true: bool) -> Instruction:
    return Instruction(fields={"statement": text}, candidates=TRUE_FALSE, label=0 if is_true else 1)


def _numbered(number: int, counted: str) -> str:
    """ "there are exactly two circles" """
    if number == 0:
        return f"there are no {counted}"
    if number > 1:
        return f"there are exactly {NUMBERS[number]} {counted}"
    return f"there is exactly one {_SINGULARS.get(counted, counted.removesuffix('s'))}"


def _grids(thing: SceneObject, absent: list[Kind]) -> list[list[Kind]]:
    """Return sets of three absent kinds that make two colours times two shapes with the object's own kind."""
    grids = [
        [(thing.color, shape), (color, thing.shape), (color, shape)]
        for color, shape in absent
        if color != thing.color and shape != thing.shape
    ]
    return [grid for grid in grids if set(grid) <= set(absent)]


_SINGULARS = {plural(shape): shape for shape in SHAPES}
_CLASSES = (
    dict.fromkeys(COLORS, "color")
    | dict.fromkeys(SHAPES, "shape")
    | dict.fromkeys(_SINGULARS, "plural")
    | dict.fromkeys(SIZES, "size")
    | {"an": "a"}
)
_SIDES = sorted((words for wordings in RELATION_WORDS.values() for words in wordings), key=len, reverse=True)
_PATTERN = re.compile(rf"\b({'|'.join([*_SIDES, *_CLASSES])})\b")
_SUBJECT = re.compile(rf"^is (there|the (?:\w+ )?(?:{'|'.join(SHAPES)}))")
