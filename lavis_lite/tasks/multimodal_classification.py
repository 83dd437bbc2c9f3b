"""Classification of an image and a text (NLVR2, SNLI-VE): accuracy in percent.

Language models choose between the names of the classes, or between the candidates that the samples have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record
from lavis_lite.common.registry import registry
from lavis_lite.datasets.protocols import EvalDataset, HasClasses, HasLabels, Samples
from lavis_lite.models.protocols import Classifies, ScoresCandidates, method_names
from lavis_lite.models.shared_images import encoded_once
from lavis_lite.tasks.base import DECODING_BOUNDS, BaseTask, Metrics
from lavis_lite.tasks.metrics.mean import Mean
from lavis_lite.tasks.metrics.nlvr import consistency
from lavis_lite.tasks.predictions import Prediction, of_record
from lavis_lite.tasks.results import Result, per_sample, positions, unscored, write_json


@registry.register_task("multimodal_classification")
@dataclass(kw_only=True)
class MultimodalClassificationTask(BaseTask):
    """The class with the highest logit of `model.predict`, against the sample's label.

    The fields are settings of language models; lengths are in tokens.
    """

    segments: int = 1
    """`n_segments` of `class_losses`."""
    max_len: int = 30
    """This and the next two: for a model with `predict_with_gen`, which writes the class."""
    min_len: int = 1
    length_penalty: float | None = None
    """None leaves it to the model."""

    bounds: ClassVar = {**DECODING_BOUNDS, "segments": (1, 10**6)}
    resumes: ClassVar[bool] = True
    model_methods: ClassVar[tuple[str, ...]] = method_names(Classifies)
    sample_keys: ClassVar[tuple[str, ...]] = ("instance_id",)

    def build_datasets(self, cfg: Config) -> dict[str, dict[str, Any]]:
        """Build the datasets as BaseTask does. Raises InputError for a label that is not one of the model's classes."""
        built = super().build_datasets(cfg)
        num_classes = cfg.model.get("num_classes") or math.inf
        for dataset in (dataset for splits in built.values() for dataset in splits.values()):
            labels = list(dataset.labels) if isinstance(dataset, HasLabels) else []
            if labels and (largest := max(labels)) >= num_classes:
                where = dataset.place(labels.index(largest))
                raise InputError(f"{where}: label {largest} is not below model.num_classes={num_classes}: raise it")
        return built

    def check(self, model_class: type, dataset: EvalDataset, batch: Samples, *, split: str) -> None:
        """Raise InputError if a language model has no names of classes to choose from."""
        ranks = any("class_losses" in vars(owner) for owner in model_class.__mro__)
        if ranks and batch and "candidates" not in batch | self.batch_context(dataset):
            problem = f"{model_class.__name__} chooses between names of classes, and the {split} split has none"
            raise InputError(f"run.task: {problem}: give the dataset `classes`, or choose an architecture of BLIP")

    def batch_context(self, dataset: EvalDataset) -> Samples:
        """Return the names of the classes as `candidates`, if they have names."""
        classes = list(dataset.classes) if isinstance(dataset, HasClasses) else []
        return {"candidates": classes} if classes else {}

    def metric_names(self) -> tuple[str, ...]:
        """Return the accuracy's name, and that of pairs' consistency."""
        return ("acc", "consistency")

    def valid_step(self, model: Classifies, samples: Samples) -> list[Result]:
        """Return `prediction` and `target` (class indices) of each sample.

        `prediction` is -1 if the model wrote no class, `target` None without labels.
        """
        samples = encoded_once(model, samples)
        if isinstance(model, ScoresCandidates):
            outputs = model.predict(samples, n_segments=self.segments, **self.decoding_settings())
        else:
            outputs = model.predict(samples)
        logits = outputs["predictions"]
        predictions = logits.argmax(dim=-1).masked_fill(logits.isneginf().all(dim=-1), -1).tolist()
        labels = outputs.get("targets")
        targets = [None] * len(predictions) if labels is None else labels.tolist()
        return per_sample(samples, prediction=predictions, target=targets)

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Write `<split>_predictions.json`; return `acc`, in percent of the labelled samples."""
        index = positions(dataset)
        for result in results:
            result |= by_record(result, dataset.annotation[index[result["instance_id"]]])
        write_json(result_dir / f"{split}_predictions.json", results)
        hits = [result["prediction"] == result["target"] for result in results if result["target"] is not None]
        if not hits:
            return unscored(f"the {split} split has no labels")
        accuracy = Mean(100 * sum(hits) / len(hits), [100 * hit for hit in hits])
        metrics = {"acc": accuracy, "agg_metrics": accuracy}
        labelled = [result for result in results if result["target"] is not None]
        records = [dataset.annotation[index[result["instance_id"]]] for result in labelled]
        is_pairs = all("images" in record and "sentence" in record for record in records)
        return metrics | ({"consistency": consistency(records, hits)} if is_pairs else {})

    def predictions(
        self, results: list[Result], metrics: Metrics, *, dataset: EvalDataset, split: str
    ) -> list[Prediction]:
        """Return the names of each sample's predicted and right class."""
        index, found = positions(dataset), []
        classes = list(dataset.classes) if isinstance(dataset, HasClasses) else []
        for result in results:
            record = dataset.annotation[index[result["instance_id"]]]
            names = [] if "candidates" in record else classes
            row = of_record(dataset, record, result)
            texts = [record[key] for key in ("sentence", "text", "question") if record.get(key) is not None]
            row |= {"input": str(texts[0])} if texts else {}
            row["prediction"] = (
                "none of the classes" if result["prediction"] == -1 else name(result["prediction"], names)
            )
            if result["target"] is not None:
                row["references"] = [name(result["target"], names)]
                row["metrics"] = {"accuracy": 100.0 * (result["prediction"] == result["target"])}
            found.append(row)
        return found


def name(label: int | str, classes: Sequence[str]) -> str:
    """Return a class's name, or else its number."""
    return classes[label] if isinstance(label, int) and 0 <= label < len(classes) else str(label)


def by_record(result: Result, record: Record) -> Result:
    """Return the entries that follow from a record with candidates of its own: `target`, their label, and the classes
    of both where several candidates mean the same.
    """
    if result["target"] is not None or "candidates" not in record or record.get("label") is None:
        return {}
    classes: Sequence[Any] = record.get("classes") or range(len(record["candidates"]))
    prediction = result["prediction"]
    return {"prediction": classes[prediction] if prediction >= 0 else prediction, "target": classes[record["label"]]}


def check_labels(dataset: object, num_classes: int) -> None:
    """Raise InputError, naming the record, for a label above those of the model's classes."""
    if isinstance(dataset, HasLabels) and dataset.labels and (largest := max(dataset.labels)) >= num_classes:
        raise InputError(
            f"{dataset.place(list(dataset.labels).index(largest))} has label {largest}, but "
            f"model.num_classes={num_classes} means labels 0 to {num_classes - 1}: correct the label, or set "
            f"model.num_classes={largest + 1}"
        )
