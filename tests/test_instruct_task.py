"""The task `instruct` with fake and with tiny models; AUC, MRR and iVQA's accuracy by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lavis_lite.models import load_model
from lavis_lite.tasks.instruct import InstructTask
from lavis_lite.tasks.metrics.ranking import mean_reciprocal_rank, rank_of, roc_auc
from lavis_lite.tasks.metrics.vqa_accuracy import vqa_accuracy
from lavis_lite.tasks.vqa import VizWizTask, VQATask


class Items(Dataset):
    """Records as an instruction set has them in evaluation; image i is full of i + 1."""

    answer_list = None

    def __init__(self, records: list[dict[str, Any]], size: tuple[int, ...] = (3, 2, 2)) -> None:
        self.annotation = [{"question_id": f"q{i}", "answers": [], **r} for i, r in enumerate(records)]
        self.size = size

    def __len__(self) -> int:
        return len(self.annotation)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        seen = {"image": torch.full(self.size, index + 1.0), "text_input": record.get("text_input", "what {}?")}
        keys = {key: record[key] for key in ("question_id", "candidates") if key in record}
        return {**seen, **keys, "instance_id": str(index)}

    @staticmethod
    def collater(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: [sample[key] for sample in samples] for key in samples[0]}
        return {**batch, "image": torch.stack(batch["image"])}


class Fake(nn.Module):
    """Loses what each image's row of `losses` says; writes what its row of `texts` says. Image 0 is a blank one."""

    def __init__(self, losses: list[list[float]] = (), texts: list[str] = ()) -> None:
        super().__init__()
        self.losses, self.texts = losses, texts
        self.given: dict[str, Any] = {}

    def numbers(self, samples: dict[str, Any]) -> list[int]:
        assert samples["prompt"].replace("{}", samples["text_input"][0], 1) == samples["text_input"][0]
        return [int(value) - 1 for value in samples["image"].flatten(1).amax(1)]

    def class_losses(self, samples: dict[str, Any], candidates: list[list[str]], *, divided: bool) -> torch.Tensor:
        assert not divided, "the area under the curve compares samples"
        rows = [self.losses[number] if number >= 0 else [1.0] * len(self.losses[0]) for number in self.numbers(samples)]
        assert [len(row) for row in rows] == [len(own) for own in candidates]
        return torch.stack([torch.tensor(row + [torch.inf] * (max(map(len, candidates)) - len(row))) for row in rows])

    def generate(self, samples: dict[str, Any], **settings: Any) -> list[str]:
        self.given = settings
        return [self.texts[number] for number in self.numbers(samples)]


def run(task: Any, model: nn.Module, records: list[dict[str, Any]], tmp_path: Path, **options: Any) -> dict[str, Any]:
    """The task's metrics of the records, two a batch."""
    dataset = Items(records, **options)
    loader = DataLoader(dataset, batch_size=2, collate_fn=dataset.collater)
    return task.evaluate(model, loader, split="val", result_dir=tmp_path)


# Metrics


def test_the_area_counts_pairs_and_ties_half() -> None:
    scores, positive = [0.1, 0.4, 0.4, 0.8, 0.4], [False, False, True, True, False]
    # of 2 x 3 pairs: 0.4 beats 0.1 and ties twice (1 + 2/2), 0.8 beats three: 5 of 6
    assert roc_auc(scores, positive) == pytest.approx(100 * 5 / 6)
    assert roc_auc([1.0] * 4, [True, False, True, False]) == 50.0
    assert roc_auc([3, 2, 1], [False, True, True]) == 0.0
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (60,), generator=generator).tolist()
    positive = torch.randint(0, 2, (60,), generator=generator).bool().tolist()
    pairs = [(p, n) for p, yes in zip(scores, positive, strict=True) if yes
             for n, other in zip(scores, positive, strict=True) if not other]  # fmt: skip
    won = sum((p > n) + (p == n) / 2 for p, n in pairs)
    assert roc_auc(scores, positive) == pytest.approx(100 * won / len(pairs))


def test_the_area_needs_both_kinds() -> None:
    with pytest.raises(ValueError, match="there are 2 positive and 0 negative"):
        roc_auc([1, 2], [True, True])
    with pytest.raises(ValueError, match="score 1 is not a number"):
        roc_auc([1, float("nan")], [True, False])


