"""Tasks with toy models and datasets: what they ask of a model, what they write, what all ranks get."""

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import warm
from ports import free_port
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lavis_lite.common import dist
from lavis_lite.common.registry import registry
from lavis_lite.tasks.base import BaseTask
from lavis_lite.tasks.captioning import CaptionTask
from lavis_lite.tasks.image_text_pretrain import ImageTextPretrainTask
from lavis_lite.tasks.metrics import caption_java
from lavis_lite.tasks.metrics.vqa_accuracy import Variant
from lavis_lite.tasks.multimodal_classification import MultimodalClassificationTask
from lavis_lite.tasks.results import gather, per_sample, write_json
from lavis_lite.tasks.retrieval import RetrievalTask
from lavis_lite.tasks.vqa import AOKVQATask, GQATask, VQATask

WORDS = [
    "ein großer Hund läuft",
    "a red ball lies there",
    "two cats sit here",
    "日本語 の 写真 です",
    "a blue box stands here",
]


class Items(Dataset):
    """A dataset of given records; every image is its index as a constant picture."""

    answer_list = ("cat", "dog", "yes")

    def __init__(self, records: list[dict[str, Any]], **attributes: Any) -> None:
        self.annotation = [{**record, "instance_id": str(i)} for i, record in enumerate(records)]
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.annotation)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.annotation[index], "image": torch.full((3, 2, 2), float(index + 1))}

    @staticmethod
    def collater(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: [sample.get(key) for sample in samples] for key in samples[0]}
        return {**batch, "image": torch.stack(batch["image"])}

    def references(self) -> dict[Any, list[str]]:
        return {record["image_id"]: record["caption"] for record in self.annotation if record.get("caption")}


class Toy(nn.Module):
    """Reads a sample's index off its image; notes the keyword arguments it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.given: dict[str, Any] = {}

    def index(self, samples: dict[str, Any]) -> list[int]:
        assert not self.training
        assert not torch.is_grad_enabled()
        return [int(value) - 1 for value in samples["image"].amax((1, 2, 3))]

    def generate(self, samples: dict[str, Any], num_captions: int = 1, **settings: Any) -> list[str]:
        self.given = {**settings, "prompt": samples.get("prompt")}
        texts = [WORDS[i] for i in self.index(samples)]
        return [text if n == 0 else f"{text} {n}" for text in texts for n in range(num_captions)]

    def predict_answers(self, samples: dict[str, Any], **settings: Any) -> list[str]:
        self.given = {"answer_list": None, **settings, "questions": samples["text_input"]}
        return ["yes" if i < 0 else ["dog", "2", "yes"][i % 3] for i in self.index(samples)]

    def predict(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        index = torch.tensor(self.index(samples))
        return {"predictions": nn.functional.one_hot(index % 2, 2).float(), "targets": torch.tensor(samples["label"])}

    def forward(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        if getattr(self, "negative_all_rank", False) and not self.training:
            dist.gather_objects([0])  # hangs where another rank has no batch left
        noise = torch.rand(())
        loss = samples["image"].mean()
        return {"loss": loss + noise, "loss_itc": loss, "loss_lm": noise, "logits": samples["image"]}


def loader(dataset: Items, batch_size: int = 2, sampler: Any = None) -> DataLoader:
    return DataLoader(dataset, batch_size=batch_size, collate_fn=dataset.collater, sampler=sampler)


def captions(count: int = 5, **attributes: Any) -> Items:
    ids = [391895, "coco_7", "ü", 4, 5]
    records = [{"image_id": ids[i], "caption": [WORDS[i], WORDS[(i + 1) % 5]]} for i in range(count)]
    return Items(records, **attributes)


def questions() -> Items:
    return Items(
        [
            {
                "question_id": 7,
                "text_input": "what?",
                "answers": ["dog"] * 10,
                "answer_type": "other",
                "question_type": "what",
            },
            {"question_id": 3, "text_input": "how many?", "answers": ["two"] * 2 + ["3"] * 8, "answer_type": "number"},
            {"question_id": "n", "text_input": "is it?", "answers": [{"answer": "no"}] * 10, "answer_type": "yes/no"},
        ]
    )


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Java's metrics are tested in test_metrics.py; here they would only take time."""
    monkeypatch.setattr(caption_java, "find_java", lambda: None)


