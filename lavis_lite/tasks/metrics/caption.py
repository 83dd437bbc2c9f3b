"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE of captions, by the COCO caption code (pycocoevalcap).

Values are fractions as that code prints them (papers multiply by 100). The tokenizer and METEOR are Java programs:
without `java` on the PATH a simple tokenizer replaces the first, the result says `approximate_tokenizer: true`, and
METEOR is left out by name. Texts of languages without spaces are scored by characters; `tokenizer` says which was used.
CIDEr's word weights come from the references of the images scored: subsets score differently.
"""

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.tasks.metrics import caption_java
from lavis_lite.tasks.metrics.caption_tokens import are_unspaced, character_tokens, joined_as, ptb_like_tokens
from lavis_lite.tasks.metrics.mean import Mean

logger = logging.getLogger(__name__)

LABELS = {"bleu": "BLEU", "meteor": "METEOR", "rouge": "ROUGE_L", "cider": "CIDEr", "spice": "SPICE"}
DEFAULT_METRICS = ("bleu", "meteor", "rouge", "cider")
KEYS = {name: (label,) for name, label in LABELS.items()} | {"bleu": tuple(f"Bleu_{n}" for n in range(1, 5))}
"""Names in the results of each metric."""

Texts = dict[str, list[str]]
Tokens = Literal["auto", "ptb", "characters"]


def check_metrics(metrics: Iterable[str]) -> None:
    """Raise InputError for an unknown caption metric, or an empty list."""
    names = list(metrics)
    if not names or not LABELS.keys() >= set(names):
        raise InputError(f"run.metrics={names!r}: choose from {', '.join(LABELS)}")


def caption_metrics(
    references: Mapping[Any, Sequence[str]],
    captions: Mapping[Any, str],
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    tokens: Tokens = "auto",
    join_hyphens: bool = False,
    groups: Mapping[Any, str] | None = None,
) -> dict[str, Any]:
    """Return those of `Bleu_1..4`, `METEOR`, `ROUGE_L`, `CIDEr`, `SPICE` in `metrics`, and `agg_metrics`.

    Both mappings have image ids of any type as keys, compared as strings. `agg_metrics` is CIDEr + Bleu_4, or the one
    of them in `metrics`, or the mean of the metrics. `left_out` says what could not be computed, and why. `tokenizer`
    is `ptb`, `ptb_like` (without Java) or `characters`; `tokens` chooses, `auto` takes characters where most letters
    of the references are of a language without spaces. `join_hyphens` writes "well - known" as "well-known" where a
    reference of the image has that. `groups` names a group of each image (nocaps' domains): the result has each group's
    means over its images, as nocaps' server has them, with CIDEr's word weights of all images.
    Raises InputError if the images of the two differ, an image has no reference, or the set is empty.
    """
    check_metrics(metrics)
    references, predictions = by_string(references, "references"), by_string(captions, "captions")
    check_images(references, predictions)
    if join_hyphens:
        predictions = {key: joined_as(text, references[key]) for key, text in predictions.items()}
    if tokens == "auto":
        tokens = "characters" if are_unspaced(text for texts in references.values() for text in texts) else "ptb"
    tokenizer = "ptb_like" if tokens == "ptb" and not caption_java.find_java() else tokens
    # an image's references and its prediction in one call, since a call starts Java
    rows = TOKENIZERS[tokenizer]({key: [*texts, predictions[key]] for key, texts in references.items()})
    tokenized = {key: row[:-1] for key, row in rows.items()}, {key: row[-1:] for key, row in rows.items()}
    scores: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(metrics):
        if reason := caption_java.missing_for(name):
            logger.warning("%s is left out: %s", LABELS[name], reason)
            left_out[LABELS[name]] = reason
        else:
            scores.update(_score(name, *tokenized))
    own = by_string(groups or {}, "groups")
    tables = by_group(scores, [own.get(key) for key in references])
    chosen = [scores[name] for name in ("CIDEr", "Bleu_4") if name in scores]
    mean = sum(scores.values()) / len(scores) if scores else None
    scores |= {"agg_metrics": sum(chosen) if chosen else mean, "tokenizer": tokenizer} | tables
    if tokenizer == "ptb_like":
        scores["approximate_tokenizer"] = True
    return {**scores, "left_out": left_out} if left_out else scores


def by_string(table: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """Return `table` with its ids as strings. InputError if two ids become the same."""
    keyed = {str(key): value for key, value in table.items()}
    if len(keyed) < len(table):
        raise InputError(f"{name}: two image ids are the same once written as strings")
    return keyed


def by_group(scores: Mapping[str, float], groups: Sequence[str | None]) -> dict[str, dict[str, Mean]]:
    """Return the means of each group's images; `groups` has that of each image, in the order of the scores."""
    tables: dict[str, dict[str, Mean]] = {}
    for name in sorted({group for group in groups if group is not None}):
        chosen = np.array([group == name for group in groups])
        means = {key: value.scores[chosen] for key, value in scores.items() if isinstance(value, Mean)}
        tables[name] = {key: Mean(float(own.mean()), own) for key, own in means.items()}
    return tables


def check_images(references: Mapping[str, Sequence[str]], captions: Mapping[str, str]) -> None:
    """Raise InputError unless each image has one caption and at least one reference."""
    if unknown := [key for key in captions if not references.get(key)]:
        raise InputError(f"{len(unknown)} captions belong to images without references, e.g. image id {unknown[0]!r}")
    if missing := [key for key in references if key not in captions]:
        raise InputError(f"{len(missing)} of {len(references)} images have no caption, e.g. image id {missing[0]!r}")
    if not captions:
        raise InputError("no captions to score: the split is empty")


def tokenizer_of(tokens_of: Callable[[str], list[str]]) -> Callable[[Mapping[str, Sequence[str]]], Texts]:
    """Return a tokenizer like `caption_java.tokenize`, from a function that splits one text."""
    return lambda texts: {key: [" ".join(tokens_of(text)) for text in own] for key, own in texts.items()}


TOKENIZERS = {
    "ptb": caption_java.tokenize,
    "ptb_like": tokenizer_of(ptb_like_tokens),
    "characters": tokenizer_of(character_tokens),
}


def _score(name: str, references: Texts, predictions: Texts) -> dict[str, float]:
    if name == "meteor":
        return {"METEOR": caption_java.meteor(references, predictions)}
    try:
        scorer = vars(importlib.import_module(f"pycocoevalcap.{name}.{name}"))[name.capitalize()]
    except ImportError as error:
        raise MissingPackageError(f"caption metrics need pycocoevalcap ({error}): pip install pycocoevalcap") from error
    if name == "bleu":
        bleu, _ = scorer(4).compute_score(references, predictions, verbose=0)
        return {f"Bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
    value, scores = scorer().compute_score(references, predictions)
    values = [score["All"]["f"] for score in scores] if name == "spice" else scores
    return {LABELS[name]: Mean(float(value), values)}