def test_reciprocal_ranks_by_hand() -> None:
    losses = [3.0, 1.0, 2.0, 2.0]
    assert [rank_of(losses, right) for right in range(4)] == [4, 1, 2, 3]
    assert mean_reciprocal_rank([1, 2, 4]) == pytest.approx(100 * (1 + 1 / 2 + 1 / 4) / 3)
    assert rank_of([-float("inf"), float("inf"), 0.0], 1) == 3
    with pytest.raises(ValueError, match="not all numbers"):
        rank_of([1.0, float("nan")], 0)


def test_ivqa_counts_two_annotators_as_enough() -> None:
    answers = ["drill", "Power drill", "a drill", "hammer", "drill"]
    for said, accuracy in (("saw", 0.0), ("hammer", 0.5), ("The power drill.", 0.5), ("drill", 1.0)):
        assert vqa_accuracy(said, answers, variant="ivqa") == accuracy
    for said, answer in (("two", "two"), ("t-shirt", "t-shirt"), ("t shirt", "T-shirt")):
        assert vqa_accuracy(said, [answer], variant="normalised") == 1.0
    assert vqa_accuracy("Yes.", ["no", "the yes"], variant="normalised") == 1.0
    assert vqa_accuracy("", ["no"], variant="normalised") == 0.0


# Task


CHOICES = [
    {"candidates": ["cat", "dog"], "label": 0, "question_type": "what"},
    {"candidates": ["red", "blue", "green"], "label": 2, "question_type": "what"},
    {"candidates": ["a", "b"], "label": 1, "question_type": "which", "group": "letters"},
    {"candidates": ["x"], "label": None},
]


def test_the_likeliest_candidate_answers(tmp_path: Path) -> None:
    model = Fake(losses=[[1.0, 2.0], [2.0, 3.0, 2.5], [5.0, 0.5], [1.0]])
    metrics = run(InstructTask(), model, CHOICES, tmp_path)
    assert metrics == {
        "accuracy": pytest.approx(200 / 3),
        "agg_metrics": pytest.approx(200 / 3),
        "per_group": {"letters": 100.0},
        "per_question_type": {"what": 50.0, "which": 100.0},
    }
    written = json.loads((tmp_path / "val_predictions.json").read_text())
    assert [entry["prediction"] for entry in written] == ["cat", "red", "b", "x"]
    assert written[0] == {"instance_id": "0", "question_id": "q0", "prediction": "cat", "losses": [1.0, 2.0]}
    assert len(written[3]["losses"]) == 1, "no padding"


def test_reciprocal_rank_of_the_right_candidate(tmp_path: Path) -> None:
    model = Fake(losses=[[1.0, 2.0], [2.0, 3.0, 2.5], [0.5, 5.0], [1.0]])
    metrics = run(InstructTask(metric="mrr"), model, CHOICES, tmp_path)
    assert metrics["mrr"] == metrics["agg_metrics"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 2) / 3)
    assert metrics["accuracy"] == pytest.approx(100 / 3)
    assert metrics["per_question_type"] == {"what": 75.0, "which": 50.0}
    with pytest.raises(ValueError, match=r"'auc' is between two classes, but \['red', 'blue', 'green'\] are not two"):
        run(InstructTask(metric="auc"), model, CHOICES, tmp_path)


def test_visual_dialogs_file_and_metrics(tmp_path: Path) -> None:
    options = ["yes", "no", "yes"]
    records = [
        {"question_id": "12_1", "candidates": options, "label": 2, "relevance": [0.0, 1.0, 0.5]},
        {"question_id": "12_2", "candidates": options, "label": 0},
    ]
    task = InstructTask(metric="mrr", server_file="visdial")
    found = run(task, Fake(losses=[[1.0, 2.0, 1.0], [0.1, 2.0, 3.0]]), records, tmp_path)
    assert (found["mrr"], found["r1"], found["mean_rank"]) == (75.0, 50.0, 1.5)  # equal texts are two options
    gain = 0.5 / math.log2(3)  # two options are relevant; ranked first is one that is not, then the half
    assert found["ndcg"] == pytest.approx(100 * gain / (1 + 0.5 / math.log2(3)))
    assert json.loads((tmp_path / "val_visdial_submission.json").read_text()) == [
        {"image_id": 12, "round_id": 1, "ranks": [1, 3, 2]},
        {"image_id": 12, "round_id": 2, "ranks": [1, 2, 3]},
    ]


