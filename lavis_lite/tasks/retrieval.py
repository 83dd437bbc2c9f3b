"""Image-text retrieval in both directions: recall at 1, 5 and 10 in percent, and each query's best ten.

The model scores the whole gallery (`compute_sim_matrix`); this task turns scores into ranks and files.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from lavis_lite.common import dist
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.tasks.base import (
    BaseTask,
    Metrics,
    Samples,
    check_range,
    evaluating,
    unwrap,
)
from lavis_lite.tasks.metrics.retrieval import RANKS, best_first, recall_metrics
from lavis_lite.tasks.results import write_json

logger = logging.getLogger(__name__)

TOP = 10
MOST_CANDIDATES = 10**9


@registry.register_task("retrieval")
@dataclass(kw_only=True)
class RetrievalTask(BaseTask):
    """Text retrieval (`txt_*`: texts for an image) and image retrieval (`img_*`). `agg_metrics` is `txt_r_mean`, the
    mean of the recalls that `k_test` allows to know.
    """

    k_test: int = 128
    """Candidates of each query that the matching head re-ranks; all, where the gallery has fewer. 0: the contrast alone
    ranks all of them."""

    model_methods: ClassVar[tuple[str, ...]] = ("compute_sim_matrix",)

    def __post_init__(self) -> None:
        check_range(self, k_test=(0, MOST_CANDIDATES))

    def check(self, model_class: type, dataset: Any, batch: Samples, *, split: str) -> None:
        """Raise for a split that is not laid out as a gallery."""
        check_gallery(dataset, split)

    def evaluate(self, model: nn.Module, loader: Iterable[Samples], *, split: str, result_dir: Path) -> Metrics:
        """Score the gallery of `loader.dataset`; the same metrics on every rank."""
        dataset, model = loader.dataset, unwrap(model)
        check_gallery(dataset, split)
        with evaluating(model):
            scores = model.compute_sim_matrix(loader, k_test=self.k_test)
        return dist.on_main(
            lambda: self.score_matrices(*scores, dataset=dataset, split=split, result_dir=Path(result_dir))
        )

    def score_matrices(
        self, score_i2t: np.ndarray, score_t2i: np.ndarray, *, dataset: Any, split: str, result_dir: Path
    ) -> Metrics:
        """Recalls of the score matrices (I,T) and (T,I); writes `<split>_retrieval.json`."""
        metrics = recall_metrics(score_i2t, score_t2i, dataset.txt2img, dataset.img2txt, k_test=self.k_test)
        self.report_left_out(metrics, split)
        value = {
            "metrics": metrics,
            "images": [record.get("image") for record in dataset.annotation],
            "texts": list(dataset.text),
            "img2txt": [list(map(int, texts)) for texts in dataset.img2txt],
            "top_texts_of_image": top(score_i2t, self.k_test),
            "top_images_of_text": top(score_t2i, self.k_test),
        }
        write_json(result_dir / f"{split}_retrieval.json", value)
        return metrics

    def report_left_out(self, metrics: Metrics, split: str) -> None:
        """Log which recalls are not known at this `k_test`, and what to set for all of them."""
        left_out = [name for name in (f"{side}_r{k}" for side in ("txt", "img") for k in RANKS) if name not in metrics]
        if left_out:
            logger.warning(
                f"{split}: {', '.join(left_out)} are left out of metrics and means, because run.k_test={self.k_test} "
                f"ranks {self.k_test} candidates of a query: set it to {max(RANKS)} or more, or to 0 for the contrast "
                "alone"
            )


def top(scores: np.ndarray, k_test: int) -> list[list[int]]:
    """The indices of each row's best ten, best first; of those that were ranked."""
    return [best_first(row)[: min(TOP, k_test or TOP)].tolist() for row in scores]


def check_gallery(dataset: Any, split: str) -> None:
    """Raise ValueError if the dataset is not laid out as a retrieval gallery, is empty, or has images without texts."""
    missing = [name for name in ("text", "txt2img", "img2txt") if not hasattr(dataset, name)]
    if missing:
        raise InputError(
            f"the {split} dataset ({type(dataset).__name__}) has no {', '.join(missing)}: retrieval is evaluated on a "
            "gallery, as the 'retrieval' builder's evaluation splits are"
        )
    if not len(dataset.text) or not len(dataset.img2txt):
        raise InputError(f"the {split} split is empty: there is nothing to retrieve")
    silent = [index for index in range(len(dataset.img2txt)) if not len(dataset.img2txt[index])]
    if silent:
        first = dataset.annotation[silent[0]].get("image")
        raise InputError(f"{len(silent)} images of the {split} split have no texts, e.g. {first}: leave them out")
