"""Recall at k of a retrieval score matrix, in both directions, in percent.

Equal scores keep the order of numpy's default sort, as in LAVIS; it differs between processors. With k_test >= 10, the
scores of -100 outside the candidates never reach the first ten, so published figures do not depend on it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lavis_lite.errors import InputError

RANKS = (1, 5, 10)


def best_first(scores: np.ndarray) -> np.ndarray:
    """Indices of one query's candidates, best first."""
    return np.argsort(scores)[::-1]


def recall_metrics(
    score_i2t: np.ndarray,
    score_t2i: np.ndarray,
    txt2img: Sequence[int] | Mapping[int, int],
    img2txt: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
) -> dict[str, float]:
    """`txt_r1/5/10` and `img_r1/5/10` in percent, their means, and `agg_metrics` (= `txt_r_mean`, as in LAVIS).

    `score_i2t` is (images, texts), `score_t2i` (texts, images). An image counts as found at the rank of its best text.
    Raises ValueError for matrices of other shapes, with NaNs, and for queries without a right answer.
    """
    texts_of = [list(img2txt[i]) for i in range(len(img2txt))]
    images_of = [[txt2img[t]] for t in range(len(txt2img))]
    txt = _recalls(score_i2t, texts_of, num_candidates=len(images_of), name="score_i2t")
    img = _recalls(score_t2i, images_of, num_candidates=len(texts_of), name="score_t2i")
    txt_mean, img_mean = float(np.mean(txt)), float(np.mean(img))
    return {
        **{f"txt_r{k}": value for k, value in zip(RANKS, txt, strict=True)},
        "txt_r_mean": txt_mean,
        **{f"img_r{k}": value for k, value in zip(RANKS, img, strict=True)},
        "img_r_mean": img_mean,
        "r_mean": (txt_mean + img_mean) / 2,
        "agg_metrics": txt_mean,
    }


def _recalls(scores: np.ndarray, right: Sequence[Sequence[int]], *, num_candidates: int, name: str) -> list[float]:
    scores = np.asarray(scores)
    if scores.shape != (len(right), num_candidates):
        raise InputError(
            f"{name} has shape {scores.shape}, expected {(len(right), num_candidates)} (queries, candidates)"
        )
    if not len(right):
        raise InputError(f"{name} is empty: there are no queries to rank for")
    if np.isnan(scores).any():
        raise InputError(
            f"{name} has NaNs in row {int(np.isnan(scores).any(axis=1).argmax())}: ranks would be meaningless"
        )
    ranks = np.array(
        [_first_hit(row, answers, query) for query, (row, answers) in enumerate(zip(scores, right, strict=True))]
    )
    return [float(100 * np.mean(ranks < k)) for k in RANKS]


def _first_hit(row: np.ndarray, answers: Sequence[int], query: int) -> int:
    if not len(answers):
        raise InputError(f"query {query} has no right answer: leave images without texts out of the gallery")
    return int(np.flatnonzero(np.isin(best_first(row), answers))[0])
