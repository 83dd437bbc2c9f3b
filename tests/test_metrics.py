"""Metrics against the recorded tables, hand arithmetic and pycocoevalcap's own code path."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lavis_lite.tasks.captioning import CaptionTask
from lavis_lite.tasks.metrics import caption_java
from lavis_lite.tasks.metrics.caption import TOKENIZERS, caption_metrics
from lavis_lite.tasks.metrics.caption_tokens import character_tokens, joined_as
from lavis_lite.tasks.metrics.retrieval import recall_metrics
from lavis_lite.tasks.metrics.vqa_accuracy import (
    CONTRACTIONS,
    clean_answer,
    strip_punctuation,
    vqa_accuracy,
    vqa_metrics,
)

TABLES = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference")) / "tables"
VQA = json.loads((TABLES / "vqa_accuracy.json").read_text())
RETRIEVAL = json.loads((TABLES / "retrieval_metrics.json").read_text())
QA_TASKS = json.loads((TABLES / "qa_tasks.json").read_text())
CAPTIONS = json.loads((TABLES / "caption_metrics.json").read_text())
REFERENCES = {f"image {i}": references for i, (_, references) in enumerate(CAPTIONS["pairs"])}
PREDICTIONS = {f"image {i}": caption for i, (caption, _) in enumerate(CAPTIONS["pairs"])}

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs a Java runtime")
sorts_as_recorded = pytest.mark.skipif(
    not np._core._multiarray_umath.__cpu_features__["AVX2"], reason="the recorded order of ties is that of AVX2 sorting"
)


@pytest.mark.parametrize("row", VQA["rows"], ids=lambda row: repr(row["pred"]))
def test_lavis_vqa_accuracy_equals_table(row: dict) -> None:
    assert 100 * vqa_accuracy(row["pred"], row["answers"], variant="lavis") == pytest.approx(row["acc"], abs=1e-6)
    assert clean_answer(row["pred"]) == row["processed_pred"]
    one_line = row["pred"].replace("\n", " ").replace("\t", " ").strip()
    assert strip_punctuation(one_line) == row["processPunctuation"]


def test_lavis_vqa_metrics_equal_table() -> None:
    kinds = VQA["answer_type_cycle"]
    truths = {
        i: {"answers": row["answers"], "question_type": "q", "answer_type": kinds[i % len(kinds)]}
        for i, row in enumerate(VQA["rows"])
    }
    metrics = vqa_metrics(truths, {i: row["pred"] for i, row in enumerate(VQA["rows"])}, variant="lavis")
    expected = VQA["overall_n2"]
    assert metrics["overall"] == metrics["agg_metrics"] == expected["overall"]
    assert metrics["per_question_type"] == expected["perQuestionType"]
    assert metrics["per_answer_type"] == expected["perAnswerType"]


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_official_accuracy_ladder(matches: int, accuracy: float) -> None:
    answers = [{"answer": "cat"}] * matches + [{"answer": "dog"}] * (10 - matches)
    assert vqa_accuracy("cat", answers) == pytest.approx(accuracy)


def test_official_accuracy_cleans_both_sides_only_if_humans_differ() -> None:
    assert vqa_accuracy("Two.", ["two"] * 5 + ["2"] * 5) == 1.0
    assert vqa_accuracy("2", ["two"] * 5 + ["2"] * 5) == 1.0
    assert vqa_accuracy("dog", ["the dog"] * 4 + ["a cat"] * 6) == 1.0
    assert vqa_accuracy("dog", ["the dog"] * 4 + ["a cat"] * 6, variant="lavis") == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 10, variant="lavis") == 1.0
    assert vqa_accuracy("yes\n", [" yes"] * 10) == 1.0
    assert vqa_accuracy("grün", ["grün"] * 4 + ["Grün"] * 6) == 1.0


def test_contractions_have_one_apostrophe_missing() -> None:
    assert len(CONTRACTIONS) > 110
    assert CONTRACTIONS["couldnt've"] == CONTRACTIONS["couldn'tve"] == "couldn't've"
    for odd in ("im", "shes", "lets", "well", "wed", "shell"):
        assert odd not in CONTRACTIONS


@pytest.mark.parametrize(("task", "variant"), [("gqa", "normalised"), ("aok_vqa", "direct"), ("discrn_qa", "contains")])
def test_other_sets_accuracies_equal_table(task: str, variant: str) -> None:
    for (prediction, answers), expected in zip(QA_TASKS[task]["pairs"], QA_TASKS[task]["each"], strict=True):
        answers = [answers] if isinstance(answers, str) else answers
        assert 100 * vqa_accuracy(prediction, answers, variant=variant) == pytest.approx(expected), prediction


def test_equal_answers_do_not_exclude_each_other() -> None:
    """LAVIS compared annotations by content: without `answer_id` five "cat" left one another out, and scored half."""
    case = QA_TASKS["no_answer_id"]
    assert case["acc"] == 50.0
    assert vqa_accuracy(case["pred"], case["answers"]) == 1.0


def test_vqa_metrics_by_type_and_mistakes() -> None:
    truths = {
        "ä": {"answers": ["red"] * 10, "answer_type": "other", "question_type": "what"},
        2: {"answers": ["yes"] * 2 + ["no"] * 8, "answer_type": "yes/no", "question_type": "is"},
        3: {"answers": ["yes"] * 10, "answer_type": "yes/no"},
    }
    metrics = vqa_metrics(truths, {"ä": "red", 2: "yes", 3: "no"})
    assert metrics["overall"] == pytest.approx(100 * (1 + 0.6 + 0) / 3, abs=0.005)
    assert metrics["per_answer_type"] == {"other": 100.0, "yes/no": 30.0}
    assert metrics["per_question_type"] == {"what": 100.0, "is": 60.0}
    with pytest.raises(ValueError, match=r"1 of 3 questions.*'ä'"):
        vqa_metrics(truths, {2: "yes", 3: "no"})


@sorts_as_recorded
@pytest.mark.parametrize("case", ["plain", "k_test_style_minus100", "ties"])
def test_recalls_equal_table(case: str) -> None:
    table = RETRIEVAL[case]
    metrics = recall_metrics(
        np.array(table["scores_i2t"]), np.array(table["scores_t2i"]), RETRIEVAL["txt2img"], RETRIEVAL["img2txt"]
    )
    assert metrics == pytest.approx(table["metrics"])


def test_recalls_by_hand() -> None:
    score_i2t = np.array([[9.0, 1.0, 2.0], [5.0, 4.0, 3.0]])
    score_t2i = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    metrics = recall_metrics(score_i2t, score_t2i, {0: 0, 1: 0, 2: 1}, {0: [0, 1], 1: [2]})
    assert (metrics["txt_r1"], metrics["txt_r5"], metrics["img_r1"]) == (50.0, 100.0, 100.0)
    assert metrics["txt_r_mean"] == metrics["agg_metrics"] == pytest.approx(250 / 3)
    assert metrics["r_mean"] == pytest.approx((250 / 3 + 100) / 2)


def test_recall_mistakes() -> None:
    with pytest.raises(ValueError, match=r"score_i2t has shape \(1, 2\), expected \(2, 3\)"):
        recall_metrics(np.zeros((1, 2)), np.zeros((3, 2)), [0, 0, 1], [[0, 1], [2]])
    with pytest.raises(ValueError, match="NaNs in row 1"):
        recall_metrics(np.array([[0.0, 1], [np.nan, 0]]), np.zeros((2, 2)), [0, 1], [[0], [1]])
    with pytest.raises(ValueError, match="query 1 has no right answer"):
        recall_metrics(np.zeros((2, 1)), np.zeros((1, 2)), [0], [[0], []])


@pytest.mark.slow
@needs_java
def test_caption_metrics_equal_table() -> None:
    metrics = caption_metrics(REFERENCES, PREDICTIONS)
    expected = {f"Bleu_{n}": value for n, value in enumerate(CAPTIONS["Bleu"], start=1)}
    expected |= {name: CAPTIONS[name] for name in ("METEOR", "ROUGE_L", "CIDEr", "agg_metrics")}
    assert metrics.pop("tokenizer") == "ptb"
    assert metrics == pytest.approx(expected, rel=1e-9)


@needs_java
def test_java_tokens_equal_table_and_survive_odd_lines() -> None:
    references = caption_java.tokenize(REFERENCES)
    assert list(references.values()) == CAPTIONS["tokenized_gt"]
    predictions = caption_java.tokenize({key: [text] for key, text in PREDICTIONS.items()})
    assert list(predictions.values()) == CAPTIONS["tokenized_res"]
    odd = ["日本語 über\u2028café\x85 x", "", "two\nlines", ""]
    assert caption_java.tokenize({"odd": odd}) == {"odd": ["日本語 über café x", "", "two lines", ""]}


def test_simple_tokens_agree_with_the_table() -> None:
    tokenize = TOKENIZERS["ptb_like"]
    assert list(tokenize(REFERENCES).values()) == CAPTIONS["tokenized_gt"]
    predictions = tokenize({key: [text] for key, text in PREDICTIONS.items()})
    assert list(predictions.values()) == CAPTIONS["tokenized_res"]


def test_without_java_metrics_are_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_java.shutil, "which", lambda name: None)
    metrics = caption_metrics(REFERENCES, PREDICTIONS, ("bleu", "meteor", "cider", "spice"))
    assert metrics["approximate_tokenizer"] is True
    assert metrics["tokenizer"] == "ptb_like"
    assert metrics["Bleu_4"] == pytest.approx(CAPTIONS["Bleu"][3])
    assert metrics["CIDEr"] == pytest.approx(CAPTIONS["CIDEr"])
    assert set(metrics["left_out"]) == {"METEOR", "SPICE"}
    assert "Java" in metrics["left_out"]["METEOR"]
    assert "METEOR" not in metrics


def test_java_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'no memory' >&2\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setattr(caption_java, "find_java", lambda: str(java))
    with pytest.raises(RuntimeError, match=r"tokenizer.*no memory"):
        caption_java.tokenize({"a": ["x"]})
    with pytest.raises(RuntimeError, match=r"METEOR.*no memory"):
        caption_java.meteor({"a": ["x"]}, {"a": ["x"]})


def test_caption_aggregate_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_java, "find_java", lambda: None)
    ids = {1: ["a red ball", "ball"], "zwei": ["ein Hund läuft"]}
    predictions = {"1": "a red ball", "zwei": "ein Hund läuft"}
    cider = caption_metrics(ids, predictions, ("cider",))
    assert cider["agg_metrics"] == cider["CIDEr"] > 0
    rouge = caption_metrics(ids, predictions, ("rouge",))
    assert rouge["agg_metrics"] == rouge["ROUGE_L"] == pytest.approx(1.0)


CHINESE = {
    "cat": "一只黄色的猫看着镜头！",
    "astronaut": "一位女宇航员在微笑。",
    "coffee": "桌子上有一杯咖啡和一把勺子",
}


def test_captions_without_spaces_are_scored_by_characters() -> None:
    """Every reference repeated, as it is and with WordPiece's spaces: 1.0, where one word per caption gave 0.08."""
    spaced = {key: " ".join(text) for key, text in CHINESE.items()}
    for predictions in (CHINESE, spaced):
        metrics = caption_metrics({key: [text] for key, text in CHINESE.items()}, predictions, ("bleu", "rouge"))
        assert metrics["tokenizer"] == "characters"
        for name in ("Bleu_1", "Bleu_4", "ROUGE_L"):
            assert metrics[name] == pytest.approx(1.0)
    half = caption_metrics({"x": ["一只黄色的猫"]}, {"x": "一只黑色的狗"}, ("bleu",))
    assert half["Bleu_1"] == pytest.approx(4 / 6)  # four of six characters: 一 只 色 的