def test_tasks_are_registered_and_take_their_fields() -> None:
    names = ("image_text_pretrain", "captioning", "vqa", "retrieval", "multimodal_classification")
    assert set(names) <= set(registry.list_tasks())
    for name in names:
        task = registry.get_task_class(name)()
        assert isinstance(task, BaseTask)
        assert registry.get_task_class(name)(**dataclasses.asdict(task)) == task


def test_captioning_scores_with_its_own_references(tmp_path: Path) -> None:
    model = Toy().train()
    dataset = captions(extra_metrics=lambda captions: {"true_rate": 100.0 * len(captions)})
    task = CaptionTask(metrics=["bleu", "meteor", "cider"], max_len=12)
    metrics = task.evaluate(model, loader(dataset), split="val", result_dir=tmp_path)
    assert metrics["Bleu_4"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["agg_metrics"] == pytest.approx(metrics["CIDEr"] + metrics["Bleu_4"])
    assert metrics["true_rate"] == 500.0
    assert list(metrics["left_out"]) == ["METEOR"]
    decoding = {"num_beams": 3, "max_len": 12, "min_len": 5, "repetition_penalty": 1.0, "length_penalty": 1.0}
    sampling = {"use_nucleus_sampling": False, "top_p": 0.9, "temperature": 1.0}
    assert model.given == {**decoding, **sampling, "prompt": None}
    assert model.training, "evaluation leaves the model in the mode it found"
    text = (tmp_path / "val_captions.json").read_text(encoding="utf-8")
    assert json.loads(text)[:3] == [
        {"image_id": 391895, "caption": WORDS[0]},
        {"image_id": "coco_7", "caption": WORDS[1]},
        {"image_id": "ü", "caption": WORDS[2]},
    ]
    assert WORDS[3] in text, "non-ASCII text is written as it is"


def test_shuffled_images_shift_by_one() -> None:
    class ReadsPixels:
        def generate(self, samples: dict[str, Any], **settings: Any) -> list[str]:
            return [f"{float(picture):.0f}" for picture in samples["image"]]

    samples = {"image": torch.tensor([1.0, 2.0, 3.0]), "image_id": ["a", "b", "c"], "instance_id": ["0", "1", "2"]}
    for shuffled, said in ((False, ["1", "2", "3"]), (True, ["3", "1", "2"])):
        task = CaptionTask(shuffle_images=shuffled)
        assert [result["caption"] for result in task.valid_step(ReadsPixels(), samples)] == said
    alone = {"image": torch.tensor([4.0]), "image_id": ["d"], "instance_id": ["3"]}
    assert task.valid_step(ReadsPixels(), alone)[0]["caption"] == "3"
    with pytest.raises(ValueError, match=r"run\.batch_size_eval above 1"):
        CaptionTask(shuffle_images=True).valid_step(ReadsPixels(), alone)


def test_captioning_with_several_captions_prompt_and_one_sample(tmp_path: Path) -> None:
    model = Toy()
    task = CaptionTask(num_captions=2, prompt="a picture of ", metrics=["rouge"])
    metrics = task.evaluate(model, loader(captions(1), batch_size=1), split="test", result_dir=tmp_path)
    assert metrics["ROUGE_L"] == pytest.approx(1.0)
    assert model.given["prompt"] == "a picture of "
    entry = {"image_id": 391895, "caption": WORDS[0], "captions": [WORDS[0], f"{WORDS[0]} 1"]}
    assert json.loads((tmp_path / "test_captions.json").read_text()) == [entry]


def test_images_without_references_are_captioned_and_not_scored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = captions()
    whole = dataset.references
    dataset.references = lambda: {key: texts for key, texts in whole().items() if key != "ü"}
    metrics = CaptionTask(metrics=["bleu"]).evaluate(Toy(), loader(dataset), split="val", result_dir=tmp_path)
    assert metrics["Bleu_1"] == pytest.approx(1, abs=1e-3)
    assert "scoring 4 images; 4 have references, 5 captions" in caplog.text
    assert len(json.loads((tmp_path / "val_captions.json").read_text(encoding="utf-8"))) == len(dataset)


def test_captioning_without_references_or_with_a_file(tmp_path: Path) -> None:
    dataset = Items([{"image_id": 1}, {"image_id": 2}])
    metrics = CaptionTask().evaluate(Toy(), loader(dataset), split="test", result_dir=tmp_path)
    assert metrics["agg_metrics"] is None
    assert "no reference captions" in metrics["note"]
    path = tmp_path / "gold.json"
    annotations = [{"image_id": i, "caption": WORDS[(i - 1) % 5], "id": 0} for i in (1, 2, 99)]
    path.write_text(json.dumps({"annotations": annotations}))
    task = CaptionTask(annotation_file=str(path), metrics=["bleu"])
    assert task.evaluate(Toy(), loader(dataset), split="test", result_dir=tmp_path)["Bleu_1"] == pytest.approx(
        1, abs=1e-3
    )
    images = [{"id": 1, "domain": "in-domain"}, {"id": 2, "domain": "out-domain"}, {"id": 99, "domain": "in-domain"}]
    path.write_text(json.dumps({"annotations": annotations, "images": images}))
    task = CaptionTask(annotation_file=str(path), metrics=["cider"])
    metrics = task.evaluate(Toy(), loader(dataset), split="test", result_dir=tmp_path)
    mean = (metrics["in-domain"]["CIDEr"] + metrics["out-domain"]["CIDEr"]) / 2
    assert metrics["CIDEr"] == pytest.approx(mean, abs=1e-3), "one image of each domain"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"gold\.json is not"):
        task.evaluate(Toy(), loader(dataset), split="test", result_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="annotation_file"):
        CaptionTask(annotation_file="/nowhere.json").evaluate(Toy(), loader(dataset), split="test", result_dir=tmp_path)


