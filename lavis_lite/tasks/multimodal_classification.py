"""Classification of an image and a text (NLVR2, SNLI-VE): accuracy in percent."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.tasks.base import BaseTask, Metrics, Samples
from lavis_lite.tasks.results import Result, per_sample, write_json


@registry.register_task("multimodal_classification")
@dataclass(kw_only=True)
class MultimodalClassificationTask(BaseTask):
    """The class with the highest logit of `model.predict`, against the sample's label."""

    model_methods: ClassVar[tuple[str, ...]] = ("predict",)
    sample_keys: ClassVar[tuple[str, ...]] = ("instance_id",)

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """As BaseTask's. Raises ValueError for a label that is none of the model's classes."""
        built = super().build_datasets(cfg)
        num_classes = cfg.model.get("num_classes")
        for splits in built.values():
            for dataset in splits.values() if num_classes else ():
                check_labels(dataset, num_classes)
        return built

    def valid_step(self, model: nn.Module, samples: Samples) -> list[Result]:
        """`prediction` and `target` (class indices) of each sample; `target` is None without labels."""
        outputs = model.predict(samples)
        predictions = outputs["predictions"].argmax(dim=-1)
        targets = outputs.get("targets")
        return per_sample(
            samples, prediction=predictions, target=[None] * len(predictions) if targets is None else targets
        )

    def score(self, results: list[Result], *, dataset: Any, split: str, result_dir: Path) -> Metrics:
        """`acc` in percent over the labelled samples; writes `<split>_predictions.json`."""
        write_json(result_dir / f"{split}_predictions.json", results)
        labelled = [result for result in results if result["target"] is not None]
        if not labelled:
            return {"agg_metrics": None, "note": f"the {split} split has no labels: only the result file was written"}
        accuracy = 100 * sum(r["prediction"] == r["target"] for r in labelled) / len(labelled)
        return {"acc": accuracy, "agg_metrics": accuracy}


def check_labels(dataset: Any, num_classes: int) -> None:
    """Raise ValueError, naming the record, for a label above those of the model's classes."""
    labels = getattr(dataset, "labels", None) or [0]
    largest = max(labels)
    if largest >= num_classes:
        raise InputError(
            f"{dataset.place(labels.index(largest))} has label {largest}, but model.num_classes={num_classes} means "
            f"labels 0 to {num_classes - 1}: correct the label, or set model.num_classes={largest + 1}"
        )
