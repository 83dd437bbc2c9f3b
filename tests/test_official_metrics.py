"""Metrics of the datasets' owners against their definitions, written here a second time, on random results.

Each draws at least 500 questions, with ties, repeated options, empty texts and odd punctuation among them.
"""

import math
import random
import re
from collections import defaultdict
from typing import Any

import pytest

from lavis_lite.tasks.metrics.dialog import ndcg, ranks_of, sparse_metrics
from lavis_lite.tasks.metrics.gqa import gqa_metrics
from lavis_lite.tasks.metrics.nlvr import consistency
from lavis_lite.tasks.metrics.vqa_accuracy import CONTRACTIONS, vqa_accuracy

# Visual Dialog


def rounds(number: int) -> list[tuple[list[float], int, list[float]]]:
    """Losses of a hundred options (with ties), the right one, and the options' relevances."""
    rng = random.Random(1)
    found = []
    for _ in range(number):
        losses = [rng.choice([rng.random() * 9, 1.0, 2.5, 1e4]) for _ in range(100)]
        relevance = [rng.choice([0, 0, 0, 0.2, 0.5, 1.0]) for _ in range(100)]
        relevance[rng.randrange(100)] = 1.0
        found.append((losses, rng.randrange(100), relevance))
    return found


def test_visual_dialogs_ranks_and_gain() -> None:
    drawn = rounds(600)
    ranks, gains = [], []
    for losses, right, relevance in drawn:
        order = sorted(range(100), key=lambda option: losses[option])  # Python's sort is stable
        ranks.append(order.index(right) + 1)
        k = sum(value > 0 for value in relevance)
        best = sorted(relevance, reverse=True)
        dcg, ideal = (
            sum(value / math.log2(place + 2) for place, value in enumerate(values[:k]))
            for values in ([relevance[option] for option in order], best)
        )
        gains.append(dcg / ideal)
    found = sparse_metrics([ranks_of(losses)[right] for losses, right, _ in drawn])
    assert found["mrr"] == pytest.approx(100 * sum(1 / rank for rank in ranks) / 600)
    assert found["mean_rank"] == pytest.approx(sum(ranks) / 600)
    for k in (1, 5, 10):
        assert found[f"r{k}"] == pytest.approx(100 * sum(rank <= k for rank in ranks) / 600)
    dense = ndcg([ranks_of(losses) for losses, _, _ in drawn], [relevance for *_, relevance in drawn])
    assert dense == pytest.approx(100 * sum(gains) / 600)


def test_equal_texts_are_two_options() -> None:
    assert ranks_of([0.5, 0.5, 0.1]) == [2, 3, 1]


def test_a_round_without_relevance_and_other_lengths_are_errors() -> None:
    with pytest.raises(ValueError, match="round 0: no option has any relevance"):
        ndcg([[1, 2]], [[0, 0]])
    with pytest.raises(ValueError, match="round 0: 2 options are ranked, but 3"):
        ndcg([[1, 2]], [[0, 1, 0]])


# GQA

TYPES = ("query", "verify", "logical", "choose", "compare")