def test_vqa_scores_by_type_and_writes_the_servers_format(tmp_path: Path) -> None:
    model = Toy()
    metrics = VQATask().evaluate(model, loader(questions()), split="val", result_dir=tmp_path)
    assert metrics["overall"] == metrics["agg_metrics"] == pytest.approx(100 * (1 + 0.6) / 3, abs=0.005)
    assert metrics["per_answer_type"] == {"number": 60.0, "other": 100.0, "yes/no": 0.0}
    assert metrics["per_question_type"] == {"what": 100.0}
    assert list(model.given["answer_list"]) == ["cat", "dog", "yes"]
    answers = [
        {"question_id": 7, "answer": "dog"},
        {"question_id": 3, "answer": "2"},
        {"question_id": "n", "answer": "yes"},
    ]
    assert json.loads((tmp_path / "val_vqa.json").read_text()) == answers
    assert "official_per_answer_type" not in metrics
    old = VQATask(accuracy="lavis").evaluate(model, loader(questions()), split="val", result_dir=tmp_path)
    assert metrics["lavis_per_answer_type"] == old["per_answer_type"]
    assert old["per_answer_type"]["number"] == 0.0, "the old script leaves 'two' as it is"


def test_vqa_with_blank_images_and_prompt(tmp_path: Path) -> None:
    model = Toy()
    task = VQATask(blank_images=True, prompt="Question: {} Answer:", inference_method="generate")
    metrics = task.evaluate(model, loader(questions()), split="val", result_dir=tmp_path)
    assert metrics["overall"] == 0.0
    assert model.given["questions"] == ["Question: is it? Answer:"]
    assert model.given["answer_list"] is None
    assert (tmp_path / "val_vqa_blank.json").exists()
    assert not (tmp_path / "val_vqa.json").exists()


def test_vqa_trains_inside_the_prompt_it_asks_with() -> None:
    """BLIP-2's models learn `text_output` after the prompt; without a prompt the batch goes through as it is."""
    seen: list[dict[str, Any]] = []
    model = nn.Identity()
    model.forward = lambda samples: seen.append(samples) or {"loss": torch.zeros(())}
    batch = {"text_input": ["what?", "why {}?"], "text_output": ["dog", "cat"]}
    VQATask(prompt="Question: {} Answer:").train_step(model, batch)
    VQATask().train_step(model, batch)
    questions = ["Question: what? Answer:", "Question: why {}? Answer:"]
    assert seen[0] == {**batch, "text_input": questions, "prompt": ["{}"] * 2}  # complete: no other prompt around it
    assert seen[1] is batch
    with pytest.raises(ValueError, match="several"):
        VQATask(prompt="OCR tokens: {}. Question: {}").train_step(model, batch)