def test_tokens_are_chosen_by_name_or_by_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_java, "find_java", lambda: None)
    references, predictions = {"x": ["the 猫 sleeps"]}, {"x": "the 猫 sleeps"}
    assert caption_metrics(references, predictions, ("bleu",))["tokenizer"] == "ptb_like"
    metrics = caption_metrics(references, predictions, ("bleu",), tokens="characters")
    assert metrics["tokenizer"] == "characters"
    assert "approximate_tokenizer" not in metrics
    chosen = caption_metrics({key: [text] for key, text in CHINESE.items()}, CHINESE, ("bleu",), tokens="ptb")
    assert chosen["tokenizer"] == "ptb_like"
    with pytest.raises(ValueError, match=r"run\.caption_tokens: 'jieba' .*auto, ptb, characters"):
        CaptionTask(caption_tokens="jieba")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("一只 iPhone 12，在桌上!", ["一", "只", "iphone", "12", "在", "桌", "上"]),
        ("赤い丸と青い四角", list("赤い丸と青い四角")),
        ("แมวสีดำ", ["แ", "ม", "ว", "สี", "ด", "ำ"]),
        ("женщина-космонавт", ["женщина", "космонавт"]),
        ("", []),
    ],
)
def test_character_tokens(text: str, tokens: list[str]) -> None:
    assert character_tokens(text) == tokens


