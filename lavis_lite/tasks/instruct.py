"""Instructions: choose among a sample's candidates by their likelihood, or write, and score either.

Samples hold the complete instruction as `text_input`. Several candidates may mean the same class (the record's
`classes`: yes and true, say); a class ranks by its likeliest candidate. Only the area under the ROC curve compares
samples, by the log-likelihood ratio of two classes, for which InstructBLIP gives no formula: here a class is as likely
as its candidates together, and losses are sums over tokens. Datasets scored by VQA accuracy or as captions have their
own tasks, with the same samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record
from lavis_lite.common.registry import registry
from lavis_lite.datasets.instruct import InstructDataset
from lavis_lite.datasets.protocols import EvalDataset, Samples
from lavis_lite.models.base import BaseModel
from lavis_lite.models.protocols import Generates, ScoresCandidates, method_names
from lavis_lite.models.shared_images import encoded_once
from lavis_lite.tasks.base import DECODING_BOUNDS, BaseTask, Metrics, check_settings, naming_setting
from lavis_lite.tasks.metrics.dialog import ndcg, ranks_of, sparse_metrics
from lavis_lite.tasks.metrics.mean import Mean
from lavis_lite.tasks.metrics.ranking import rank_of, roc_auc
from lavis_lite.tasks.metrics.vqa_accuracy import by_kind, vqa_accuracy
from lavis_lite.tasks.predictions import Prediction, of_record
from lavis_lite.tasks.results import Result, as_list, per_sample, positions, split_scores, unscored, write_json
from lavis_lite.tasks.vqa import blanked

GROUPS = ("group", "question_type", "answer_type")
Metric = Literal["accuracy", "auc", "mrr"]
ServerFile = Literal["aokvqa", "visdial"]


class FollowsInstructions(Generates, ScoresCandidates, Protocol):
    """A model that writes, and ranks candidates."""


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
    rank of the right candidate, with Visual Dialog's other metrics; `auc`: area under the ROC curve between two
    classes, and as `auc_likeliest` the area where a class is as likely as its likeliest candidate."""
    save_scores: bool = False
    """Also write the `score` of each generated text to the result file; candidates always have their `losses` there."""
    blank_images: bool = False
    """Replace every image by one of the mean colour."""
    server_file: ServerFile | None = None
    """Also write the file of a leaderboard: A-OKVQA's multiple choice, or Visual Dialog's ranks."""

    resumes: ClassVar[bool] = True
    model_methods: ClassVar[tuple[str, ...]] = method_names(ScoresCandidates)
    sample_keys: ClassVar[tuple[str, ...]] = ("question_id", "instance_id")
    bounds: ClassVar = DECODING_BOUNDS
    choices: ClassVar = {"metric": get_args(Metric), "server_file": get_args(ServerFile)}

    def metric_names(self) -> tuple[str, ...]:
        """Return `metric`, the accuracy, and the tables by kind of question."""
        tables = tuple(f"per_{kind}" for kind in GROUPS)
        own = {"accuracy": tables, "auc": ("auc_likeliest",), "mrr": ("r1", "r5", "r10", "mean_rank", "ndcg", *tables)}
        return (self.metric, "accuracy", *own[self.metric])

    def check(self, model_class: type, dataset: EvalDataset, batch: Samples, *, split: str) -> None:
        """Raise InputError for settings that the model does not take, a model that does not write and has no candidates
        to score, or a metric that needs candidates.
        """
        if batch and "candidates" not in batch and not issubclass(model_class, Generates):
            problem = f"{model_class.__name__} scores candidates, and samples of the {split} split have none"
            raise InputError(f"run.task instruct: {problem}: choose other data, or a model that generates")
        if "candidates" not in batch:
            check_settings(model_class, "generate", self.generate_settings())
        if batch:
            for key in ("metric", "server_file"):
                self._check_choices("candidates" in batch, split, key=key)

    def _check_choices(self, has_candidates: bool, split: str, *, key: str = "metric") -> None:
        value = vars(self)[key]
        if value not in ("accuracy", None) and not has_candidates:
            advice = "choose accuracy" if key == "metric" else "leave it out"
            raise InputError(
                f"run.{key} {value!r} ranks candidates, and samples of the {split} split have none: {advice}"
            )

    def check_model(self, model: BaseModel, dataset: EvalDataset, batches: Sequence[Samples], *, split: str) -> None:
        """Raise InputError for lengths that the model has no room for."""
        for batch in (batch for batch in batches if "candidates" not in batch):
            with naming_setting(f"run.max_len={self.max_len}", batch, model):
                model.check_generate({**batch, "prompt": "{}"}, **self.decoding_settings())

    def valid_step(self, model: FollowsInstructions, samples: Samples) -> list[Result]:
        """Return `question_id` and `prediction` of each sample, and the `losses` of its candidates if it has any."""
        if self.blank_images:
            samples = blanked(samples)
        samples = {**encoded_once(model, samples), "prompt": "{}"}
        ids = as_list(samples["question_id"])
        if "candidates" not in samples:
            written: list[Any] = model.generate(samples, **self.generate_settings())
            if not self.save_scores:
                return per_sample(samples, question_id=ids, prediction=written)
            texts, scores = split_scores(written)
            return per_sample(samples, question_id=ids, prediction=texts, score=scores)
        candidates = samples["candidates"]
        rows = model.class_losses(samples, candidates, divided=False)
        if rows.isnan().any():
            question = ids[int(rows.isnan().any(dim=1).int().argmax())]
            raise InputError(f"losses of the candidates of question {question!r} are not numbers: try precision=fp32")
        losses = [row[: len(own)] for row, own in zip(rows.tolist(), candidates, strict=True)]
        chosen = [own[row.index(min(row))] for row, own in zip(losses, candidates, strict=True)]
        return per_sample(samples, question_id=ids, prediction=chosen, losses=losses)

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Write `<split>_predictions.json`; return the metric, also by the record's group, question and answer type.

        With `auc` and `mrr` also the accuracy.
        """
        write_json(result_dir / f"{split}_predictions{'_blank' if self.blank_images else ''}.json", results)
        index = positions(dataset)
        pairs = [(dataset.annotation[index[result["instance_id"]]], result) for result in results]
        if self.server_file is not None:
            self._check_choices(all("losses" in result for result in results), split, key="server_file")
            write_json(
                result_dir / f"{split}_{self.server_file}_submission.json", SERVER_FILES[self.server_file](pairs)
            )
        scored = [(record, result) for record, result in pairs if has_truth(record, result)]
        if not scored:
            return unscored(f"the {split} split has no answers")
        records = [record for record, _ in scored]
        hits = [hit(record, result) for record, result in scored]
        accuracy = Mean(100 * sum(hits) / len(hits), [100 * hit for hit in hits])
        if self.metric == "accuracy":
            return {"accuracy": accuracy, "agg_metrics": accuracy, **by_kind(records, hits, GROUPS)}
        if self.metric == "auc":
            area, likeliest = class_areas(scored)
            return {"auc": area, "auc_likeliest": likeliest, "accuracy": accuracy, "agg_metrics": area}
        ranks = [
            right_rank(record, result["losses"])
            if record.get("classes")
            else ranks_of(result["losses"])[record["label"]]
            for record, result in scored
        ]
        found = sparse_metrics(ranks)
        dense = [
            (ranks_of(result["losses"]), record["relevance"]) for record, result in pairs if record.get("relevance")
        ]
        if dense:
            found["ndcg"] = ndcg(*zip(*dense, strict=True))
        by_group = by_kind(records, [1 / rank for rank in ranks], GROUPS)
        return {**found, "accuracy": accuracy, "agg_metrics": found["mrr"], **by_group}

    def predictions(
        self, results: list[Result], metrics: Metrics, *, dataset: EvalDataset, split: str
    ) -> list[Prediction]:
        """Return each instruction's answer, with the right ones and, of candidates, the rank of the right one."""
        index, found = positions(dataset), []
        for result in results:
            record = dataset.annotation[index[result["instance_id"]]]
            row = of_record(dataset, record, result)
            asked = dataset.instruction(record) if isinstance(dataset, InstructDataset) else record.get("question", "")
            row |= {"input": str(asked), "prediction": result["prediction"]}
            if has_truth(record, result):
                answers = record.get("answers") or [record["candidates"][record["label"]]]
                row |= {"references": list(map(str, answers)), "metrics": {"accuracy": 100 * hit(record, result)}}
                if "losses" in result:
                    row["rank"] = right_rank(record, result["losses"])
            found.append(row)
        return found