def test_vqa_passes_its_settings_but_those_left_to_the_model(tmp_path: Path) -> None:
    model = Toy()
    settings = {"num_beams": 4, "max_len": 7, "min_len": 2, "inference_method": "generate"}
    task = VQATask(**settings, num_ans_candidates=9, length_penalty=-0.5, prompt="Q: {} A:")
    task.evaluate(model, loader(questions()), split="val", result_dir=tmp_path)
    expected = {**settings, "length_penalty": -0.5, "answer_list": None}
    assert model.given == {**expected, "questions": ["Q: is it? A:"]}
    VQATask(num_ans_candidates=9).evaluate(model, loader(questions()), split="val", result_dir=tmp_path)
    assert "length_penalty" not in model.given
    assert model.given["answer_list"] == ["cat", "dog", "yes"]
    assert model.given["num_ans_candidates"] == 9
    assert model.given["questions"] == ["is it?"]


def test_the_model_fills_a_prompt_with_two_placeholders(tmp_path: Path) -> None:
    model, prompt = Toy(), "OCR tokens: {}. Question: {} Answer:"
    task = VQATask(inference_method="generate", prompt=prompt)
    task.evaluate(model, loader(questions()), split="val", result_dir=tmp_path)
    assert model.given["prompt"] == prompt
    assert model.given["questions"] == ["is it?"]


def test_vqa_without_answers_or_answer_list(tmp_path: Path) -> None:
    unknown = Items([{"question_id": 1, "text_input": "why?"}])
    metrics = VQATask().evaluate(Toy(), loader(unknown), split="test", result_dir=tmp_path)
    assert metrics == {"agg_metrics": None, "note": "the test split has no answers: only the result file was written"}
    assert json.loads((tmp_path / "test_vqa.json").read_text()) == [{"question_id": 1, "answer": "dog"}]
    unknown.answer_list = None
    with pytest.raises(ValueError, match="answer list"):
        VQATask().evaluate(Toy(), loader(unknown), split="test", result_dir=tmp_path)


