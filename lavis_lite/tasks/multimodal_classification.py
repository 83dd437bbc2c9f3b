"""Classification of an image and a text (NLVR2, SNLI-VE): accuracy in percent."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.protocols import EvalDataset, HasLabels, Samples
from lavis_lite.models.protocols import Classifies, method_names
from lavis_lite.tasks.base import BaseTask, Metrics
from lavis_lite.tasks.metrics.mean import Mean
from lavis_lite.tasks.metrics.nlvr import consistency
from lavis_lite.tasks.results import Result, per_sample, positions, unscored, write_json


@registry.register_task("multimodal_classification")
@dataclass(kw_only=True)
class MultimodalClassificationTask(BaseTask):
    """The class with the highest logit of `model.predict`, against the sample's label."""

    model_methods: ClassVar[tuple[str, ...]] = method_names(Classifies)
    sample_keys: ClassVar[tuple[str, ...]] = ("instance_id",)

    def build_datasets(self, cfg: Config) -> dict[str, dict[str, Any]]:
        """As BaseTask's. Raises InputError for a label that is not one of the model's classes."""
        built = super().build_datasets(cfg)
        num_classes = cfg.model.get("num_classes") or math.inf
        for dataset in (dataset for splits in built.values() for dataset in splits.values()):
            labels = list(dataset.labels) if isinstance(dataset, HasLabels) else []
            if labels and (largest := max(labels)) >= num_classes:
                where = dataset.place(labels.index(largest))
                raise InputError(f"{where}: label {largest} is not below model.num_classes={num_classes}: raise it")
        return built

    def metric_names(self) -> tuple[str, ...]:
        """Return the accuracy's name, and that of pairs' consistency."""
        return ("acc", "consistency")

    def valid_step(self, model: Classifies, samples: Samples) -> list[Result]:
        """Return `prediction` and `target` (class indices) of each sample; `target` is None without labels."""
        outputs = model.predict(samples)
        predictions = outputs["predictions"].argmax(dim=-1).tolist()
        labels = outputs.get("targets")
        targets = [None] * len(predictions) if labels is None else labels.tolist()
        return per_sample(samples, prediction=predictions, target=targets)

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Write `<split>_predictions.json`; return `acc`, in percent of the labelled samples."""
        write_json(result_dir / f"{split}_predictions.json", results)
        hits = [result["prediction"] == result["target"] for result in results if result["target"] is not None]
        if not hits:
            return unscored(f"the {split} split has no labels")
        accuracy = Mean(100 * sum(hits) / len(hits), [100 * hit for hit in hits])
        metrics = {"acc": accuracy, "agg_metrics": accuracy}
        index = positions(dataset)
        labelled = [result for result in results if result["target"] is not None]
        records = [dataset.annotation[index[result["instance_id"]]] for result in labelled]
        is_pairs = all("images" in record and "sentence" in record for record in records)
        return metrics | ({"consistency": consistency(records, hits)} if is_pairs else {})


def check_labels(dataset: object, num_classes: int) -> None:
    """Raise InputError, naming the record, for a label above those of the model's classes."""
    if isinstance(dataset, HasLabels) and dataset.labels and (largest := max(dataset.labels)) >= num_classes:
        raise InputError(
            f"{dataset.place(list(dataset.labels).index(largest))} has label {largest}, but "
            f"model.num_classes={num_classes} means labels 0 to {num_classes - 1}: correct the label, or set "
            f"model.num_classes={largest + 1}"
        )