Pairs = Sequence[tuple[Record, Result]]


def aokvqa_choices(pairs: Pairs) -> dict[str, dict[str, str]]:
    """Return the multiple-choice entries of A-OKVQA's leaderboard file by question id."""
    return {str(result["question_id"]): {"multiple_choice": result["prediction"]} for _, result in pairs}


def visdial_ranks(pairs: Pairs) -> list[dict[str, Any]]:
    """Return the entries of Visual Dialog's server file: the rank, from 1, of each option of a round."""
    entries = []
    for _, result in pairs:
        image_id, _, round_id = str(result["question_id"]).rpartition("_")
        if not (image_id.isdigit() and round_id.isdigit()):
            raise InputError(
                f"run.server_file: question_id {result['question_id']!r} is not <image id>_<round>, as the reader "
                "`visdial` makes them"
            )
        entries.append({"image_id": int(image_id), "round_id": int(round_id), "ranks": ranks_of(result["losses"])})
    return entries


SERVER_FILES: dict[ServerFile, Callable[[Pairs], Any]] = {"aokvqa": aokvqa_choices, "visdial": visdial_ranks}

ClassLosses = tuple[list[list[float]], int]
"""The losses of each class's candidates, and the index of the right class."""


def has_truth(record: Record, result: Result) -> bool:
    """Return whether the label of a choice is known, or an answer of a sample without candidates."""
    return record.get("label") is not None if "losses" in result else bool(record.get("answers"))