def questions(number: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Questions as GQA's owners write them, and predictions."""
    rng = random.Random(2)
    texts = ["yes", "no", "red", "left", "color", "shape", "t-shirt"]
    records = {}
    for index in range(number):
        records[str(index)] = {
            "answers": [rng.choice(texts)],
            "types": {
                "structural": rng.choice(TYPES),
                "semantic": rng.choice(["obj", "attr", "rel"]),
                "detailed": rng.choice(["existAttr", "twoCommon", "weather"]),
            },
            "groups": {"global": rng.choice([None, "color", "place", "material"])},
            "entailed": [str(rng.randrange(number)) for _ in range(rng.randrange(4))],
            "semantic": [{}] * rng.randint(1, 6),
            "is_balanced": rng.random() < 0.8,
            "valid": rng.sample(texts, 3),
            "plausible": rng.sample(texts, 2),
        }
    predictions = {key: rng.choice([record["answers"][0], *texts]) for key, record in records.items()}
    return records, predictions


def mean(values: list[float]) -> float:
    return 100 * sum(values) / len(values)


def test_gqas_metrics() -> None:
    records, predictions = questions(800)
    hits = {key: float(predictions[key] == record["answers"][0]) for key, record in records.items()}
    found = gqa_metrics(records, predictions, hits)
    own = {key: record for key, record in records.items() if record["is_balanced"]}
    is_open = {key: record["types"]["structural"] == "query" for key, record in own.items()}
    assert found["open"] == pytest.approx(mean([hits[key] for key in own if is_open[key]]))
    assert found["binary"] == pytest.approx(mean([hits[key] for key in own if not is_open[key]]))
    for kind in TYPES:
        expected = mean([hits[key] for key, record in own.items() if record["types"]["structural"] == kind])
        assert found["per_structural"][kind] == pytest.approx(expected)
    for steps in range(1, 7):
        expected = mean([hits[key] for key, record in own.items() if len(record["semantic"]) == steps])
        assert found["per_steps"][str(steps)] == pytest.approx(expected)
    shares = []
    for key, record in own.items():
        others = [other for other in record["entailed"] if other != key]
        if hits[key] and others:
            shares.append(sum(hits[other] for other in others) / len(others))
    assert found["consistency"] == pytest.approx(mean(shares))
    for name, scope in (("validity", "valid"), ("plausibility", "plausible")):
        inside = []
        for key, record in own.items():
            common = "Common" in record["types"]["detailed"]
            inside.append(predictions[key] in (["color", "material", "shape"] if common else record[scope]))
        assert found[name] == pytest.approx(mean(inside))
    assert found["distribution"] == pytest.approx(chi_square(own, predictions))


def chi_square(records: dict[str, dict[str, Any]], predictions: dict[str, str]) -> float:
    gold: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    given: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for key, record in records.items():
        group = record["groups"]["global"]
        if group is not None:
            gold[group][record["answers"][0]] += 1
            given[group][predictions[key]] += 1
    weighted = total = 0.0
    for group, answers in gold.items():
        distance = sum((given[group][answer] - count) ** 2 / count for answer, count in answers.items())
        weighted += distance * sum(answers.values())
        total += sum(answers.values())
    return weighted / total


def test_gqas_metrics_need_their_fields() -> None:
    assert gqa_metrics({"1": {"answers": ["yes"]}}, {"1": "yes"}, {"1": 1.0}) == {}


# NLVR2


def test_nlvrs_consistency() -> None:
    rng = random.Random(3)
    records, hits, sentences = [], [], defaultdict(list)
    for group in range(200):
        for sentence in range(2):
            for pair in range(rng.randint(1, 4)):
                hit = float(rng.random() < 0.8)
                records.append({"identifier": f"dev-{group}-{pair}-{sentence}", "sentence": "the same"})
                hits.append(hit)
                sentences[group, sentence].append(hit)
    assert len(records) > 500
    assert consistency(records, hits) == pytest.approx(mean([all(own) for own in sentences.values()]))
    by_text = [{"sentence": "a"}, {"sentence": "b"}, {"sentence": "a"}]
    assert consistency(by_text, [1.0, 1.0, 0.0]) == 50


# TextVQA

ODD = [
    "yes",
    "Yes.",
    "the cat's",
    "cat",
    "2",
    "two",
    "a 1,000 m",
    "1000 m",
    "t-shirt",
    "don't",
    "dont",
    "",
    "n/a",
    "no?",
]


def textvqa_clean(text: str) -> str:
    """The answer processor of TextVQA's script, from its description: lower case, no commas or question marks, the
    possessive apart; then VQA's punctuation, numbers, articles and contractions.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in [
        ";",
        "/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]:
        if mark + " " in text or " " + mark in text or re.search(r"(\d)(\,)(\d)", text):
            cleaned = cleaned.replace(mark, "")
        else:
            cleaned = cleaned.replace(mark, " ")
    cleaned = re.sub(r"(?!<=\d)(\.)(?!\d)", "", cleaned, count=32)
    numbers = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    digits = {"none": "0"} | {word: str(value) for value, word in enumerate(numbers[1:])}
    words = [digits.get(word, word) for word in cleaned.lower().split()]
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def test_textvqas_accuracy() -> None:
    rng = random.Random(4)
    for _ in range(1000):
        pool = rng.sample(ODD, rng.randint(1, 4))
        answers, prediction = [rng.choice(pool) for _ in range(10)], rng.choice(ODD)
        cleaned = [textvqa_clean(answer) for answer in answers]
        scores = []
        for left_out in range(10):
            others = cleaned[:left_out] + cleaned[left_out + 1 :]
            scores.append(min(1, others.count(textvqa_clean(prediction)) / 3))
        assert vqa_accuracy(prediction, answers, variant="m4c") == pytest.approx(sum(scores) / 10)


@pytest.mark.parametrize(
    ("variant", "prediction", "answers", "score"),
    [
        ("exact", "T-shirt", ["t-shirt"], 0.0),
        ("normalised", "T-shirt", ["t-shirt"], 1.0),
        ("ivqa_exact", "a dog", ["dog", "dog", "a dog"], 0.5),
        ("ivqa", "a dog", ["dog", "dog", "a dog"], 1.0),
    ],
)
def test_rules_of_raw_strings(variant: Any, prediction: str, answers: list[str], score: float) -> None:
    assert vqa_accuracy(prediction, answers, variant=variant) == score
