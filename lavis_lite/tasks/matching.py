"""Scores of given pairs of images and texts: the matching head's probability and the similarity of each, to a file.

Where records have a `label` (1 for a pair that matches), the scores' areas under the ROC curve say how well they tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record, shown
from lavis_lite.common.registry import registry
from lavis_lite.datasets.annotations import as_list
from lavis_lite.datasets.protocols import IMAGE_KEYS, EvalDataset, Samples
from lavis_lite.models.protocols import ScoresPairs, method_names
from lavis_lite.models.shared_images import encoded_once
from lavis_lite.tasks.base import BaseTask, Metrics, with_eval_processors
from lavis_lite.tasks.metrics.ranking import roc_auc
from lavis_lite.tasks.predictions import Prediction, of_record
from lavis_lite.tasks.results import Result, per_sample, positions, unscored, write_json

SCORES = ("itm", "itc")
LABELS: Mapping[Any, bool] = {True: True, False: False, "1": True, "0": False, "true": True, "false": False}
"""The values of a label, compared in lower case; 1 and 0 are equal to True and False."""


@registry.register_task("matching")
@dataclass(kw_only=True)
class MatchingTask(BaseTask):
    """Image-text matching of given pairs. `agg_metrics` is the area under the ROC curve of `itm`, or else of `itc`."""

    shuffle_images: bool = False
    """Score each text with the batch's next image: what the texts alone tell."""

    resumes: ClassVar[bool] = True
    model_methods: ClassVar[tuple[str, ...]] = method_names(ScoresPairs)
    sample_keys: ClassVar[tuple[str, ...]] = ("text_input", "instance_id")

    def metric_names(self) -> tuple[str, ...]:
        """Return the areas under the curves of both scores, and of the texts' lengths."""
        return (*(f"auc_{name}" for name in SCORES), "auc_num_words")

    def build_datasets(self, cfg: Config) -> dict[str, dict[str, Any]]:
        """Build the datasets as BaseTask does; an evaluation reads the split `train` without random crops."""
        return super().build_datasets(with_eval_processors(cfg) if cfg.run.evaluate else cfg)

    def check(self, model_class: type, dataset: EvalDataset, batch: Samples, *, split: str) -> None:
        """Raise InputError for a label that is none, and for labels of some records only."""
        labels = [label_of(record, f"the {split} split: record {n}") for n, record in enumerate(dataset.annotation)]
        if None in labels and len(set(labels)) > 1:
            problem = f"record {labels.index(None)} has no label, and others have: give all of them one, or none"
            raise InputError(f"the {split} split: {problem}")

    def valid_step(self, model: ScoresPairs, samples: Samples) -> list[Result]:
        """Return the scores of each sample."""
        samples = encoded_once(model, samples)
        if self.shuffle_images:
            if len(samples["image"]) == 1:
                raise InputError("run.shuffle_images needs other images in the batch: set run.batch_size_eval above 1")
            samples = {**samples, **{key: samples[key].roll(1, dims=0) for key in IMAGE_KEYS if key in samples}}
        scores = model.match_scores(samples)
        return per_sample(samples, **{name: scores[name].float().tolist() for name in SCORES if name in scores})

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Write `<split>_matching.json`, one entry per record; return `auc_itm` and `auc_itc` in percent, and as
        a control `auc_num_words`, which is that of the texts' lengths alone.
        """
        index = positions(dataset)
        records = [dataset.annotation[index[result["instance_id"]]] for result in results]
        labels = [label_of(record, split) for record in records]
        for result, record, label in zip(results, records, labels, strict=True):
            result |= {key: record[key] for key in ("image", "image_id", "caption") if record.get(key) is not None}
            result |= {} if label is None else {"label": int(label)}
        write_json(result_dir / f"{split}_matching.json", results)
        found = [label for label in labels if label is not None]
        if len(set(found)) < 2:
            return unscored(f"the {split} split has no labels, or one only")
        areas = {f"auc_{name}": roc_auc([r[name] for r in results], found) for name in SCORES if name in results[0]}
        lengths = [len(str(as_list(record["caption"])[0]).split()) for record in records]
        return {**areas, "auc_num_words": roc_auc(lengths, found), "agg_metrics": next(iter(areas.values()))}

    def predictions(
        self, results: list[Result], metrics: Metrics, *, dataset: EvalDataset, split: str
    ) -> list[Prediction]:
        """Return each pair's scores; with a label and a matching head also whether the head's decision is right."""
        index, found = positions(dataset), []
        for result in results:
            record = dataset.annotation[index[result["instance_id"]]]
            scores = {key: result[key] for key in SCORES if key in result}
            row = of_record(dataset, record, result)
            row |= {"input": str(record.get("caption", "")), "score": next(iter(scores.values()))}
            row["prediction"] = ", ".join(f"{key} {value:.3f}" for key, value in scores.items())
            if (label := label_of(record, split)) is not None:
                row["references"] = ["a pair that matches" if label else "no match"]
                row["metrics"] = {"accuracy": 100.0 * ((scores["itm"] > 0.5) == label)} if "itm" in scores else {}
            found.append(row)
        return found


def label_of(record: Record, where: str) -> bool | None:
    """Return whether a record's pair matches, None without a label. InputError for a label that is neither."""
    label = record.get("label")
    if label is None:
        return None
    key = label.lower() if isinstance(label, str) else label
    if not isinstance(key, str | int) or key not in LABELS:
        raise InputError(f"{where}: label is {shown(label)}; expected 1 for a pair that matches, or 0")
    return LABELS[key]
