"""Predictions of every evaluation, one JSON object per line: what the result files of servers lack, in one form.

`<job>/predictions/<split>_step<step>.jsonl` of a training, `<split>.jsonl` of an evaluation.
"""

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from lavis_lite.common.checkpoint import write_text
from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record, StoredImage, printable
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.protocols import EvalDataset

FOLDER = "predictions"
KINDS = ("question_type", "answer_type", "group", "domain")
"""Fields of records that predictions keep, for tables by kind."""


class Candidate(TypedDict, total=False):
    """One of the best candidates of a ranking."""

    text: str
    image: str
    score: float
    is_right: bool


class Prediction(TypedDict, total=False):
    """A sample's prediction, and what was expected. Keys without a value are left out."""

    instance_id: str
    images: list[str]
    """Absolute paths of images or videos; of an image in a table, its place."""
    input: str
    """Question, statement, instruction, or the text of a query."""
    prediction: str
    prediction_image: str
    """The image that was found for a text."""
    references: list[str]
    score: float
    """The model's score of the prediction, where the task saves it."""
    metrics: dict[str, float]
    """The sample's own values of metrics, the one to judge it by first; in the metrics' units."""
    kinds: dict[str, str]
    rank: int
    """Of a ranking, the rank of the best right candidate, from 1; left out where it was not ranked."""
    candidates: list[Candidate]


def of_record(dataset: EvalDataset, record: Record, result: Mapping[str, Any]) -> Prediction:
    """Return what every task's prediction has: the id, the images, the kinds of the record, and the score if saved."""
    found: Prediction = {"instance_id": result["instance_id"], "images": image_paths(dataset, record)}
    if kinds := {kind: str(record[kind]) for kind in KINDS if record.get(kind) is not None}:
        found["kinds"] = kinds
    if isinstance(result.get("score"), float):
        found["score"] = result["score"]
    return found


def image_paths(dataset: object, record: Record) -> list[str]:
    """Return the absolute paths of a record's images or video; of an image in a table, its place."""
    if isinstance(stored := record.get("image"), StoredImage):
        return [str(stored)]
    if isinstance(dataset, BaseDataset):
        return [str((dataset.vis_root / file).absolute()) for file in dataset.files_of(record)]
    return [stored] if isinstance(stored, str) else []


def predictions_path(job_dir: Path, split: str, step: int | None) -> Path:
    """Return the file of a split's predictions after a step; None for an evaluation."""
    return job_dir / FOLDER / (f"{split}.jsonl" if step is None else f"{split}_step{step}.jsonl")


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write one JSON object per line."""
    lines = (printable(json.dumps(row, ensure_ascii=False)) for row in predictions)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_predictions(path: Path) -> list[Prediction]:
    """Return the predictions of a file. InputError names a line that is not one."""
    rows: list[Prediction] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not a JSON object ({error}); evaluate again") from None
            if not isinstance(row, dict) or "instance_id" not in row:
                raise InputError(f"{path}:{number}: not a prediction of an evaluation; evaluate again")
            rows.append(row)  # type: ignore[arg-type]  # written by this package
    return rows


def drawn(predictions: Sequence[Prediction], number: int, *, seed: int) -> list[Prediction]:
    """Return `number` predictions drawn at random by the seed, in the dataset's order; all if there are fewer."""
    chosen = random.Random(seed).sample(range(len(predictions)), min(number, len(predictions)))
    return [predictions[index] for index in sorted(chosen)]


def badness(prediction: Prediction) -> tuple[float, float]:
    """Return what predictions are sorted by, the worst first: their first metric, then their rank."""
    return next(iter(prediction["metrics"].values())), -prediction.get("rank", math.inf)


def worst(predictions: Sequence[Prediction], number: int, *, seed: int) -> list[Prediction]:
    """Return the predictions with the lowest metric, the worst first, equal ones in an order drawn by the seed; those
    without a metric do not count.
    """
    scored = [row for row in predictions if row.get("metrics")]
    random.Random(seed).shuffle(scored)
    return sorted(scored, key=badness)[:number]
