"""Image-text and video-text retrieval in both directions: recall at 1, 5 and 10 in percent, the median rank, and each
query's best ten with their scores.

The model scores the whole gallery (`compute_sim_matrix`); this task turns scores into ranks and files.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from lavis_lite.common import dist
from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record
from lavis_lite.common.registry import registry
from lavis_lite.datasets.protocols import EvalDataset, Gallery, Samples
from lavis_lite.models.protocols import Retrieves, method_names
from lavis_lite.tasks.base import BaseTask, EvalLoader, Metrics, evaluating, unwrap
from lavis_lite.tasks.metrics.retrieval import (
    RANKS,
    GalleryRanks,
    best_first,
    gallery_ranks,
    median_ranks,
    recalls,
)
from lavis_lite.tasks.predictions import Candidate, Prediction, image_paths
from lavis_lite.tasks.results import write_json

logger = logging.getLogger(__name__)

NUM_BEST = 10
NUM_KEPT = 5
"""Candidates of each query in the file of predictions."""
MEDIANS = ("txt_mdr", "img_mdr")
"""Median ranks, from 1."""


@registry.register_task("retrieval")
@dataclass(kw_only=True)
class RetrievalTask(BaseTask):
    """Text retrieval (`txt_*`: texts for an image) and image retrieval (`img_*`). `agg_metrics` is `txt_r_mean`, the
    mean of the recalls that are known at this `k_test`.
    """

    k_test: int = 128
    """Candidates of each query that the matching head re-ranks; all, where the gallery has fewer. 0: the contrast alone
    ranks all of them."""

    model_methods: ClassVar[tuple[str, ...]] = method_names(Retrieves)
    bounds: ClassVar = {"k_test": (0, 10**9)}

    def metric_names(self) -> tuple[str, ...]:
        """Return the recalls in both directions, their means, and the median ranks."""
        return (
            *(f"{side}_r{k}" for side in ("txt", "img") for k in RANKS),
            "txt_r_mean",
            "img_r_mean",
            "r_mean",
            *MEDIANS,
        )

    def check(self, model_class: type, dataset: EvalDataset, batch: Samples, *, split: str) -> None:
        """Raise InputError for a split that is not laid out as a gallery."""
        as_gallery(dataset, split)

    def evaluate(self, model: nn.Module, loader: EvalLoader, *, split: str, result_dir: Path) -> Metrics:
        """Return the recalls of the gallery `loader.dataset`, on every rank; write `<split>_retrieval.json`."""
        gallery, model = as_gallery(loader.dataset, split), unwrap(model)
        assert isinstance(model, Retrieves), f"{type(model).__name__} has no compute_sim_matrix"
        with evaluating(model):
            score_i2t, score_t2i = model.compute_sim_matrix(loader, k_test=self.k_test)
        path = Path(result_dir) / f"{split}_retrieval.json"
        return dist.on_main(lambda: self._score(score_i2t, score_t2i, gallery, split, path))

    def _score(self, score_i2t: np.ndarray, score_t2i: np.ndarray, gallery: Gallery, split: str, path: Path) -> Metrics:
        ranks = gallery_ranks(score_i2t, score_t2i, gallery.txt2img, gallery.img2txt)
        metrics = recalls(ranks, k_test=self.k_test) | median_ranks(ranks, k_test=self.k_test)
        unknown = [name for name in (f"{side}_r{k}" for side in ("txt", "img") for k in RANKS) if name not in metrics]
        if unknown:
            reason = f"run.k_test={self.k_test} ranks {self.k_test} candidates: set it to {max(RANKS)} or more, or to 0"
            logger.warning(f"{split}: metrics and means are without {', '.join(unknown)}, because {reason}")
        num_best = min(NUM_BEST, self.k_test or NUM_BEST)
        value = {
            "metrics": metrics,
            "images": [visual_name(record) for record in gallery.annotation],
            "texts": list(gallery.text),
            "img2txt": [list(map(int, texts)) for texts in gallery.img2txt],
            **best(score_i2t, num_best, "top_texts_of_image"),
            **best(score_t2i, num_best, "top_images_of_text"),
        }
        write_json(path, value)
        self._kept = (*self.image_queries(value, ranks, gallery), *self.text_queries(value, ranks, gallery))
        return metrics

    def image_queries(self, value: Mapping[str, Any], ranks: GalleryRanks, gallery: Gallery) -> Iterator[Prediction]:
        """Yield each image's best text, with the best candidates."""
        pairs = zip(value["top_texts_of_image"], value["top_texts_of_image_scores"], strict=True)
        for index, (texts, scores) in enumerate(pairs):
            right = gallery.img2txt[index]
            candidates: list[Candidate] = [
                {"text": gallery.text[text], "score": score, "is_right": text in right}
                for text, score in list(zip(texts, scores, strict=True))[:NUM_KEPT]
            ]
            yield {
                "instance_id": f"image {index}",
                "images": image_paths(gallery, gallery.annotation[index]),
                "prediction": gallery.text[texts[0]],
                "references": [gallery.text[text] for text in right],
                **self._ranked(ranks.of_images[index], scores[0], candidates),
            }

    def text_queries(self, value: Mapping[str, Any], ranks: GalleryRanks, gallery: Gallery) -> Iterator[Prediction]:
        """Yield each text's best image, with the best candidates."""
        paths = [next(iter(image_paths(gallery, record)), "") for record in gallery.annotation]
        pairs = zip(value["top_images_of_text"], value["top_images_of_text_scores"], strict=True)
        for index, (images, scores) in enumerate(pairs):
            right = gallery.txt2img[index]
            candidates: list[Candidate] = [
                {"image": paths[image], "score": score, "is_right": image == right}
                for image, score in list(zip(images, scores, strict=True))[:NUM_KEPT]
            ]
            yield {
                "instance_id": f"text {index}",
                "images": [paths[right]],
                "input": gallery.text[index],
                "prediction_image": paths[images[0]],
                **self._ranked(ranks.of_texts[index], scores[0], candidates),
            }

    def _ranked(self, rank: int, score: float, candidates: list[Candidate]) -> Prediction:
        own = int(rank) + 1
        found: Prediction = {"score": score, "candidates": candidates, "metrics": {"accuracy": 100.0 * (own == 1)}}
        return {**found, "rank": own} if own <= (self.k_test or own) else found


def best(scores: np.ndarray, number: int, name: str) -> dict[str, list[list[float]]]:
    """Return each query's best candidates under a name, and their scores as `<name>_scores`."""
    order = [best_first(row)[:number] for row in scores]
    values = [[round(float(score), 6) for score in row[own]] for row, own in zip(scores, order, strict=True)]
    return {name: [own.tolist() for own in order], f"{name}_scores": values}


def visual_name(record: Record) -> str | None:
    """Return the path of the record's image or video."""
    return record.get("image") if record.get("video") is None else record["video"]


def as_gallery(dataset: EvalDataset, split: str) -> Gallery:
    """Return the dataset; InputError if it is not laid out as a gallery, is empty, or has images without texts."""
    if not isinstance(dataset, Gallery):
        name = type(dataset).__name__
        raise InputError(f"the {split} dataset ({name}) lacks a gallery's text, txt2img, img2txt: use 'retrieval'")
    if not len(dataset.text) or not len(dataset.img2txt):
        raise InputError(f"the {split} split is empty: there is nothing to retrieve")
    pairs = zip(dataset.annotation, dataset.img2txt, strict=True)
    if without := [visual_name(record) for record, texts in pairs if not len(texts)]:
        raise InputError(f"{len(without)} images of the {split} split have no texts, e.g. {without[0]}: leave them out")
    return dataset
