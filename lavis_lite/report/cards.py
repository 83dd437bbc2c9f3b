"""Predictions as cards: images, what was asked, what came out, what was expected; confusions of classes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from lavis_lite.common.errors import UnreadableSample
from lavis_lite.common.page.render import data_address, file_name
from lavis_lite.datasets.image import open_image
from lavis_lite.tasks.predictions import Candidate, Prediction, drawn

PIXELS = 192
SMALL = 96
MAX_REFERENCES = 2
MAX_IMAGES = 2
MAX_CLASSES = 12
MAX_PAIRS = 20
NEAR = 5
"""The last rank that counts as a near miss."""
Unit = Callable[[str, float], float]
ACCURACY = "accuracy"
"""The metric of a sample, in percent, that says how right it is."""
NO_TEXT = "(no text)"
"""Shown where a model wrote nothing."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as a `data:` address, None if it cannot be read, and what it shows."""

    address: str | None
    alt: str
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A candidate of a ranking."""

    text: str
    picture: Picture | None
    score: str
    is_right: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """One prediction; `kind` is `right`, `some` (in part), `wrong`, or empty where there is nothing to judge it by."""

    pictures: list[Picture]
    input: str
    prediction: str
    kind: str
    verdict: str
    references: list[str]
    more: int
    """References that are not shown."""
    notes: list[str]
    choices: list[Choice] = field(default_factory=list)


def card_of(row: Prediction, unit: Unit, *, with_candidates: bool = False) -> Card:
    """Return the card of a prediction; `unit` turns a metric of a name into what is printed."""
    kind, verdict = judged(row)
    references = Counter(row.get("references", [])).most_common()
    notes = [f"{name} {unit(name, value):.2f}" for name, value in row.get("metrics", {}).items() if name != ACCURACY]
    if "score" in row:
        notes.append(f"score {row['score']:.3f}")
    if "rank" in row and row["rank"] > 1:
        notes.append(f"right one at rank {row['rank']:,}")
    described = references[0][0] if references else row.get("input", "")
    found = row.get("prediction_image")
    pictures = [picture(path, described) for path in row["images"][:MAX_IMAGES]]
    return Card(
        pictures=pictures if found is None else found_pictures(found, row["images"][0], row.get("input", "")),
        input=row.get("input", ""),
        prediction=(row["prediction"].strip() or NO_TEXT) if "prediction" in row else "",
        kind=kind,
        verdict=verdict,
        references=[
            text if number == 1 else f"{text} ({number} times)" for text, number in references[:MAX_REFERENCES]
        ],
        more=max(0, len(references) - MAX_REFERENCES),
        notes=notes,
        choices=[choice(one) for one in row.get("candidates", [])] if with_candidates else [],
    )


def judged(row: Prediction) -> tuple[str, str]:
    """Return how right a prediction is, as a kind and in words; both empty if its metrics do not say."""
    value = row.get("metrics", {}).get(ACCURACY)
    if value is None:
        return "", ""
    if value >= 100:
        return "right", "right"
    return ("some", f"right to {value:.0f} %") if value > 0 else ("wrong", "wrong")


def found_pictures(found: str, own: str, text: str) -> list[Picture]:
    """Return the image that was found for a text and, if that is wrong, the text's own."""
    first = Picture(address=address(found, PIXELS), alt=f"{file_name(found)}, found for: {text}", label="found")
    if found == own:
        return [first]
    return [first, Picture(address=address(own, PIXELS), alt=f"{file_name(own)}, the image of: {text}", label="right")]


def picture(path: str, described: str) -> Picture:
    """Return the picture of an image file; `described` is what it is said to show."""
    name = file_name(path)
    return Picture(address=address(path, PIXELS), alt=f"{name}: {described}" if described else name)


@lru_cache(maxsize=4096)
def address(path: str, pixels: int) -> str | None:
    """Return an image, made small, as a `data:` address; None if it cannot be read, as a video or a moved file."""
    try:
        return data_address(open_image(Path(path)), pixels)
    except UnreadableSample:
        return None


def choice(candidate: Candidate) -> Choice:
    """Return a candidate of a ranking."""
    path, is_right = candidate.get("image"), bool(candidate.get("is_right"))
    alt = f"{'the right' if is_right else 'another'} image, {file_name(path)}" if path else ""
    return Choice(
        text=candidate.get("text", file_name(path) if path else ""),
        picture=Picture(address=address(path, SMALL), alt=alt) if path else None,
        score=f"{candidate['score']:.3f}" if "score" in candidate else "",
        is_right=is_right,
    )


def near_misses(rows: Sequence[Prediction], number: int, *, seed: int) -> list[Prediction]:
    """Return queries whose right candidate is just below the first, drawn by the seed, the nearest first."""
    near = [row for row in rows if 2 <= row.get("rank", 0) <= NEAR and row.get("candidates")]
    return sorted(drawn(near, number, seed=seed), key=lambda row: row["rank"])


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Counts of right classes and predictions: a matrix, with rows of right classes, or the most frequent confusions
    where there are many classes.
    """

    classes: list[str]
    counts: list[list[int]]
    pairs: list[tuple[str, str, int]]

    def shade(self, row: int, column: int) -> float:
        """Return a cell's share of its row."""
        return self.counts[row][column] / max(1, sum(self.counts[row]))


def confusion(rows: Sequence[Prediction]) -> Confusion | None:
    """Return the confusions of a classification; None of predictions without a right class."""
    found = Counter((row["references"][0], row["prediction"]) for row in rows if row.get("references"))
    if not found:
        return None
    classes = sorted({name for pair in found for name in pair})
    wrong = [(right, chosen, number) for (right, chosen), number in found.most_common() if right != chosen]
    if len(classes) > MAX_CLASSES:
        return Confusion(classes=[], counts=[], pairs=wrong[:MAX_PAIRS])
    counts = [[found[right, chosen] for chosen in classes] for right in classes]
    return Confusion(classes=classes, counts=counts, pairs=[])


def by_kind(rows: Sequence[Prediction]) -> Iterator[tuple[str, Counter[str]]]:
    """Yield the number of predictions by value, of each field that records are divided by."""
    kinds = dict.fromkeys(kind for row in rows for kind in row.get("kinds", {}))
    for kind in kinds:
        yield kind, Counter(row["kinds"][kind] for row in rows if kind in row.get("kinds", {}))