def test_vqa_warns_of_questions_with_too_few_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The official rules compare people with one another: a single answer makes every prediction wrong."""
    for answers, accuracy, overall, warns in (
        (["dog"], "official", 0.0, True),
        (["dog"] * 3, "official", 66.67, True),
        (["dog"] * 4, "official", 100.0, False),
        (["dog"], "normalised", 100.0, False),
    ):
        caplog.clear()
        data = loader(Items([{"question_id": 1, "text_input": "what?", "answers": answers}]))
        task = VQATask(accuracy=accuracy, inference_method="generate")
        assert task.evaluate(Toy(), data, split="val", result_dir=tmp_path)["agg_metrics"] == overall
        assert ("1 questions have fewer than 4 answers" in caplog.text) == warns
        if warns:
            assert caplog.text.rstrip().rsplit("choose ", 1)[-1] in get_args(Variant)


def test_gqa_and_aok_vqa_score_in_their_own_way(tmp_path: Path) -> None:
    """The toy answers "dog": right for GQA if that is the answer, cleaned as it; for A-OKVQA two of three matches."""
    for answers, accuracy in ((["dog"], 100.0), (["the dog."], 100.0), (["hot-dog"], 0.0)):
        data = loader(Items([{"question_id": 1, "text_input": "what?", "answers": answers}]))
        assert GQATask().evaluate(Toy(), data, split="val", result_dir=tmp_path)["agg_metrics"] == accuracy
        assert json.loads((tmp_path / "val_gqa_submission.json").read_text())[0].keys() == {"questionId", "prediction"}
    direct = loader(Items([{"question_id": "ä1", "text_input": "what?", "answers": ["dog", "cat", "dog"]}]))
    metrics = AOKVQATask().evaluate(Toy(), direct, split="val", result_dir=tmp_path)
    assert metrics["agg_metrics"] == pytest.approx(66.67)
    leaderboard = json.loads((tmp_path / "val_aok_vqa_leaderboard.json").read_text())
    assert leaderboard == {"ä1": {"direct_answer": "dog"}}


class Gallery(Toy):
    k_test = 0

    def compute_sim_matrix(self, data: DataLoader, k_test: int) -> tuple[np.ndarray, np.ndarray]:
        assert not self.training
        self.k_test = k_test
        score_i2t = np.array([[3, 2, 1], [1, 0, -100]], dtype=np.float32)
        return score_i2t, np.array([[2, 1], [2, 1], [0, 1]], dtype=np.float32)


def test_retrieval_writes_the_best(tmp_path: Path) -> None:
    """Two images do not keep an image from being compared with 128 texts: k_test counts in each direction."""
    records = [{"image": "a.jpg"}, {"image": "ß.jpg"}]
    dataset = Items(records, text=["eins", "zwei", "drei"], txt2img=[0, 0, 1], img2txt=[[0, 1], [2]])
    model = Gallery().train()
    metrics = RetrievalTask(k_test=128).evaluate(model, loader(dataset), split="test", result_dir=tmp_path)
    assert model.k_test == 128
    assert model.training
    assert (metrics["txt_r1"], metrics["img_r1"], metrics["txt_r5"]) == (50.0, 100.0, 100.0)
    written = json.loads((tmp_path / "test_retrieval.json").read_text())
    assert written["top_texts_of_image"] == [[0, 1, 2], [0, 1, 2]]
    assert written["top_images_of_text"] == [[0, 1], [0, 1], [1, 0]]
    assert written["images"] == ["a.jpg", "ß.jpg"]
    assert written["metrics"] == metrics
    dataset.img2txt = [[0, 1, 2], []]
    with pytest.raises(ValueError, match=r"1 images of the test split have no texts, e\.g\. ß\.jpg: leave them out"):
        RetrievalTask().evaluate(model, loader(dataset), split="test", result_dir=tmp_path)
    with pytest.raises(ValueError, match="text, txt2img, img2txt"):
        RetrievalTask().evaluate(model, loader(captions()), split="test", result_dir=tmp_path)


class Ranked(Toy):
    """Ranks eleven images and their texts by place, each its own first; only the `k_test` best are ranked."""

    def compute_sim_matrix(self, data: DataLoader, k_test: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.full((11, 11), -100, dtype=np.float32)
        for row in range(11):
            for place in range(k_test or 11):
                scores[row, (row + place) % 11] = -place
        return scores, scores


@pytest.mark.parametrize(("k_test", "known"), [(0, (1, 5, 10)), (1, (1,)), (5, (1, 5)), (10, (1, 5, 10))])
def test_recall_beyond_the_ranked_candidates_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, k_test: int, known: tuple[int, ...]
) -> None:
    """The means are of the recalls that are there: each query's right answer comes third, so R@1 is 0, the rest 100."""
    texts = [str(i) for i in range(11)]
    answers = [[(i + 2) % 11] for i in range(11)]
    images = [(i - 2) % 11 for i in range(11)]
    dataset = Items([{"image": f"{i}.jpg"} for i in range(11)], text=texts, txt2img=images, img2txt=answers)
    metrics = RetrievalTask(k_test=k_test).evaluate(Ranked(), loader(dataset), split="test", result_dir=tmp_path)
    mean = sum(100.0 for k in known if k > 1) / len(known)
    assert {f"txt_r{k}" for k in (1, 5, 10)} & metrics.keys() == {f"txt_r{k}" for k in known}
    assert {f"img_r{k}" for k in (1, 5, 10)} & metrics.keys() == {f"img_r{k}" for k in known}
    assert metrics["txt_r_mean"] == metrics["agg_metrics"] == pytest.approx(mean)
    assert ("txt_r10, img_r" in caplog.text) == (10 not in known)
    assert (f"run.k_test={k_test} ranks {k_test} candidates" in caplog.text) == (len(known) < 3)
    written = json.loads((tmp_path / "test_retrieval.json").read_text())
    assert {len(best) for best in written["top_texts_of_image"]} == {min(k_test or 10, 10)}