def test_aokvqas_multiple_choice_file(tmp_path: Path) -> None:
    records = [{"candidates": ["cat", "dog"]}, {"candidates": ["red", "blue"]}]
    found = run(InstructTask(server_file="aokvqa"), Fake(losses=[[2.0, 1.0], [1.0, 2.0]]), records, tmp_path)
    assert found["agg_metrics"] is None
    written = json.loads((tmp_path / "val_aokvqa_submission.json").read_text())
    assert written == {"q0": {"multiple_choice": "dog"}, "q1": {"multiple_choice": "red"}}


def test_a_server_file_needs_candidates_and_its_own_ids(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run.server_file 'visdial' ranks candidates"):
        run(InstructTask(server_file="visdial"), Fake(texts=["a"]), [{"answers": ["a"]}], tmp_path)
    with pytest.raises(ValueError, match="question_id 'q0' is not <image id>_<round>"):
        run(InstructTask(server_file="visdial"), Fake(losses=[[1.0]]), [{"candidates": ["a"]}], tmp_path)


def test_several_words_speak_for_a_class(tmp_path: Path) -> None:
    words = {"candidates": ["no", "false", "yes", "true"], "classes": (0, 0, 1, 1)}
    records = [{**words, "label": label} for label in (2, 2, 0, 0)]
    losses = [[4.0, 9.0, 9.0, 1.0], [2.0, 3.0, 2.0, 9.0], [3.0, 1.0, 2.0, 2.5], [7.0, 7.0, 7.0, 7.0]]
    # no less yes, by the likeliest words: 3, 0, -1, 0; right: yes, yes, no, no
    metrics = run(InstructTask(metric="auc"), Fake(losses=losses), records, tmp_path)
    assert metrics["auc_likeliest"] == pytest.approx(100 * (1 + 1 + 0.5 + 1) / 4)
    assert metrics["accuracy"] == 75.0, "of equal losses the first class is taken"
    # by both words: 2.99, log((e^-2 + e^-9) / (e^-2 + e^-3)) = -0.31, log((e^-2 + e^-2.5) / (e^-3 + e^-1)) = -0.65, 0
    assert metrics["auc"] == metrics["agg_metrics"] == pytest.approx(100 * (1 + 1 + 0 + 1) / 4)
    plain = [{"candidates": ["no", "yes"], "label": label} for label in (1, 0)]
    assert run(InstructTask(metric="auc"), Fake(losses=[[2.0, 1.0], [2.0, 1.5]]), plain, tmp_path)["auc"] == 100.0


def test_losses_that_are_no_numbers_name_the_question(tmp_path: Path) -> None:
    model = Fake(losses=[[1.0, 2.0], [2.0, float("nan"), 2.5]])
    with pytest.raises(ValueError, match="question 'q1' are not numbers"):
        run(InstructTask(), model, CHOICES[:2], tmp_path)


def test_texts_are_scored_by_any_right_answer(tmp_path: Path) -> None:
    records = [{"answers": ["The cat", "kitten"]}, {"answers": ["dog"], "answer_type": "other"}, {"answers": []}]
    model = Fake(texts=["Cat.", "a cat", "?"])
    metrics = run(InstructTask(max_len=7, repetition_penalty=1.2), model, records, tmp_path)
    assert metrics == {"accuracy": 50.0, "agg_metrics": 50.0, "per_answer_type": {"other": 0.0}}
    assert model.given == {"num_beams": 5, "max_len": 7, "min_len": 1, "repetition_penalty": 1.2}


def test_without_truth_only_the_file_is_written(tmp_path: Path) -> None:
    for records in ([{}], [{"candidates": ["a", "b"], "label": None}]):
        metrics = run(InstructTask(), Fake(losses=[[2.0, 1.0]], texts=["c"]), records, tmp_path)
        assert metrics["agg_metrics"] is None
        assert "no answers" in metrics["note"]
        written = json.loads((tmp_path / "val_predictions.json").read_text())
        assert written[0]["prediction"] == ("b" if "candidates" in records[0] else "c")


def test_blank_images_and_videos_have_a_file_of_their_own(tmp_path: Path) -> None:
    for size in ((3, 2, 2), (3, 4, 2, 2)):
        records = [{"candidates": ["a", "b"], "label": 1}] * 2
        model = Fake(losses=[[2.0, 1.0]] * 2)
        assert run(InstructTask(), model, records, tmp_path, size=size)["accuracy"] == 100.0
        assert run(InstructTask(blank_images=True), model, records, tmp_path, size=size)["accuracy"] == 0.0
    assert json.loads((tmp_path / "val_predictions_blank.json").read_text())[0]["losses"] == [1.0, 1.0]
    assert json.loads((tmp_path / "val_predictions.json").read_text())[0]["losses"] == [2.0, 1.0]


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(ValueError, match=r"run\.metric: 'ndcg' .*accuracy, auc, mrr"):
        InstructTask(metric="ndcg")


# VQA's tasks on these samples


class Answerer(nn.Module):
    """Answers "dog" to complete instructions, which it must get as they are."""

    def predict_answers(self, samples: dict[str, Any], **settings: Any) -> list[str]:
        assert samples["text_input"][0] == "what {}?"
        return ["dog"] * len(samples["text_input"])


def test_vqa_takes_complete_instructions_and_videos(tmp_path: Path) -> None:
    records = [{"answers": ["dog", "cat", "a dog", "x", "y"]}, {"answers": ["dog", "z"]}]
    for blank in (False, True):
        task = VQATask(inference_method="generate", accuracy="ivqa", blank_images=blank)
        assert run(task, Answerer(), records, tmp_path, size=(3, 4, 2, 2))["overall"] == 75.0


def test_vizwiz_writes_its_servers_file(tmp_path: Path) -> None:
    records = [{"question_id": "VizWiz_test_0.jpg"}, {"question_id": "VizWiz_test_1.jpg"}]
    metrics = run(VizWizTask(inference_method="generate"), Answerer(), records, tmp_path)
    assert metrics["agg_metrics"] is None
    written = json.loads((tmp_path / "val_vizwiz_submission.json").read_text())
    assert written == [{"image": record["question_id"], "answer": "dog"} for record in records]


# A real model


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["blip2_t5_instruct", "blip2_vicuna_instruct", "blip2_opt"])
def test_a_tiny_model_ranks_and_writes(arch: str, tmp_path: Path, shapes_data: Path) -> None:
    torch.manual_seed(0)
    model = load_model(arch, "tiny").eval()
    ask = {"text_input": "what color is it?"}
    records = [
        {**ask, "candidates": ["red", "blue", "a green one"], "label": 2},
        {**ask, "candidates": ["yes", "no"], "label": 0},
        {**ask, "candidates": ["no", "a large square"], "label": 1},
    ]
    size = (3, 48, 48)
    metrics = run(InstructTask(metric="mrr"), model, records, tmp_path, size=size)
    written = json.loads((tmp_path / "val_predictions.json").read_text())
    for number, (record, entry) in enumerate(zip(records, written, strict=True)):
        alone = {"image": torch.full((1, *size), number + 1.0), "text_input": [ask["text_input"]]}
        order = model.predict_class(alone, record["candidates"])[0].tolist()
        assert entry["prediction"] == record["candidates"][order[0]]
        assert sorted(range(len(order)), key=entry["losses"].__getitem__) == order
    ranks = [1 + sorted(e["losses"]).index(e["losses"][r["label"]]) for r, e in zip(records, written, strict=True)]
    assert metrics["mrr"] == pytest.approx(100 * sum(1 / rank for rank in ranks) / 3)
    run(InstructTask(max_len=4, num_beams=2), model, [{**ask, "answers": ["red"]}], tmp_path, size=size)
    (entry,) = json.loads((tmp_path / "val_predictions.json").read_text())
    asked = {"image": torch.ones(1, *size), "prompt": ask["text_input"]}
    assert [entry["prediction"]] == model.generate(asked, num_beams=2, max_length=4)
