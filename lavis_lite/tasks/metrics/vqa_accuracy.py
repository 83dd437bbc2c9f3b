"""VQA accuracy (Antol et al. 2015): an answer counts min(1, matches/3), averaged over leaving each human answer out.

Two variants of it. `official` is what the evaluation servers do: human answers and prediction are both cleaned
(punctuation, number words, articles, contractions), but neither if all humans agree. `lavis` is an older script: the
prediction is always cleaned, human answers lose only punctuation, and only if they differ. The clean-up's oddities
(a "." stays before a digit; at most 32 are removed; "none" is 0) are the official script's.

Other datasets have other rules: `normalised` (GQA) asks the cleaned prediction to equal one of the answers cleaned
alike ("t-shirt" is right where the answer is "t-shirt"), `direct` (A-OKVQA) counts min(1, matches/3) of the raw
strings, `contains` looks for an answer inside the cleaned prediction, `ivqa` (five annotators) counts min(1, matches/2)
of cleaned texts. `m4c` (TextVQA's own) is `official` with texts that are always cleaned, commas, question marks and
possessives first. `exact` and `ivqa_exact` are `normalised` and `ivqa` of the raw strings, as GQA's and iVQA's owners
count.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lavis_lite.common.errors import InputError
from lavis_lite.tasks.metrics.mean import Mean

Variant = Literal["official", "lavis", "normalised", "direct", "contains", "ivqa", "m4c", "exact", "ivqa_exact"]
RAW: dict[Variant, Variant] = {"normalised": "exact", "ivqa": "ivqa_exact"}
"""The rule of the raw strings, of one that cleans them."""

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {"none": "0"} | {word: str(i) for i, word in enumerate(_DIGITS)}
ARTICLES = frozenset(("a", "an", "the"))
MAX_PERIODS = 32

# In their right spelling; the script's table maps each without one of its apostrophes to it. Two oddities of that table
# are kept: "somebody'd" loses its apostrophe, and forms with a capital I never match lower-cased words.
_CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at
"""


CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def strip_punctuation(text: str) -> str:
    """Delete or blank punctuation as the official script does.

    A mark is deleted wherever it occurs if the text has it beside a space, or has a comma between digits; otherwise it
    becomes a space.
    """
    has_number_comma = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or has_number_comma else " ")
    return re.sub(r"\.(?!\d)", "", cleaned, count=MAX_PERIODS)


def normalise_words(text: str) -> str:
    """Lower the case, turn number words into digits, drop articles, restore apostrophes."""
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def clean_answer(text: str) -> str:
    """Clean a predicted answer as the script does."""
    return normalise_words(strip_punctuation(_one_line(text)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(
    prediction: str, answers: Sequence[str | Mapping[str, Any]], *, variant: Variant = "official"
) -> float:
    """Return the accuracy (0 to 1) of a prediction against the human answers (ten, strings or `{"answer": ...}`).

    Each human answer is left out by its position. LAVIS left out by content, so that equal answers without an
    `answer_id` excluded one another.
    """
    humans: list[str] = [answer["answer"] if isinstance(answer, Mapping) else answer for answer in answers]
    if variant == "direct":
        return min(1.0, humans.count(prediction) / 3)
    if variant == "contains":
        cleaned = clean_answer(prediction)
        return float(any(human in cleaned for human in humans))
    if variant in ("normalised", "ivqa", "exact", "ivqa_exact"):
        if variant in RAW:
            humans, prediction = list(map(clean_answer, humans)), clean_answer(prediction)
        return min(1.0, humans.count(prediction) / (2 if variant.startswith("ivqa") else 1))
    if variant == "m4c":
        return leave_one_out([human == m4c_clean(prediction) for human in map(m4c_clean, humans)])
    if variant == "official":
        humans, prediction = [_one_line(human) for human in humans], _one_line(prediction)
    differ = len(set(humans)) > 1
    if variant == "lavis" or differ:
        prediction = clean_answer(prediction)
    if differ:
        humans = [strip_punctuation(human) if variant == "lavis" else clean_answer(human) for human in humans]
    return leave_one_out([human == prediction for human in humans])


def leave_one_out(matches: Sequence[bool]) -> float:
    """Return min(1, matches/3), averaged over leaving each human answer out."""
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def m4c_clean(text: str) -> str:
    """Clean an answer as TextVQA's script does."""
    return clean_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa_metrics(
    truths: Mapping[Any, Mapping[str, Any]], predictions: Mapping[Any, str], *, variant: Variant = "official"
) -> dict[str, Any]:
    """Return the accuracy in percent, to two digits: `overall` (= `agg_metrics`) and by question and answer type.

    `truths` maps question ids to `{"answers": [...], "question_type": ..., "answer_type": ...}`, types optional.
    Raises InputError if a question has no prediction, or the set is empty.
    """
    missing = [key for key in truths if key not in predictions]
    if missing or not truths:
        example = f", e.g. {missing[0]!r}" if missing else ""
        raise InputError(f"{len(missing)} of {len(truths)} questions have no predicted answer{example}")
    scores = [vqa_accuracy(predictions[key], truth["answers"], variant=variant) for key, truth in truths.items()]
    overall = _percent(scores)
    return {"overall": overall, "agg_metrics": overall, **by_kind(list(truths.values()), scores)}


def by_kind(
    records: Sequence[Mapping[str, Any]],
    scores: Sequence[float],
    kinds: Sequence[str] = ("question_type", "answer_type"),
) -> dict[str, dict[str, float]]:
    """Return `per_<kind>` for each field that some record has: the mean score, in percent, by the field's value."""
    tables: dict[str, dict[str, float]] = {}
    for kind in kinds:
        groups: dict[str, list[float]] = defaultdict(list)
        for record, score in zip(records, scores, strict=True):
            if record.get(kind) is not None:
                groups[record[kind]].append(score)
        if groups:
            tables[f"per_{kind}"] = {name: _percent(groups[name]) for name in sorted(groups, key=str)}
    return tables


def _percent(values: Sequence[float]) -> Mean:
    return Mean(round(100 * sum(values) / len(values), 2), [100 * value for value in values])
