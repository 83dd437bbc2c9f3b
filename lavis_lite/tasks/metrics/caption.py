"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE of captions, by the COCO caption code (pycocoevalcap).

Fractions as that code prints them (papers multiply by 100). The tokenizer and METEOR are Java programs: without `java`
on the PATH a simple tokenizer stands in, the result says `approximate_tokenizer: true`, and METEOR is left out by name.
Texts of languages without spaces are scored by characters; the result says under `tokenizer` what was done.
CIDEr's word weights come from the references of the images scored: subsets score differently.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.tasks.metrics import caption_java
from lavis_lite.tasks.metrics.caption_tokens import (
    are_unspaced,
    character_tokens,
    joined_as,
    ptb_like_tokens,
)

logger = logging.getLogger(__name__)

METRICS = ("bleu", "meteor", "rouge", "cider", "spice")
DEFAULT_METRICS = ("bleu", "meteor", "rouge", "cider")
LABELS = {"bleu": "BLEU", "meteor": "METEOR", "rouge": "ROUGE_L", "cider": "CIDEr", "spice": "SPICE"}

Texts = dict[str, list[str]]
Tokens = Literal["auto", "ptb", "characters"]


def check_metrics(metrics: Iterable[str]) -> None:
    """Raise ValueError for a name that is no caption metric, or if there is none."""
    names = list(metrics)
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise InputError(f"run.metrics={names!r}: choose from {', '.join(METRICS)}")


def caption_metrics(
    references: Mapping[Any, Sequence[str]],
    captions: Mapping[Any, str],
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    tokens: Tokens = "auto",
    join_hyphens: bool = False,
) -> dict[str, Any]:
    """`Bleu_1..4`, `METEOR`, `ROUGE_L`, `CIDEr`, `SPICE` as asked, and `agg_metrics`.

    Both are keyed by image id, of any type (compared as strings). `agg_metrics` is CIDEr + Bleu_4, or whichever of
    them was asked for, or the mean of the metrics. `left_out` says what could not be computed, and why. `tokenizer` is
    `ptb`, `ptb_like` (without Java) or `characters`; `tokens` chooses, `auto` takes characters where most letters of
    the references are of a language without spaces. `join_hyphens` writes "well - known" as "well-known" where a
    reference of the image has that.
    Raises ValueError if the images of the two differ, an image has no reference, or there are no images.
    """
    check_metrics(metrics)
    gold, told = by_string(references, "references"), by_string(captions, "captions")
    check_images(gold, told)
    java = caption_java.find_java()
    if join_hyphens:
        told = {key: joined_as(text, gold[key]) for key, text in told.items()}
    if tokens == "auto":
        tokens = "characters" if are_unspaced(text for texts in gold.values() for text in texts) else "ptb"
    by_words = caption_java.tokenize if java else approximate_tokenize
    tokenize = by_words if tokens == "ptb" else by_characters
    gold, told = tokenize(gold), tokenize({key: [text] for key, text in told.items()})
    scores: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(metrics):
        reason = caption_java.missing_for(name)
        if reason:
            logger.warning("%s is left out: %s", LABELS[name], reason)
            left_out[LABELS[name]] = reason
        else:
            scores.update(_score(name, gold, told))
    scores["agg_metrics"] = aggregate(scores)
    scores["tokenizer"] = "ptb_like" if tokens == "ptb" and not java else tokens
    if scores["tokenizer"] == "ptb_like":
        scores["approximate_tokenizer"] = True
    return {**scores, "left_out": left_out} if left_out else scores


def aggregate(scores: Mapping[str, float]) -> float | None:
    """CIDEr + Bleu_4 (LAVIS's model selection), or what there is of them, or the mean of all; None without any."""
    chosen = [scores[name] for name in ("CIDEr", "Bleu_4") if name in scores]
    if chosen:
        return sum(chosen)
    return sum(scores.values()) / len(scores) if scores else None


def by_string(table: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """`table` with its ids as strings; raises ValueError if two ids become the same."""
    keyed = {str(key): value for key, value in table.items()}
    if len(keyed) < len(table):
        raise InputError(f"{name}: two image ids are the same once written as strings")
    return keyed


def check_images(references: Mapping[str, Sequence[str]], captions: Mapping[str, str]) -> None:
    """Raise ValueError unless each image has one caption and at least one reference."""
    alien = [key for key in captions if not references.get(key)]
    silent = [key for key in references if key not in captions]
    if alien:
        raise InputError(f"{len(alien)} captions belong to images without references, e.g. image id {alien[0]!r}")
    if silent:
        raise InputError(f"{len(silent)} of {len(references)} images have no caption, e.g. image id {silent[0]!r}")
    if not captions:
        raise InputError("there are no captions to score")


def approximate_tokenize(texts: Mapping[str, Sequence[str]]) -> Texts:
    """`caption_java.tokenize` without Java, nearly: see caption_tokens.py."""
    return {key: [" ".join(ptb_like_tokens(text)) for text in several] for key, several in texts.items()}


def by_characters(texts: Mapping[str, Sequence[str]]) -> Texts:
    """Texts of languages without spaces as characters: see caption_tokens.py."""
    return {key: [" ".join(character_tokens(text)) for text in several] for key, several in texts.items()}


def _score(name: str, gold: Texts, told: Texts) -> dict[str, float]:
    if name == "meteor":
        return {"METEOR": caption_java.meteor(gold, told)}
    try:
        if name == "bleu":
            from pycocoevalcap.bleu.bleu import Bleu

            bleu, _ = Bleu(4).compute_score(gold, told, verbose=0)
            return {f"Bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
        if name == "rouge":
            from pycocoevalcap.rouge.rouge import Rouge as Scorer
        elif name == "cider":
            from pycocoevalcap.cider.cider import Cider as Scorer
        else:
            from pycocoevalcap.spice.spice import Spice as Scorer
    except ImportError as error:
        raise MissingPackageError(f"caption metrics need pycocoevalcap ({error}): pip install pycocoevalcap") from error
    return {LABELS[name]: float(Scorer().compute_score(gold, told)[0])}
