"""The questions of `shapes`, with ten answers each as in VQAv2, and its NLVR2 statements.

Yes/no questions are balanced, and a statement's label is drawn before the statement, per kind of statement: the text
alone says next to nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lavis_lite.common.errors import InputError
from lavis_lite.datasets.shapes.language import NUMBERS, RELATION_WORDS, STATEMENTS, plural, with_articles, words_of
from lavis_lite.datasets.shapes.scene import OPPOSITE, RELATIONS, Scene, SceneObject, ShapesConfig

YES_NO = ("yes", "no")
AXES = (("left", "right"), ("above", "below"))

QUESTIONS = (
    "What color is the {a}?",
    "What is the {color} shape?",
    "What size is the {a}?",
    "What is {relation} the {b}?",
    "What color is the shape {relation} the {b}?",
    "How many shapes are there?",
    "How many {kind} are there?",
    "Is there a {kind}?",
    "Is the {shape} {color}?",
    "Is the {a} {relation} the {b}?",
    "Is the {a} left or right of the {b}?",
    "Is the {a} above or below the {b}?",
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its one right answer, and the answers that an annotator might give."""

    text: str
    answer: str
    choices: tuple[str, ...]
    question_type: str
    answer_type: str

    def ten_answers(self, rng: random.Random) -> list[str]:
        """Return ten annotators' answers in random order; up to two of them are wrong."""
        wrong = [choice for choice in self.choices if choice != self.answer]
        num_wrong = rng.choice((0, 0, 0, 1, 2)) if wrong else 0
        answers = [self.answer] * (10 - num_wrong) + [rng.choice(wrong) for _ in range(num_wrong)]
        rng.shuffle(answers)
        return answers


