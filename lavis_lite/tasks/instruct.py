"""Instructions: choose among a sample's candidates by their likelihood, or write, and score either.

Samples hold the complete instruction as `text_input`. Candidates may stand for the same class (the record's `classes`:
yes and true, say): the likeliest then speaks for the class. Only the area under the ROC curve compares samples, by the
log-likelihood ratio of two classes, for which InstructBLIP gives no formula: a class is as likely as its candidates
together, losses are sums over tokens. Sets scored by VQA accuracy or as captions have their own tasks, with the same
samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.tasks.base import (
    MOST_BEAMS,
    MOST_TOKENS,
    BaseTask,
    Metrics,
    Samples,
    check_method,
    check_range,
)
from lavis_lite.tasks.metrics.ranking import mean_reciprocal_rank, rank_of, roc_auc
from lavis_lite.tasks.metrics.vqa_accuracy import by_kind, vqa_accuracy
from lavis_lite.tasks.results import (
    Result,
    as_list,
    per_sample,
    write_json,
)
from lavis_lite.tasks.vqa import blanked

GENERATE_ARGUMENTS = {
    "num_beams": "num_beams",
    "max_length": "max_len",
    "min_length": "min_len",
    "length_penalty": "length_penalty",
    "repetition_penalty": "repetition_penalty",
}
GROUPS = ("group", "question_type", "answer_type")
Metric = Literal["accuracy", "auc", "mrr"]
Record = dict[str, Any]


@registry.register_task("instruct")
@dataclass(kw_only=True)
class InstructTask(BaseTask):
    """Instruction following; lengths are in tokens. `agg_metrics` is `metric`, in percent."""

    num_beams: int = 5
    max_len: int = 30
    min_len: int = 1
    length_penalty: float | None = None
    """None leaves it, as the next, to the model."""
    repetition_penalty: float | None = None
    metric: Metric = "accuracy"
    """`accuracy`: the right candidate is the likeliest, or the cleaned text is a right answer; `mrr`: mean reciprocal
    rank of the right candidate; `auc`: area under the ROC curve between two classes, and as `auc_likeliest` that where
    a class is as likely as its likeliest candidate."""
    blank_images: bool = False
    """Answer with every image blanked to the mean colour."""

    model_methods: ClassVar[tuple[str, ...]] = ("generate", "class_losses")
    sample_keys: ClassVar[tuple[str, ...]] = ("question_id", "instance_id")

    def __post_init__(self) -> None:
        check_range(
            self,
            num_beams=(1, MOST_BEAMS),
            max_len=(1, MOST_TOKENS),
            min_len=(0, MOST_TOKENS),
            length_penalty=(-1000.0, 1000.0),
            repetition_penalty=(1e-3, 1000),
        )
        if self.metric not in get_args(Metric):
            raise InputError(f"run.metric must be one of {', '.join(get_args(Metric))}, got {self.metric!r}")

    def check(self, model_class: type, dataset: Any, batch: Samples, *, split: str) -> None:
        """Raise for settings that the model does not take, and for a metric of choices where there are none."""
        if "candidates" in batch:
            return
        self.arguments_for(model_class.generate, GENERATE_ARGUMENTS)
        if self.metric != "accuracy" and batch:
            check_choices([batch], self.metric, split)

    def check_model(self, model: nn.Module, dataset: Any, batches: Sequence[Samples], *, split: str) -> None:
        """Raise for lengths that the model does not have room for."""
        names = {"max_length": "max_len", "min_length": "min_len"}
        for samples in batches:
            if "candidates" not in samples:
                samples = {**samples, "prompt": "{}"}
                check_method(self, model, "generate", samples, names, setting=f"run.max_len={self.max_len}")

    def valid_step(self, model: nn.Module, samples: Samples) -> list[Result]:
        """`question_id` and `prediction` of each sample, and the `losses` of its candidates if it has any."""
        if self.blank_images:
            samples = blanked(samples)
        samples = {**samples, "prompt": "{}"}
        ids = as_list(samples["question_id"])
        if "candidates" not in samples:
            arguments = self.arguments_for(model.generate, GENERATE_ARGUMENTS)
            return per_sample(samples, question_id=ids, prediction=model.generate(samples, **arguments))
        candidates = samples["candidates"]
        rows = model.class_losses(samples, candidates, divided=False)
        if rows.isnan().any():
            raise InputError(
                f"the candidates of question {ids[int(rows.isnan().any(dim=1).int().argmax())]!r} have losses that are "
                "not numbers: the model's weights are broken, or overflow in this precision (run.precision=fp32)"
            )
        losses = [row[: len(own)] for row, own in zip(rows.tolist(), candidates, strict=True)]
        chosen = [own[row.index(min(row))] for row, own in zip(losses, candidates, strict=True)]
        return per_sample(samples, question_id=ids, prediction=chosen, losses=losses)

    def score(self, results: list[Result], *, dataset: Any, split: str, result_dir: Path) -> Metrics:
        """Write `<split>_predictions.json`; the metric, also by the record's group, question and answer type.

        With `auc` and `mrr` also the accuracy. Without any right answer in the split, only the file is written.
        """
        write_json(result_dir / f"{split}_predictions{'_blank' if self.blank_images else ''}.json", results)
        records = {result["instance_id"]: dataset.annotation[int(result["instance_id"])] for result in results}
        judged = [result for result in results if has_truth(records[result["instance_id"]], result)]
        if not judged:
            return {"agg_metrics": None, "note": f"the {split} split has no answers: only the result file was written"}
        if self.metric != "accuracy":
            check_choices(judged, self.metric, split)
        pairs = [(records[result["instance_id"]], result) for result in judged]
        hits = {result["instance_id"]: hit(record, result) for record, result in pairs}
        accuracy = 100 * sum(hits.values()) / len(hits)
        truths = {key: records[key] for key in hits}
        if self.metric == "accuracy":
            return {"accuracy": accuracy, "agg_metrics": accuracy, **by_kind(truths, hits, GROUPS)}
        if self.metric == "auc":
            classes = [two_classes(record, result["losses"]) for record, result in pairs]
            is_second = [right == 1 for _, right in classes]
            area, likeliest = (
                roc_auc([of(first) - of(second) for (first, second), _ in classes], is_second) for of in (joint, min)
            )
            return {"auc": area, "auc_likeliest": likeliest, "accuracy": accuracy, "agg_metrics": area}
        ranks = {result["instance_id"]: right_rank(record, result["losses"]) for record, result in pairs}
        mrr = mean_reciprocal_rank(list(ranks.values()))
        by_group = by_kind(truths, {key: 1 / rank for key, rank in ranks.items()}, GROUPS)
        return {"mrr": mrr, "accuracy": accuracy, "agg_metrics": mrr, **by_group}


def has_truth(record: Record, result: Result) -> bool:
    """Whether it is known what is right: the label of a choice, any answer where there are no candidates."""
    return record.get("label") is not None if "losses" in result else bool(record.get("answers"))


def by_class(record: Record, losses: Sequence[float]) -> tuple[list[list[float]], int]:
    """The losses of each class's candidates, and which class is right.

    Classes are in order of their numbers; without `classes` each text is one, in order of the candidates.
    """
    classes = record.get("classes") or record["candidates"]
    found: dict[Any, list[float]] = {}
    for name, loss in zip(classes, losses, strict=True):
        found.setdefault(name, []).append(loss)
    names = sorted(found) if record.get("classes") else list(found)
    return [found[name] for name in names], names.index(classes[record["label"]])


def right_rank(record: Record, losses: Sequence[float]) -> int:
    """The right class's place, from 1."""
    found, right = by_class(record, losses)
    return rank_of([min(own) for own in found], right)


def hit(record: Record, result: Result) -> float:
    """1 for a right answer, 0 for a wrong one."""
    if "losses" in result:
        return float(right_rank(record, result["losses"]) == 1)
    return vqa_accuracy(result["prediction"], record["answers"], variant="normalised")


def joint(losses: Sequence[float]) -> float:
    """The negative log-likelihood of any one of the candidates being written, given each one's own."""
    least = min(losses)
    return least - math.log(sum(math.exp(least - loss) for loss in losses))


def two_classes(record: Record, losses: Sequence[float]) -> tuple[list[list[float]], int]:
    """As `by_class`; ValueError if there are not two classes."""
    found, right = by_class(record, losses)
    if len(found) != 2:
        raise InputError(
            f"run.metric 'auc' is between two classes, but {record['candidates']} are {len(found)}: say in the "
            "record's `classes` which candidates mean the same, or choose accuracy or mrr"
        )
    return found, right


def check_choices(results: Sequence[Result], metric: str, split: str) -> None:
    """Raise ValueError if a sample was answered without candidates."""
    if any("losses" not in result for result in results):
        raise InputError(
            f"run.metric {metric!r} ranks candidates, and samples of the {split} split have none: choose accuracy"
        )
