"""Zero-shot classification: an image's class is that whose prompts, templates filled with its name, fit the image best
(Radford et al. 2021, section 3.1). By the contrast of features, or by the matching head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from torch import Tensor, nn

from lavis_lite.common.config.zoo import CONFIGS
from lavis_lite.common.errors import InputError, did_you_mean
from lavis_lite.common.registry import registry
from lavis_lite.datasets.protocols import EvalDataset, HasClasses, Samples
from lavis_lite.models.base import BaseModel
from lavis_lite.models.protocols import ClassifiesByPrompts, method_names
from lavis_lite.tasks.base import BaseTask, EvalLoader, Metrics, evaluating, named_file, unwrap
from lavis_lite.tasks.metrics.mean import Mean
from lavis_lite.tasks.predictions import Prediction, of_record
from lavis_lite.tasks.results import Result, as_list, per_sample, positions, write_json

MatchHead = Literal["itc", "itm"]
NUM_BEST = 5
TEMPLATES = CONFIGS / "templates"
"""Packaged lists: `imagenet` has those of Radford et al. for ImageNet."""


@dataclass(frozen=True, kw_only=True)
class PromptedLoader:
    """Batches with the prompts of all classes and their features."""

    loader: EvalLoader
    prompts: Sequence[Sequence[str]]
    features: Tensor

    @property
    def dataset(self) -> EvalDataset:
        return self.loader.dataset

    @property
    def batches(self) -> Sequence[Sequence[int]] | None:
        return self.loader.batches

    def __iter__(self) -> Iterator[Samples]:
        for samples in self.loader:
            yield {**samples, "class_prompts": self.prompts, "class_features": self.features}


@registry.register_task("zero_shot_classification")
@dataclass(kw_only=True)
class ZeroShotClassificationTask(BaseTask):
    """Classification by the names of the dataset's `classes`. `agg_metrics` is `acc1`, in percent."""

    templates: list[str] | str = field(default_factory=lambda: ["a photo of a {}."])
    """Texts with `{}` for the class, a text file with one per line, or `imagenet`, CLIP's 80 of them. A class's feature
    is the mean over all.
    """
    class_names: dict[str, str] = field(default_factory=dict)
    """Other names for the prompts, by class: `{n01440764: tench}`."""
    match_head: MatchHead = "itc"
    """`itc`: similarity of features; `itm`: the matching head's log-probability, which takes a pass per prompt."""
    k_test: int = 128
    """`itm`: classes that are scored, the most similar ones; 0: all."""

    resumes: ClassVar[bool] = True
    model_methods: ClassVar[tuple[str, ...]] = method_names(ClassifiesByPrompts)
    sample_keys: ClassVar[tuple[str, ...]] = ("label", "instance_id")
    bounds: ClassVar = {"k_test": (0, 10**9)}
    choices: ClassVar = {"match_head": get_args(MatchHead)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.texts = read_templates(self.templates)

    def metric_names(self) -> tuple[str, ...]:
        """Return the accuracies, and the mean over the classes of their own."""
        return ("acc1", "acc5", "mean_per_class_acc")

    def check(self, model_class: type, dataset: EvalDataset, batch: Samples, *, split: str) -> None:
        """Raise InputError for a split without named classes, and for names of classes that it does not have."""
        self.prompts(dataset, split)

    def check_model(self, model: BaseModel, dataset: EvalDataset, batches: Sequence[Samples], *, split: str) -> None:
        """Raise InputError for `itm` with a model without a matching head."""
        if self.match_head == "itm" and "itm_head" not in dict(model.named_children()):
            problem = f"{type(model).__name__} has no matching head"
            raise InputError(f"run.match_head: itm: {problem}; set itc, or choose a matching or retrieval model")

    def prompts(self, dataset: EvalDataset, split: str) -> list[list[str]]:
        """Return the prompts of each class."""
        classes = list(dataset.classes) if isinstance(dataset, HasClasses) else []
        if not classes:
            raise InputError(f"the {split} dataset ({type(dataset).__name__}) has no names of classes: set `classes`")
        if unknown := [name for name in self.class_names if name not in classes]:
            near = did_you_mean(unknown[0], classes)
            raise InputError(f"run.class_names: the {split} split has no class {unknown[0]!r}. {near}")
        names = [self.class_names.get(name, name.replace("_", " ")) for name in classes]
        return [[text.replace("{}", name) for text in self.texts] for name in names]

    def evaluate(self, model: nn.Module, loader: EvalLoader, *, split: str, result_dir: Path) -> Metrics:
        """Encode the classes once, then evaluate as `BaseTask` does."""
        plain, prompts = unwrap(model), self.prompts(loader.dataset, split)
        assert isinstance(plain, ClassifiesByPrompts), f"{type(plain).__name__} has no class_features"
        with evaluating(plain):
            features = plain.class_features(prompts)
        prompted = PromptedLoader(loader=loader, prompts=prompts, features=features)
        return super().evaluate(model, prompted, split=split, result_dir=result_dir)

    def valid_step(self, model: ClassifiesByPrompts, samples: Samples) -> list[Result]:
        """Return the indices of the best classes, `top`, their `scores`, and the `target` of each sample."""
        classes = (samples["class_prompts"], samples["class_features"])
        scores = model.class_scores(samples, *classes, match_head=self.match_head, k_test=self.k_test).float().cpu()
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :NUM_BEST]
        values = [[round(value, 6) for value in row] for row in scores.gather(1, order).tolist()]
        return per_sample(samples, top=order.tolist(), scores=values, target=as_list(samples["label"]))

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Write `<split>_predictions.json`; return `acc1`, `acc5` where there are more than five classes, and
        `mean_per_class_acc`.
        """
        assert isinstance(dataset, HasClasses)
        write_json(result_dir / f"{split}_predictions.json", results)
        found: Metrics = {"acc1": accuracy(results, 1)}
        if len(dataset.classes) > NUM_BEST:
            found["acc5"] = accuracy(results, NUM_BEST)
        by_class: dict[int, list[Result]] = {}
        for result in results:
            by_class.setdefault(result["target"], []).append(result)
        found["mean_per_class_acc"] = float(np.mean([accuracy(own, 1) for own in by_class.values()]))
        return {**found, "agg_metrics": found["acc1"]}

    def predictions(
        self, results: list[Result], metrics: Metrics, *, dataset: EvalDataset, split: str
    ) -> list[Prediction]:
        """Return each image's likeliest classes."""
        assert isinstance(dataset, HasClasses)
        index, names, found = positions(dataset), dataset.classes, []
        for result in results:
            row = of_record(dataset, dataset.annotation[index[result["instance_id"]]], result)
            top, target = result["top"], result["target"]
            row |= {"prediction": names[top[0]], "references": [names[target]]}
            row["candidates"] = [
                {"text": names[one], "score": score, "is_right": one == target}
                for one, score in zip(top, result["scores"], strict=True)
            ]
            row["metrics"] = {"accuracy": 100.0 * (top[0] == target)}
            found.append(row)
        return found


def accuracy(results: Sequence[Result], k: int) -> Mean:
    """Return the share, in percent, of results whose target is among the first `k` classes."""
    hits = [100.0 * (result["target"] in result["top"][:k]) for result in results]
    return Mean(sum(hits) / len(hits), hits)


def read_templates(templates: Any) -> list[str]:
    """Return the templates, read from a file for a path or the name of a packaged list. InputError for one without
    `{}`, or for none.
    """
    if isinstance(templates, str):
        packaged = TEMPLATES / f"{templates}.txt"
        file = packaged if packaged.is_file() else named_file("run.templates", templates)
        lines = file.read_text(encoding="utf-8").splitlines()
        templates = [line for line in lines if line.strip()]
    if not templates:
        raise InputError("run.templates: is empty; give texts such as 'a photo of a {}.'")
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"run.templates: {template!r} must have one '{{}}', for the name of the class")
    return list(templates)