class QuestionGenerator:
    """Makes the questions of one config."""

    def __init__(self, config: ShapesConfig) -> None:
        self.colors = tuple(config.color_names)
        self.shapes = tuple(config.shape_names)
        self.sizes = tuple(config.size_names)
        self.numbers = tuple(str(n) for n in range(config.max_objects + 1))

    def answer_list(self) -> list[str]:
        """Return every answer that a question can have."""
        sides = [word for axis in AXES for word in axis]
        return [*YES_NO, *self.numbers, *self.colors, *self.shapes, *self.sizes, *sides]

    def make(self, scene: Scene, count: int, rng: random.Random) -> list[Question]:
        """Return `count` different questions, of each kind in turn: colour, shape, number, yes/no, relation."""
        rounds = [self.color, self.shape, self.number, self.exists, self.relation]
        found: dict[str, Question] = {}
        for turn in range(20 * count):
            question = rounds[turn % len(rounds)](scene, rng) or self.relation(scene, rng) or self.exists(scene, rng)
            found.setdefault(question.text, question)
            if len(found) == count:
                break
        return list(found.values())

    def color(self, scene: Scene, rng: random.Random) -> Question | None:
        """Ask for the colour of an object; None for one that cannot be named without it."""
        thing = rng.choice(scene.things)
        name = refer(scene, thing)
        if name is None:
            return None
        return _question(f"What color is the {name}?", thing.color, self.colors, "what color is the", "other")

    def shape(self, scene: Scene, rng: random.Random) -> Question | None:
        """Ask for the shape or the size of an object; None for one whose colour others have too."""
        thing = rng.choice(scene.things)
        if len(self.sizes) > 1 and rng.random() < 0.3:
            name = f"{thing.color} {thing.shape}"
            return _question(f"What size is the {name}?", thing.size, self.sizes, "what size is the", "other")
        if sum(t.color == thing.color for t in scene.things) > 1:
            return None
        return _question(f"What is the {thing.color} shape?", thing.shape, self.shapes, "what is the", "other")

    def number(self, scene: Scene, rng: random.Random) -> Question:
        """Ask for the number of shapes, of all or of a colour or a shape."""
        draw = rng.random()
        if draw < 0.35:
            kind, number = "shapes", len(scene.things)
        elif draw < 0.7:
            color = rng.choice(rng.choice((self.colors, [t.color for t in scene.things])))
            kind, number = f"{color} shapes", sum(t.color == color for t in scene.things)
        else:
            shape = rng.choice(rng.choice((self.shapes, [t.shape for t in scene.things])))
            kind, number = plural(shape), sum(t.shape == shape for t in scene.things)
        return _question(f"How many {kind} are there?", str(number), self.numbers, "how many", "number")

    def exists(self, scene: Scene, rng: random.Random) -> Question:
        """Ask whether there is such an object: yes or no."""
        thing = rng.choice(scene.things)
        color, shape = thing.color, thing.shape
        answer = rng.choice(YES_NO)
        if answer == "no":
            # A near miss: one of the two words is right.
            absent = [(c, shape) for c in self.colors] + [(color, s) for s in self.shapes]
            there = {(t.color, t.shape) for t in scene.things}
            color, shape = rng.choice([kind for kind in absent if kind not in there])
        if len(scene.things) == 1 and shape == thing.shape and rng.random() < 0.4:
            return _question(f"Is the {shape} {color}?", answer, YES_NO, "is the", "yes/no")
        return _question(f"Is there a {color} {shape}?", answer, YES_NO, "is there a", "yes/no")

    def relation(self, scene: Scene, rng: random.Random) -> Question | None:
        """Ask for the relative position of two objects; None for a single one."""
        if len(scene.things) == 1:
            return None
        a, b = rng.sample(scene.things, 2)
        relation = rng.choice(scene.relations(a, b))
        name_a, name_b = f"{a.color} {a.shape}", f"{b.color} {b.shape}"
        if rng.random() < 0.5:
            answer = rng.choice(YES_NO)
            words = rng.choice(RELATION_WORDS[relation if answer == "yes" else OPPOSITE[relation]])
            return _question(f"Is the {name_a} {words} the {name_b}?", answer, YES_NO, "is the", "yes/no")
        alone = sum(scene.holds(t, relation, b) for t in scene.things) == 1
        words = rng.choice(RELATION_WORDS[relation])
        draw = rng.random()
        if alone and draw < 0.35:
            return _question(f"What is {words} the {name_b}?", a.shape, self.shapes, "what is", "other")
        if alone and draw < 0.7:
            text = f"What color is the shape {words} the {name_b}?"
            return _question(text, a.color, self.colors, "what color is the", "other")
        axis = AXES[RELATIONS.index(relation) // 2]
        sides = "left or right of" if axis == AXES[0] else "above or below"
        return _question(f"Is the {name_a} {sides} the {name_b}?", relation.split()[0], axis, "is the", "other")


def _question(text: str, answer: str, choices: Sequence[str], question_type: str, answer_type: str) -> Question:
    return Question(
        text=with_articles(text),
        answer=answer,
        choices=tuple(choices),
        question_type=question_type,
        answer_type=answer_type,
    )


def refer(scene: Scene, thing: SceneObject) -> str | None:
    """Return the shortest words for one object only ("circle", "small circle"), without its colour; None if none."""
    same = [t for t in scene.things if t.shape == thing.shape]
    if len(same) == 1:
        return thing.shape
    return f"{thing.size} {thing.shape}" if sum(t.size == thing.size for t in same) == 1 else None


def question_words() -> list[str]:
    """Return every fixed word of questions and answers, sorted and in lower case."""
    sides = [word for axis in AXES for word in axis]
    return sorted({word.lower() for word in words_of(QUESTIONS)} | {*YES_NO, *sides})


Statement = tuple[str, bool]


def statement(
    scenes: Sequence[Scene], first: int, wanted: bool, config: ShapesConfig, rng: random.Random
) -> tuple[str, int]:
    """Return a statement about scene `first` and another one with the wanted truth, and the other one's index."""
    for _ in range(1000):
        template = rng.choice(STATEMENTS)
        for _ in range(30):
            other = rng.randrange(len(scenes))
            pair = (scenes[first], scenes[other])
            text, truth = _state(template, pair, config, rng)
            if truth == wanted and (other != first or len(scenes) == 1):
                return text, other
    raise InputError("shapes: no NLVR2 statement found; allow more shapes, colors or objects")


def _state(template: str, pair: tuple[Scene, Scene], config: ShapesConfig, rng: random.Random) -> Statement:
    left, right = (len(scene.things) for scene in pair)
    if "{n}" in template:
        number = left + right + rng.choice((-1, 0, 1))
        return template.format(n=COUNT_WORDS[number]), number == left + right
    if "more shapes" in template:
        return template, left > right if template.startswith("the left") else right > left
    kind, fits = _kind(pair, config, rng)
    in_left, in_right = (any(fits(thing) for thing in scene.things) for scene in pair)
    truth = {
        "both": in_left and in_right,
        "exactly": in_left != in_right,
        "neither": not (in_left or in_right),
        "there": in_left if "left" in template else in_right,
    }
    return with_articles(template.format(kind=kind)), truth[template.split()[0]]


def _kind(
    pair: tuple[Scene, Scene], config: ShapesConfig, rng: random.Random
) -> tuple[str, Callable[[SceneObject], bool]]:
    """A kind of object, one of the scenes' or any, and the test for it."""
    if rng.random() < 0.7:
        thing = rng.choice(rng.choice(pair).things)
        color, shape = thing.color, thing.shape
    else:
        color, shape = rng.choice(config.color_names), rng.choice(config.shape_names)
    draw = rng.random()
    if draw < 0.3:
        return shape, lambda thing: thing.shape == shape
    if draw < 0.6:
        return f"{color} shape", lambda thing: thing.color == color
    return f"{color} {shape}", lambda thing: thing.color == color and thing.shape == shape


COUNT_WORDS = ("no", *NUMBERS.values(), "five", "six", "seven", "eight", "nine")
