"""InstructBLIP's held-in and finetuning datasets, on files written by hand in each one's published form."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis_lite.common.config.zoo import packaged_dataset
from lavis_lite.common.registry import registry
from lavis_lite.tasks.captioning import CaptionTask
from lavis_lite.tasks.vqa import AOKVQATask, GQATask, VQATask

COLORS = {"a.jpg": 1, "b.jpg": 2, "c.png": 3}
"""The red of each picture's pixels, by which a test sees which file was opened."""


def seen(image: Image.Image) -> torch.Tensor:
    return torch.tensor([float(image.getpixel((0, 0))[0])])  # type: ignore[index]


def picture(path: Path, red: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (red, 0, 0)).save(path, quality=100, subsampling=0)


class Data:
    """A folder of annotation files and images, and datasets of them by the packaged YAMLs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "images").mkdir()

    def build(self, name: str, split: str, *files: Any, kind: str = "default", **fields: Any) -> Any:
        """The split of `configs/datasets/<name>/<kind>.yaml`, whose files hold this content."""
        own = packaged_dataset(name, kind)
        assert split in own["build_info"]["annotations"]
        paths = []
        for number, content in enumerate(files):
            paths.append(self.root / f"{split}{number}.json")
            paths[-1].write_text(json.dumps(content))
        annotations = {split: {"storage": [str(path) for path in paths]}}
        own["build_info"] = {"annotations": annotations, "images": {"storage": str(self.root / "images")}}
        dataset = registry.get_builder_class(name)(**own | fields).build([split])[split]
        dataset.vis_processor = seen
        return dataset


@pytest.fixture
def data(tmp_path: Path) -> Data:
    found = Data(tmp_path)
    for name, red in COLORS.items():
        picture(tmp_path / "images" / name, red * 60)
    random.seed(0)
    return found


def sample(dataset: Any, index: int = 0) -> dict[str, Any]:
    """A sample without its image, which is checked to be there, and without the "{}" that says that its instruction is
    complete.
    """
    item = dataset[index]
    assert item.pop("image").shape == (1,)
    return {key: value for key, value in item.items() if (key, value) != ("prompt", "{}")}


# Captions


def test_captions_are_samples_in_training_and_references_in_evaluation(data: Data) -> None:
    records = [
        {"image": "a.jpg", "caption": "A woman, cutting a cake. ", "image_id": "coco_5"},
        {"image": "b.jpg", "caption": ["Two dogs", "dogs"], "image_id": "coco_6"},
    ]
    train = data.build("coco_caption_instruct", "train", records, instructions={"output": "caption", "train": ["Say:"]})
    assert [sample(train, i) for i in range(3)] == [
        {"text_input": "Say:", "text_output": "A woman, cutting a cake. ", "instance_id": "0"},
        {"text_input": "Say:", "text_output": "Two dogs", "instance_id": "1"},
        {"text_input": "Say:", "text_output": "dogs", "instance_id": "2"},
    ]
    train = data.build("coco_caption_instruct", "train", records)
    assert len({sample(train)["text_input"] for _ in range(200)}) == 13  # the paper's
    shown = [{"image": "a.jpg", "caption": [f"c{i}" for i in range(6)]}, {"image": "b.jpg", "caption": ["d"] * 5}]
    val = data.build("coco_caption_instruct", "val", shown)
    prompt = "A short image description:"
    expected = {"text_input": prompt, "prompt": prompt, "question_id": 0, "image_id": "a.jpg", "instance_id": "0"}
    assert sample(val) == expected
    assert val.references() == {"a.jpg": [f"c{i}" for i in range(6)], "b.jpg": ["d"] * 5}
    assert val.annotation[1]["answers"] == ["d"] * 5
    cleaned = {"text_processor": {"train": {"name": "blip_caption"}}}
    assert data.build("vg_caption_instruct", "train", records, **cleaned)[0]["text_output"] == "a woman, cutting a cake"


def test_caption_task_asks_with_the_dataset_s_instruction(data: Data, tmp_path: Path) -> None:
    val = data.build("flickr30k_caption_instruct", "test", [{"image": "flickr30k-images/7.jpg", "caption": ["a dog"]}])
    picture(data.root / "images/flickr30k-images/7.jpg")

    class Captioner:
        def generate(self, samples: dict[str, Any], **settings: Any) -> list[str]:
            assert samples["prompt"] == ["A short image description:"]
            return ["a dog"]

    task = CaptionTask(metrics=["bleu"])
    results = task.valid_step(Captioner(), val.collater([val[0]]))  # type: ignore[arg-type]
    assert results == [{"instance_id": "0", "image_id": 7, "caption": "a dog"}]
    assert task.score(results, dataset=val, split="test", result_dir=tmp_path)["Bleu_1"] == pytest.approx(1)


def test_empty_captions_are_left_out_and_missing_ones_named(data: Data, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"image": "a.jpg", "caption": ""}, {"image": "b.jpg", "caption": "x"}]
    assert len(data.build("sbu_caption_instruct", "train", records)) == 1
    assert "blank texts of 1 of 2 records are left out, and 1 of these records" in caplog.text
    with pytest.raises(ValueError, match=r"record 0 has no field 'caption'; fields there: 'image'"):
        data.build("conceptual_caption_3m_instruct", "train", [{"image": "a.jpg"}])
    with pytest.raises(ValueError, match=r"train0\.json: all 1 records have blank texts"):
        data.build("conceptual_caption_12m_instruct", "train", records[:1])


@pytest.mark.parametrize("name", ["capfilt14m", "capfilt14m_instruct"])
def test_capfilt_takes_absolute_paths(data: Data, name: str) -> None:
    records = [{"image": str(data.root / "images" / "b.jpg"), "caption": "web text"}]
    item = data.build(name, "train", records)[0]
    assert item.get("text_output", item["text_input"]) == "web text"
    assert item["image"].item() == pytest.approx(120, abs=3)


def textcaps(*rows: tuple[str, str | None], split: str = "train") -> dict[str, Any]:
    data = [
        {"image_id": image, "set_name": split, "image_path": f"{split}/{image}.jpg", "image_classes": ["Bottle"]}
        | ({} if caption is None else {"caption_str": caption, "reference_strs": [caption], "caption_id": 1})
        for image, caption in rows
    ]
    return {"dataset_type": split, "dataset_name": "textcaps", "dataset_version": "0.1", "data": data}


def test_textcaps_without_and_with_the_words_in_the_image(data: Data) -> None:
    train = textcaps(("a", "A bottle reads Merlot"), ("a", "A bottle"), ("b", "B"))
    words = {"data": [{"image_id": "a", "ocr_tokens": ["merlot", "2019"], "ocr_info": [{"word": "merlot"}]}]}
    plain = data.build("textcaps_caption", "train", train)
    assert [sample(plain, i)["text_input"] for i in range(3)] == ["A bottle reads Merlot", "A bottle", "B"]
    assert [plain[i]["image_id"] for i in range(3)] == [0, 0, 1]
    one = {"instructions": {"output": "caption", "train": ["OCR tokens: {ocr_tokens}. Describe:"]}}
    instruct = data.build("textcaps_caption_instruct", "train", train, words, kind="ocr", **one)
    assert sample(instruct, 1) == {
        "text_input": "OCR tokens: merlot, 2019. Describe:",
        "text_output": "A bottle",
        "instance_id": "1",
    }
    assert sample(instruct, 2)["text_input"] == "OCR tokens: . Describe:"
    for name in ("textcaps_caption", "textcaps_caption_instruct"):
        test = data.build(name, "test", textcaps(("a", None), ("b", None), split="test"))
        assert [test[i]["image_id"] for i in range(len(test))] == ["a", "b"]
        val = data.build(name, "val", textcaps(("a", "x"), ("a", "y")))
        assert (len(val), val.references(), test.references()) == (1, {"a": ["x", "y"]}, {})
    with pytest.raises(ValueError, match="record 0 has no field 'caption_str'"):
        data.build("textcaps_caption", "train", textcaps(("a", None)))
    with pytest.raises(ValueError, match=r'train0\.json: expected \{"data": \[\.\.\.\]\}'):
        data.build("textcaps_caption_instruct", "train", [])


# Questions

VQA = {"question_id": 262148001, "question": "What's the table made of?", "image": "a.jpg", "dataset": "vqa"}


def test_questions_draw_an_answer_by_its_share_and_a_template(data: Data) -> None:
    records = [{**VQA, "answer": ["wood"] * 9 + ["oak"]}]
    train = data.build("coco_vqa_instruct", "train", records)
    drawn = [sample(train) for _ in range(300)]
    outputs = Counter(item["text_output"] for item in drawn)
    assert outputs.keys() == {"wood", "oak"}
    assert 8 <= outputs["oak"] <= 55  # 30 +- 5 standard deviations
    asked = {item["text_input"] for item in drawn}
    assert len(asked) == 10
    assert "Q: what's the table made of? A:" in asked
    frequent = data.build("coco_vqa_instruct", "train", records, answer_choice="most_frequent")
    assert {frequent[0]["text_output"] for _ in range(50)} == {"wood"}
    batch = train.collater([train[0], train[0]])
    assert len(batch["text_output"]) == len(batch["text_input"]) == 2


def test_official_questions_are_scored_by_the_vqa_task(data: Data, tmp_path: Path) -> None:
    answers = ["wood"] * 4 + ["oak"] * 6
    truths = [
        {
            "question_id": VQA["question_id"],
            "answers": [
                {"answer": answer, "answer_id": i, "answer_confidence": "yes"} for i, answer in enumerate(answers)
            ],
            "question_type": "what",
            "answer_type": "other",
        }
    ]
    official = {"data_subtype": "val2014", "questions": [{**VQA, "image_id": 262148}]}
    files = [[VQA], ["wood", "oak"], official, {"annotations": truths}]
    val = data.build("coco_vqa_instruct", "val", *files, kind="eval")
    assert sample(val) == {
        "text_input": "Question: what's the table made of? Short answer:",
        "question_id": 262148001,
        "instance_id": "0",
    }
    assert VQATask().batch_context(val) == {"answer_list": ["wood", "oak"]}
    results = [{"instance_id": "0", "question_id": VQA["question_id"], "answer": "wood"}]
    metrics = VQATask().score(results, dataset=val, split="val", result_dir=tmp_path)
    assert metrics == {
        "overall": 100.0,
        "agg_metrics": 100.0,
        "official": 100.0,
        "lavis": 100.0,
        "lavis_per_answer_type": {"other": 100.0},
        "per_question_type": {"what": 100.0},
        "per_answer_type": {"other": 100.0},
    }
    assert data.build("ok_vqa_instruct", "train", [{**VQA, "answer": "x"}]).answer_list is None


@pytest.mark.parametrize("name", ["vqg_coco_vqa", "vqg_ok_vqa", "vqg_aok_vqa"])
def test_question_generation_learns_the_question(data: Data, name: str) -> None:
    key = "direct_answers" if name == "vqg_aok_vqa" else "answer"
    train = data.build(name, "train", [{**VQA, key: ["wood"] * 10}])
    items = [sample(train) for _ in range(60)]
    assert {item["text_output"] for item in items} == {"what's the table made of?"}
    asked = {item["text_input"] for item in items}
    assert len(asked) == 6
    assert "Taking the image into account, generate an question that has the answer: wood. Question:" in asked


AOKVQA = {
    "split": "train",
    "image_id": 299207,
    "question_id": "22MexNkBPpdZGX6sxbxVBH",
    "question": "What is the man awaiting?",
    "choices": ["skateboarder", "train", "delivery", "cab"],
    "correct_choice_idx": 3,
    "direct_answers": ["ride", "cab", "cab"],
    "difficult_direct_answer": False,
    "rationales": ["r1", "r2"],
    "image": "a.jpg",
}
TEST = ("split", "image_id", "question_id", "question", "choices", "image")


def test_aokvqa_direct_answers(data: Data, tmp_path: Path) -> None:
    hard = {**AOKVQA, "question_id": "hard", "difficult_direct_answer": True}
    train = data.build("aok_vqa_instruct", "train", [AOKVQA, hard])
    assert len(train) == 2
    assert {sample(train, 1)["text_output"] for _ in range(50)} == {"ride", "cab"}
    val = data.build("aok_vqa_instruct", "val", [AOKVQA, hard], ["cab", "ride"])
    assert sample(val) == {
        "text_input": "Question: what is the man awaiting? Short answer:",
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "instance_id": "0",
    }
    assert val.answer_list == ["cab", "ride"]
    results = [
        {"instance_id": str(i), "question_id": r["question_id"], "answer": "cab"} for i, r in enumerate((AOKVQA, hard))
    ]
    metrics = AOKVQATask().score(results, dataset=val, split="val", result_dir=tmp_path)
    assert metrics["overall"] == pytest.approx(66.67)  # 2 of 3 matches; the difficult question doesn't count
    unanswered = data.build("aok_vqa_instruct", "test", [{key: AOKVQA[key] for key in TEST}], ["cab"])
    assert unanswered.annotation[0]["answers"] == []


def test_aokvqa_multiple_choice(data: Data) -> None:
    train = data.build("aok_vqa_instruct", "train", [AOKVQA], kind="multiple_choice")
    options = "(a) skateboarder (b) train (c) delivery (d) cab"
    items = [sample(train) for _ in range(20)]
    assert {item["text_output"] for item in items} == {"cab"}
    assert all(options in item["text_input"] for item in items)
    val = data.build("aok_vqa_instruct", "val", [{**AOKVQA, "difficult_direct_answer": True}], kind="multiple_choice")
    assert sample(val) == {
        "text_input": f"Question: what is the man awaiting? Options: {options}. Short answer:",
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "candidates": AOKVQA["choices"],
        "instance_id": "0",
    }
    assert (val.annotation[0]["label"], val.annotation[0]["answers"]) == (3, ["cab"])
    test = data.build("aok_vqa_instruct", "test", [{key: AOKVQA[key] for key in TEST}], kind="multiple_choice")
    assert (test.annotation[0]["label"], test[0]["candidates"]) == (None, AOKVQA["choices"])


@pytest.mark.parametrize("kind", ["default", "balanced_val", "balanced_testdev"])
def test_gqa_with_and_without_answers(data: Data, tmp_path: Path, kind: str) -> None:
    question = {"question_id": "201307251", "image": "a.jpg", "question": "Is it overcast?"}
    answered = {**question, "answer": "no", "fullAnswer": "No, it is clear."}
    assert data.build("gqa_instruct", "train", [answered], kind=kind)[0]["text_output"] == "no"
    val = data.build("gqa_instruct", "val", [answered], kind=kind)
    assert sample(val)["text_input"] == "Question: is it overcast? Short answer:"
    results = [{"instance_id": "0", "question_id": "201307251", "answer": "No."}]
    assert GQATask().score(results, dataset=val, split="val", result_dir=tmp_path)["overall"] == 100
    test = data.build("gqa_instruct", "test", [question], kind=kind)
    assert GQATask().score(results, dataset=test, split="test", result_dir=tmp_path)["agg_metrics"] is None


def test_visual_genome_has_one_answer(data: Data) -> None:
    record = {"question_id": 986769, "question": "How many clocks?", "answer": "two", "image": "b.jpg", "dataset": "vg"}
    assert data.build("vg_vqa_instruct", "train", [record])[0]["text_output"] == "two"
    with pytest.raises(ValueError, match=r"record 0 has no field 'question'"):
        data.build("vg_vqa_instruct", "train", [{"image": "b.jpg", "answer": "two"}])


# OCR-VQA


def book(split: int, *answers: str) -> dict[str, Any]:
    questions = [f"Question {i}?" for i in range(len(answers))]
    return {
        "imageURL": "http://x.org/1.jpg",
        "questions": questions,
        "answers": list(answers),
        "title": "T",
        "split": split,
    }


BOOKS = {"a": book(1, "Sandra Boynton", "Calendars"), "b": book(2, "B"), "c": book(3, "C", "D"), "gone": book(1, "E")}


def test_ocr_vqa_takes_its_split_and_the_images_that_are_there(data: Data, caplog: pytest.LogCaptureFixture) -> None:
    train = data.build("ocr_vqa_instruct", "train", BOOKS)
    assert [sample(train, i)["text_output"] for i in range(len(train))] == ["Sandra Boynton", "Calendars"]
    assert "1 of 3 questions have no image" in caplog.text
    test = data.build("ocr_vqa_instruct", "test", BOOKS)
    assert [sample(test, i) for i in range(len(test))] == [
        {"text_input": f"Question: question {i}? Short answer:", "question_id": f"c_{i}", "instance_id": str(i)}
        for i in range(2)
    ]
    assert test[0]["image"].item() == 180  # c.png
    assert [record["answers"] for record in test.annotation] == [["C"], ["D"]]
    plain = data.build("ocr_vqa", "train", BOOKS)
    assert (plain[0]["answer"], plain[0]["weight"]) == (["Sandra Boynton"], [1.0])
    val = data.build("ocr_vqa", "val", BOOKS)
    assert sample(val) == {"text_input": "question 0?", "question_id": "b_0", "instance_id": "0"}


def test_ocr_vqa_errors_name_the_file_and_the_book(data: Data) -> None:
    with pytest.raises(ValueError, match=r"train0\.json: a has 1 questions and 2 answers"):
        data.build("ocr_vqa_instruct", "train", {"a": {"questions": ["?"], "answers": ["x", "y"], "split": 1}})
    with pytest.raises(FileNotFoundError, match=r"images has none of the train images of .*train0\.json"):
        data.build("ocr_vqa", "train", {"gone": BOOKS["gone"]})
    builder = registry.get_builder_class("ocr_vqa_instruct")
    path = data.root / "dev.json"
    path.write_text(json.dumps(BOOKS))
    info = {"annotations": {"dev": {"storage": str(path)}}, "images": {"storage": str(data.root / "images")}}
    with pytest.raises(ValueError, match="splits train, val, test, but no 'dev'"):
        builder(build_info=info, instructions="vqa").build()


# Choices


def test_snli_ve_is_a_choice_of_words(data: Data) -> None:
    rows = [
        {"image": "a", "sentence": "Two women are holding packages.", "label": label}
        for label in ("entailment", "neutral", "contradiction")
    ]
    train = data.build("snli_ve_instruct", "train", rows)
    assert [train[i]["text_output"] for i in range(3)] == ["yes", "maybe", "no"]
    cleaned = {"text_processor": {"eval": {"name": "blip_caption"}}}
    val = data.build("snli_ve_instruct", "val", rows, **cleaned)
    assert sample(val) == {
        "text_input": "based on the given the image is two women are holding packages true?",
        "question_id": 0,
        "candidates": ["no", "maybe", "yes"],
        "instance_id": "0",
    }
    assert [record["label"] for record in val.annotation] == [2, 1, 0]
    with pytest.raises(ValueError, match=r"val0\.json: record 1 .*'neutrall'.*'neutral'"):
        data.build("snli_ve_instruct", "val", [rows[0], {**rows[0], "label": "neutrall"}])


PROBLEM = {
    "question": "Which rhetorical appeal is primarily used: ethos?",
    "choices": ["pathos (emotion)", "ethos", "logos"],
    "answer": 1,
    "hint": "",
    "image": "image.png",
    "lecture": "L.",
    "split": "test",
}


def test_scienceqa_of_the_official_file(data: Data) -> None:
    problems = {
        "5": PROBLEM,
        "6": {**PROBLEM, "image": None},
        "7": {**PROBLEM, "split": "train", "answer": 0},
        "8": {**PROBLEM, "hint": "Look.", "choices": ["x", "y"]},
    }
    for number in (5, 8):
        picture(data.root / f"images/test/{number}/image.png", number)
    picture(data.root / "images/train/7/image.png", 7)
    test = data.build("scienceqa_instruct", "test", problems)
    question = "Question: Which rhetorical appeal is primarily used: ethos?"
    assert sample(test) == {
        "text_input": f"Context:  {question} Options: (a) pathos (emotion) (b) ethos (c) logos. Answer:",
        "question_id": "5",
        "candidates": PROBLEM["choices"],
        "instance_id": "0",
    }
    assert sample(test, 1)["text_input"] == f"Context: Look. {question} Options: (a) x (b) y. Answer:"
    assert [test[i]["image"].item() for i in range(2)] == [5, 8]
    assert [record["label"] for record in test.annotation] == [1, 1]
    train = data.build("scienceqa_instruct", "train", problems)
    assert (len(train), train[0]["text_output"]) == (1, "pathos (emotion)")
    lectured = data.build("scienceqa_instruct", "test", problems, context=["hint", "lecture"], no_context="N/A")
    assert sample(lectured, 1)["text_input"].startswith("Context: Look. L. Question:")
    assert sample(data.build("scienceqa", "test", problems))["text_input"] == PROBLEM["question"]


def test_scienceqa_of_a_list(data: Data) -> None:
    rows = [{**PROBLEM, "image": "a.jpg"}, {**PROBLEM, "image": None}]
    for row in rows:
        del row["split"], row["hint"]
    val = data.build("scienceqa_instruct", "val", rows, no_context="none")
    assert (len(val), val[0]["question_id"]) == (1, 0)
    assert val[0]["text_input"].startswith("Context: none Question:")
    with pytest.raises(ValueError, match=r"val0\.json: .*found no records of the split 'val'"):
        data.build("scienceqa_instruct", "val", rows[1:])
    with pytest.raises(ValueError, match=r"val0\.json: record 1 has the label 9"):
        data.build("scienceqa_instruct", "val", [rows[1], {**rows[0], "answer": 9}])


# Dialogue


@pytest.mark.parametrize("part", ["dialogue", "conversation", "detail", "reasoning"])
def test_llava_asks_every_question_behind_the_earlier_rounds(data: Data, part: str) -> None:
    said = [
        ("human", "<image>\nWhat are the colors of the bus (front)?"),
        ("gpt", "The bus is white: and red."),
        ("human", "Where is it?\n<image>"),
        ("gpt", "On a street. " + "word " * 60),
    ]
    record = {"id": "7", "image": "a.jpg", "conversations": [{"from": who, "value": text} for who, text in said]}
    cleaned = {"text_processor": {"train": {"name": "blip_caption"}}}
    train = data.build(f"llava150k_{part}_instruct", "train", [record], **cleaned)
    assert [(item["text_input"], item["text_output"]) for item in map(train.__getitem__, range(len(train)))] == [
        ("What are the colors of the bus (front)?", "The bus is white: and red."),
        (
            "What are the colors of the bus (front)?\nThe bus is white: and red.\nWhere is it?",
            "On a street. " + ("word " * 60).strip(),
        ),
    ]