def test_few_candidates_are_all_ranked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"image": "a.jpg"}, {"image": "b.jpg"}]
    dataset = Items(records, text=["eins", "zwei", "drei"], txt2img=[0, 0, 1], img2txt=[[0, 1], [2]])
    metrics = RetrievalTask(k_test=3).evaluate(Gallery(), loader(dataset), split="test", result_dir=tmp_path)
    assert metrics["txt_r10"] == metrics["img_r10"] == 100.0
    assert "left out" not in caplog.text


def test_classification_accuracy(tmp_path: Path) -> None:
    dataset = Items([{"label": 0}, {"label": 1}, {"label": 1}])
    metrics = MultimodalClassificationTask().evaluate(Toy(), loader(dataset), split="dev", result_dir=tmp_path)
    assert metrics["acc"] == metrics["agg_metrics"] == pytest.approx(200 / 3)
    assert json.loads((tmp_path / "dev_predictions.json").read_text())[2] == {
        "instance_id": "2",
        "prediction": 0,
        "target": 1,
    }


def test_pretraining_averages_losses_by_sample_and_keeps_the_generator(tmp_path: Path) -> None:
    dataset = Items([{"text_input": text} for text in WORDS[:3]])
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    task = ImageTextPretrainTask()
    first = task.evaluate(Toy(), loader(dataset), split="val", result_dir=tmp_path)
    assert torch.equal(torch.rand(1), expected_next)
    assert first["loss_itc"] == pytest.approx((1 + 2 + 3) / 3)
    assert first["loss"] == pytest.approx(first["loss_itc"] + first["loss_lm"])
    assert first["agg_metrics"] == -first["loss"]
    assert task.evaluate(Toy(), loader(dataset), split="val", result_dir=tmp_path) == first
    with pytest.raises(ValueError, match="text_input"):
        task.evaluate(Toy(), loader(captions()), split="val", result_dir=tmp_path)
    model = Toy()
    assert task.train_step(model, next(iter(loader(dataset))))["loss"].ndim == 0


def test_gathering_keeps_each_sample_once_in_order(caplog: pytest.LogCaptureFixture) -> None:
    dataset = captions(4)
    results = [{"instance_id": i, "n": n} for n, i in enumerate(["2", "0", "2", "1"])]
    with caplog.at_level(logging.WARNING):
        assert [r["instance_id"] for r in gather(results, dataset)] == ["0", "1", "2"]
    assert "1 of 4 samples" in caplog.text
    assert gather(results, dataset)[2]["n"] == 0
    for record, own in zip(dataset.annotation, "wxyz", strict=True):  # a field of the user's file
        record["instance_id"] = own
    assert [r["instance_id"] for r in gather(results, dataset)] == ["0", "1", "2"]
    named = [{"instance_id": i} for i in "zywx"]
    assert [r["instance_id"] for r in gather(named, dataset)] == list("wxyz")
    with pytest.raises(KeyError, match="instance_id"):
        per_sample({"image": torch.zeros(1)}, answer=["a"])


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    empty = Items([])
    with pytest.raises(ValueError, match="val split is empty"):
        VQATask().evaluate(Toy(), loader(empty), split="val", result_dir=tmp_path)


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = write_json(tmp_path / "new" / "a.json", {"ä": [1, None]})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, None]}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_mistaken_settings_are_named() -> None:
    for cls, arguments, words in (
        (CaptionTask, {"metrics": ["cidr"]}, "cidr.*choose from"),
        (CaptionTask, {"num_captions": 9}, "num_beams"),
        (VQATask, {"prompt": "Answer:"}, "prompt"),
        (VQATask, {"accuracy": "evalai"}, "accuracy"),
        (VQATask, {"inference_method": "beam"}, "rank"),
        (RetrievalTask, {"k_test": -1}, "k_test"),
    ):
        with pytest.raises(ValueError, match=words):
            cls(**arguments)