def test_hyphens_are_joined_where_a_reference_has_them() -> None:
    references = ["A well-known woman-astronaut", "the dog's T-shirt"]
    assert joined_as("a well - known man - eater", references) == "a well-known man - eater"
    assert joined_as("the dog ' s t - shirt, unwell - known", references) == "the dog's t-shirt, unwell - known"
    references, predictions = {"x": ["женщина-космонавт улыбается"]}, {"x": "женщина - космонавт улыбается"}
    apart = caption_metrics(references, predictions, ("bleu",))
    assert apart["Bleu_1"] < 0.5  # the protocol of published scores: one of three words
    assert caption_metrics(references, predictions, ("bleu",), join_hyphens=True)["Bleu_1"] == pytest.approx(1.0)


def test_caption_mistakes() -> None:
    with pytest.raises(ValueError, match=r"bleurt.*choose from"):
        caption_metrics({1: ["a"]}, {1: "a"}, ("bleurt",))
    with pytest.raises(ValueError, match=r"without references.*'2'"):
        caption_metrics({1: ["a"]}, {1: "a", 2: "b"})
    with pytest.raises(ValueError, match=r"no caption.*'2'"):
        caption_metrics({1: ["a"], 2: ["b"]}, {1: "a"})
    with pytest.raises(ValueError, match="two image ids are the same"):
        caption_metrics({1: ["a"], "1": ["b"]}, {1: "a"})
    with pytest.raises(ValueError, match="no captions"):
        caption_metrics({}, {})


def test_groups_are_means_over_their_images_scores():
    references = {1: ["a red dog"], 2: ["two cats on a mat"], 3: ["a bird in a tree"]}
    captions = {1: "a red dog", 2: "a cat on a mat", 3: "a plane"}
    found = caption_metrics(references, captions, ["cider", "rouge"], groups={1: "in", 2: "out", 3: "out"})
    each = found["CIDEr"].scores
    assert found["in"]["CIDEr"] == pytest.approx(each[0])
    assert found["out"]["CIDEr"] == pytest.approx((each[1] + each[2]) / 2)
    assert found["CIDEr"] == pytest.approx(each.mean())
    assert found["out"]["ROUGE_L"] == pytest.approx(found["ROUGE_L"].scores[1:].mean())
    assert "in" not in caption_metrics(references, captions, ["cider"])