def by_class(record: Record, losses: Sequence[float]) -> ClassLosses:
    """Return the losses by class, in order of the class numbers; without `classes` each candidate is a class."""
    classes: Sequence[Any] = record.get("classes") or record["candidates"]
    found: dict[Any, list[float]] = {}
    for name, loss in zip(classes, losses, strict=True):
        found.setdefault(name, []).append(loss)
    names = sorted(found) if record.get("classes") else list(found)
    return [found[name] for name in names], names.index(classes[record["label"]])


def right_rank(record: Record, losses: Sequence[float]) -> int:
    """Return the rank of the right class, from 1."""
    found, right = by_class(record, losses)
    return rank_of([min(own) for own in found], right)


def hit(record: Record, result: Result) -> float:
    """Return 1 for a right answer, 0 for a wrong one."""
    if "losses" in result:
        return float(right_rank(record, result["losses"]) == 1)
    return vqa_accuracy(result["prediction"], record["answers"], variant="normalised")


def joint(losses: Sequence[float]) -> float:
    """Return the negative log-likelihood that any one of the candidates is written, from the candidates' own."""
    least = min(losses)
    return least - math.log(sum(math.exp(least - loss) for loss in losses))


def class_areas(scored: Sequence[tuple[Record, Result]]) -> tuple[float, float]:
    """Return the area under the ROC curve with a class's loss as that of all its candidates, and of the likeliest.

    Raises InputError if a sample's candidates are not of two classes.
    """
    samples = [by_class(record, result["losses"]) for record, result in scored]
    if wrong := [
        record["candidates"] for (record, _), (found, _) in zip(scored, samples, strict=True) if len(found) != 2
    ]:
        problem = f"{wrong[0]} are not two: say in `classes` which of them mean the same"
        raise InputError(f"run.metric 'auc' is between two classes, but {problem}, or choose accuracy or mrr")
    is_second = [right == 1 for _, right in samples]
    area, likeliest = (
        roc_auc([loss_of(first) - loss_of(second) for (first, second), _ in samples], is_second)
        for loss_of in (joint, min)
    )
    return area, likeliest
