"""Recall at k of a retrieval score matrix, in percent, and the median rank, in both directions.

Note: equal scores keep the order of numpy's default sort, as in LAVIS; it differs between processors. Scores of -100,
those outside of the `k_test` candidates, are equal; recalls that depend on them are left out.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lavis_lite.common.errors import InputError
from lavis_lite.tasks.metrics.mean import Mean

RANKS = (1, 5, 10)


def best_first(scores: np.ndarray) -> np.ndarray:
    """Return the indices of one query's candidates, best first."""
    return np.argsort(scores)[::-1]


def recall_metrics(
    score_i2t: np.ndarray,
    score_t2i: np.ndarray,
    txt2img: Sequence[int] | Mapping[int, int],
    img2txt: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
    *,
    k_test: int = 0,
) -> dict[str, float]:
    """Return `txt_r1/5/10` and `img_r1/5/10` in percent, their means, and `agg_metrics` (`txt_r_mean`, as in LAVIS).

    `score_i2t` is (images, texts), `score_t2i` (texts, images). An image counts as found at the rank of its best text.
    With `k_test` only the first `k_test` candidates of each query were ranked (0: all): recalls at more are left out,
    and the means are those of the others. Raises InputError for matrices of other shapes, with NaNs, and for queries
    without a right answer.
    """
    return recalls(gallery_ranks(score_i2t, score_t2i, txt2img, img2txt), k_test=k_test)


class GalleryRanks(NamedTuple):
    """The rank, from 0, of the best right text of each image, and of the image of each text."""

    of_images: np.ndarray
    of_texts: np.ndarray


def gallery_ranks(
    score_i2t: np.ndarray,
    score_t2i: np.ndarray,
    txt2img: Sequence[int] | Mapping[int, int],
    img2txt: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
) -> GalleryRanks:
    """Return all ranks. Raises InputError as `recall_metrics`."""
    texts_of = [list(img2txt[i]) for i in range(len(img2txt))]
    images_of = [[txt2img[t]] for t in range(len(txt2img))]
    return GalleryRanks(
        _ranks(score_i2t, texts_of, num_candidates=len(images_of), name="score_i2t"),
        _ranks(score_t2i, images_of, num_candidates=len(texts_of), name="score_t2i"),
    )


def recalls(ranks: GalleryRanks, *, k_test: int = 0) -> dict[str, float]:
    """Return the metrics of `recall_metrics`."""
    txt = _recalls(ranks.of_images, num_candidates=len(ranks.of_texts), k_test=k_test)
    img = _recalls(ranks.of_texts, num_candidates=len(ranks.of_images), k_test=k_test)
    txt_mean, img_mean = float(np.mean(list(txt.values()))), float(np.mean(list(img.values())))
    return {
        **{f"txt_r{k}": value for k, value in txt.items()},
        "txt_r_mean": txt_mean,
        **{f"img_r{k}": value for k, value in img.items()},
        "img_r_mean": img_mean,
        "r_mean": (txt_mean + img_mean) / 2,
        "agg_metrics": txt_mean,
    }


def median_ranks(ranks: GalleryRanks, *, k_test: int = 0) -> dict[str, float]:
    """Return the median ranks `txt_mdr` and `img_mdr`, from 1. One above `k_test` is left out, as it is not known."""
    medians = {"txt_mdr": float(np.median(ranks.of_images + 1)), "img_mdr": float(np.median(ranks.of_texts + 1))}
    num_candidates = {"txt_mdr": len(ranks.of_texts), "img_mdr": len(ranks.of_images)}
    return {
        name: median
        for name, median in medians.items()
        if k_test == 0 or k_test >= num_candidates[name] or median <= k_test
    }


def _ranks(scores: np.ndarray, right: Sequence[Sequence[int]], *, num_candidates: int, name: str) -> np.ndarray:
    """Return the rank, from 0, of each query's best right candidate."""
    scores = np.asarray(scores)
    if scores.shape != (len(right), num_candidates):
        expected = (len(right), num_candidates)
        raise InputError(f"{name} has shape {scores.shape}, expected {expected} (queries, candidates)")
    if not len(right):
        raise InputError(f"{name} is empty: no queries to rank for")
    if not all(map(len, right)):
        query = [len(answers) for answers in right].index(0)
        raise InputError(f"query {query} has no right answer: leave images without texts out of the gallery")
    if np.isnan(scores).any():
        raise InputError(f"{name} has NaNs in row {int(np.isnan(scores).any(axis=1).argmax())}: they have no rank")
    return np.array(
        [np.flatnonzero(np.isin(best_first(row), answers))[0] for row, answers in zip(scores, right, strict=True)]
    )


def _recalls(ranks: np.ndarray, *, num_candidates: int, k_test: int) -> dict[int, Mean]:
    """Return recall at each of `RANKS` that is known when `k_test` of the candidates were ranked (0: all)."""
    known = [k for k in RANKS if k_test == 0 or k <= k_test or k_test >= num_candidates]
    return {k: Mean(float(100 * np.mean(ranks < k)), 100 * (ranks < k)) for k in known}