class FakeBuilder:
    """A builder with the splits it is told to have."""

    def __init__(self, *, have: list[str]) -> None:
        self.have = have

    def splits(self) -> list[str]:
        return self.have

    def build(self, splits: list[str]) -> dict[str, str]:
        return {split: f"{split} data" for split in splits}


def config(**run: Any) -> SimpleNamespace:
    splits = {"train_splits": ["train"], "valid_splits": ["val"], "test_splits": ["test"], "evaluate": False, **run}
    datasets = {"big": {"type": "default", "have": ["train", "val", "test"]}, "extra": {"have": ["train"]}}
    model = {"arch": "toy", "width": 3}
    return SimpleNamespace(run=SimpleNamespace(limit=None, **splits), datasets=datasets, model=model, prompts={})


def test_building_datasets_takes_what_each_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "get_builder_class", lambda name: FakeBuilder)
    task = BaseTask()
    assert task.build_datasets(config()) == {
        "big": {"train": "train data", "val": "val data", "test": "test data"},
        "extra": {"train": "train data"},
    }
    assert task.build_datasets(config(evaluate=True)) == {"big": {"val": "val data", "test": "test data"}}
    assert task.build_datasets(config(evaluate=True, valid_splits=[])) == {"big": {"test": "test data"}}
    assert task.build_datasets(config(evaluate=True, test_splits=[])) == {"big": {"val": "val data"}}
    with pytest.raises(ValueError, match=r"'tset'.*Did you mean 'test'.*'extra': \['train'\]"):
        task.build_datasets(config(test_splits=["tset"]))
    with pytest.raises(ValueError, match=r"run\.valid_splits and run\.test_splits are empty; name a split"):
        task.build_datasets(config(evaluate=True, valid_splits=[], test_splits=[]))


def test_building_the_model_hands_over_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = SimpleNamespace(from_config=lambda cfg, device: ("built", cfg["width"], device.type))
    monkeypatch.setattr(registry, "get_model_class", lambda arch: {"toy": maker}[arch])
    assert BaseTask().build_model(config(device="cpu")) == ("built", 3, "cpu")


def two_ranks(rank: int, port: int, folder: str) -> None:
    store = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    caption_java.find_java = lambda: None
    report: dict[str, Any] = {"world": dist.world_size()}
    for count in (1, 3, 5):
        dataset = captions(count)
        sampler = torch.utils.data.DistributedSampler(dataset, shuffle=False)  # pads to equal shares
        task = CaptionTask(metrics=["bleu"])
        where = Path(folder) / str(count)
        report[str(count)] = task.evaluate(Toy(), loader(dataset, sampler=sampler), split="val", result_dir=where)
    pairs = Items([{"text_input": text} for text in WORDS[:3]])
    model = Toy()
    model.negative_all_rank = True
    uneven = loader(pairs, 1, sampler=range(rank, len(pairs), 2))
    losses = ImageTextPretrainTask().evaluate(model, uneven, split="val", result_dir=Path(folder))
    report["loss_itc"] = losses["loss_itc"] if model.negative_all_rank else None
    alone = loader(captions(1), sampler=range(rank, 1, 2))  # nothing for rank 1
    report["alone"] = task.evaluate(Toy(), alone, split="val", result_dir=where / "alone")
    try:
        dist.on_main(lambda: 1 / 0)
    except (ZeroDivisionError, RuntimeError) as error:
        report["error"] = f"{type(error).__name__}: {error}"
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    warm.spawn(two_ranks, free_port(), str(tmp_path), world=2)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("error") == "ZeroDivisionError: division by zero"
    assert second.pop("error") == "RankZeroFailed: rank 0 failed: ZeroDivisionError: division by zero"
    assert first == second
    assert first["world"] == 2
    assert first["loss_itc"] == pytest.approx((1 + 2 + 3) / 3)
    assert first["alone"] == first["1"]
    for count in (1, 3, 5):
        alone = CaptionTask(metrics=["bleu"])
        expected = alone.evaluate(Toy(), loader(captions(count)), split="val", result_dir=tmp_path / "alone")
        assert first[str(count)] == expected
        together = (tmp_path / str(count) / "val_captions.json").read_text()
        assert together == (tmp_path / "alone" / "val_captions.json").read_text()
