"""InstructBLIP's held-out sets: every published format as one fixture of made-up records, and what becomes of it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lavis_lite.common.config.zoo import dataset_zoo, packaged_dataset
from lavis_lite.common.registry import registry
from lavis_lite.datasets import visual
from lavis_lite.tasks.captioning import CaptionTask
from lavis_lite.tasks.metrics import caption_java
from lavis_lite.tasks.vqa import VQATask

VSR = [
    {"image": "000000296471.jpg", "caption": "The cat (A) is inside.", "label": 1, "relation": "inside"},
    {"image": "000000296471.jpg", "caption": "The cat is on a dog.", "label": 0, "relation": "on"},
    {"image": "7.jpg", "caption": "The cat has no relation.", "label": 1},
]
MEMES = [
    {"id": 42953, "img": "img/42953.png", "label": 0, "text": "their character: not {that}"},
    {"id": 5, "img": "img/5.png", "label": 1, "text": "x"},
]
ICONS = [
    {"question": "How likely?", "choices": ["certain", "unlikely", "never"], "answer": 2, "image": "a.png"}
    | {"ques_type": "choose_txt", "label": "S2", "instance_id": "iconqa_9"},
    {"question": "Which?", "choices": ["a, b", "c"], "answer": 0, "image": "b.png"},
]
VIZWIZ = [
    {
        "image": "VizWiz_val_00000000.jpg",
        "question": "Ok. What is it",
        "answers": [{"answer_confidence": "yes", "answer": "unanswerable"}] * 4 + [{"answer": "a can"}] * 6,
        "answer_type": "other",
        "answerable": 0,
    },
    {"image": "VizWiz_test_00000001.jpg", "question": "what?"},
]
TEXTVQA = {
    "data": [
        {"image_id": "003a", "question": "what is the brand?", "question_id": 34602, "set_name": "val"}
        | {"answers": ["dakota"] * 9 + ["nous"], "image_classes": ["Cassette deck"]},
        {"image_id": "ff", "question": "which word?", "question_id": 2, "set_name": "test"},
    ]
}
WORDS = {"data": [{"image_id": "003a", "ocr_tokens": [f"w{i}" for i in range(40)], "ocr_info": []}]}
DIALOG = [
    {"question": 0, "answer": 2, "answer_options": [3, 2, 0, 1], "gt_index": 1},
    {"question": 1, "answer": 0, "answer_options": [0, 1, 2, 3], "gt_index": 0},
]
VISDIAL: dict[str, Any] = {
    "split": "val2018",
    "data": {
        "questions": ["is it nice", "how many cats?"],
        "answers": ["2", "no, (not)", "yes, it is", "maybe"],
        "dialogs": [
            {"image_id": 185565, "caption": "a cat", "dialog": DIALOG},
            {"image_id": 7, "caption": "a dog", "dialog": DIALOG[:1]},
        ],
    },
}
VIDEO_QA = [
    {"video": "video7010.mp4", "question": "what is a boy doing?", "answer": "play", "question_id": 30},
    {"video": "video7011.mp4", "question": "how many?", "answer": "two", "question_id": 31},
]
IVQA = (
    "video_id,start,end,question,answer1,answer2,answer3,answer4,answer5,type\n"
    "dQ,65,75,What tool?,drill,power drill,drill,,drill,0\n"
)


def make(name: str, tmp_path: Path, files: dict[str, Any], *, cleaned: bool = False, **options: Any) -> dict[str, Any]:
    """The datasets of a builder as its YAML has it, given its files' content by split (a tuple: several files)."""
    own = packaged_dataset(name)
    info: dict[str, Any] = {"annotations": {}, "images": {"storage": str(tmp_path)}}
    for split, contents in files.items():
        paths = []
        for number, content in enumerate(contents if isinstance(contents, tuple) else (contents,)):
            kind = "csv" if isinstance(content, str) else "json"
            paths.append(tmp_path / f"{split}{number}.{kind}")
            paths[-1].write_text(content if kind == "csv" else json.dumps(content))
        info["annotations"][split] = {"storage": [str(path) for path in paths]}
    if cleaned:
        block = {"name": "blip_question"}
        options["text_processor"] = {"train": block, "eval": block}
    return registry.get_builder_class(name)(**{**own, "build_info": info, **options}).build()


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "teal").save(path)


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos are not decoded here: a frame is the length of the file's name."""
    monkeypatch.setattr(
        visual, "read_frames", lambda path, count, processor, **_: torch.full((3, count, 2, 2), float(len(path.name)))
    )


@pytest.mark.slow
def test_vsr_is_a_choice_among_words_of_two_classes(tmp_path: Path) -> None:
    for name in ("000000296471.jpg", "7.jpg"):
        picture(tmp_path / name)
    data = make("vsr_classification", tmp_path, {"train": VSR, "test": VSR}, cleaned=True)
    sample, record = data["test"][0], data["test"].annotation[0]
    assert sample["text_input"] == (
        'Based on the image, is this statement true or false? "The cat (A) is inside." Answer:'
    )
    assert sample["candidates"] == ["no", "false", "yes", "true"]
    assert (record["label"], record["classes"], record["answers"]) == (2, (0, 0, 1, 1), ["yes"])
    assert data["test"].annotation[1]["label"] == 0
    assert [r["question_type"] for r in data["test"].annotation] == ["inside", "on", None]
    assert [data["train"][i]["text_output"] for i in range(3)] == ["yes", "no", "yes"]
    assert "candidates" not in data["train"][0]
    narrow = make("vsr_classification_instruct", tmp_path, {"test": VSR}, verbalizers=[["wrong"], ["right"]])["test"]
    assert narrow[0]["candidates"] == ["wrong", "right"]
    assert narrow.annotation[0]["label"] == 1
    for label in (2, "1"):
        with pytest.raises(ValueError, match=rf"record 1 has label {label!r}; labels are 0, 1"):
            make("vsr_classification", tmp_path, {"test": [VSR[0], {**VSR[1], "label": label}]})


@pytest.mark.slow
def test_true_statements_are_captions(tmp_path: Path) -> None:
    for name in ("000000296471.jpg", "7.jpg"):
        picture(tmp_path / name)
    data = make("vsr_caption", tmp_path, {"train": VSR, "test": VSR})
    assert [data["train"][i]["text_output"] for i in range(2)] == ["The cat (A) is inside.", VSR[2]["caption"]]
    assert len(data["train"]) == 2
    assert data["test"].references() == {296471: ["The cat (A) is inside."], 7: ["The cat has no relation."]}
    assert data["test"][1]["image_id"] == 7


def test_hateful_memes(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "42953.png")
    unknown = [{key: value for key, value in meme.items() if key != "label"} for meme in MEMES]
    data = make("hateful_memes", tmp_path, {"val": MEMES, "test": unknown}, cleaned=True)
    assert data["val"][0]["text_input"] == (
        'This is an image with: "their character: not {that}" written on it. Is it hateful? Answer:'
    )
    assert data["val"][0]["question_id"] == 42953
    assert [record["label"] for record in data["val"].annotation] == [0, 2]
    assert data["test"].annotation[0].get("label") is None
    assert data["test"].annotation[0]["answers"] == []
    assert data["test"][0]["candidates"] == ["no", "false", "yes", "true"]
    with pytest.raises(ValueError, match=r"record 0 has no field 'text'"):
        make("hateful_memes", tmp_path, {"val": [{"id": 1, "img": "a.png", "label": 0}]})


def test_iconqa_ranks_two_to_five_choices(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    data = make("iconqa", tmp_path, {"train": ICONS, "test": ICONS})
    test = data["test"]
    assert test[0]["text_input"] == "Question: How likely? Options: (a) certain (b) unlikely (c) never. Short answer:"
    assert [test[i]["candidates"] for i in range(2)] == [["certain", "unlikely", "never"], ["a, b", "c"]]
    assert [(r["label"], r["answers"], r["instance_id"]) for r in test.annotation] == [
        (2, ["never"], "0"),
        (0, ["a, b"], "1"),
    ]
    assert data["train"][1]["text_output"] == "a, b"
    for wrong, message in (
        ({"choices": "certain,unlikely"}, r"record 0 must have a list of texts in 'candidates'.*'certain,unlikely'"),
        ({"answer": 3}, r"test0\.json: record 0 .*3.* 3 candidates"),
    ):
        with pytest.raises(ValueError, match=message):
            make("iconqa", tmp_path, {"test": [{**ICONS[0], **wrong}]})


def test_vizwiz_is_known_by_its_images(tmp_path: Path) -> None:
    for folder, name in (("val", VIZWIZ[0]["image"]), ("test", VIZWIZ[1]["image"])):
        picture(tmp_path / folder / name)
    data = make("vizwiz_vqa", tmp_path, {"val": VIZWIZ[:1], "test": VIZWIZ[1:]})
    assert data["val"][0]["question_id"] == "VizWiz_val_00000000.jpg"
    assert data["val"][0]["text_input"] == "Question: Ok. What is it Short answer:"
    assert data["val"].annotation[0]["answers"] == ["unanswerable"] * 4 + ["a can"] * 6
    assert data["val"].annotation[0]["answer_type"] == "other"
    assert data["test"][0]["image"].size == (8, 6)
    assert data["test"].annotation[0]["answers"] == []


def test_textvqa_with_the_words_in_the_images(tmp_path: Path) -> None:
    picture(tmp_path / "train_images" / "003a.jpg")
    picture(tmp_path / "test_images" / "ff.jpg")
    for files in ((TEXTVQA, WORDS), (WORDS, TEXTVQA)):
        data = make("textvqa", tmp_path, {"val": files})["val"]
        words = ", ".join(f"w{i}" for i in range(30))
        assert data[0]["text_input"] == f"OCR tokens: {words}. Question: what is the brand? Short answer:"
        assert data[1]["text_input"] == "OCR tokens: . Question: which word? Short answer:"
        assert data.annotation[0]["answers"] == ["dakota"] * 9 + ["nous"]
        assert [data[i]["question_id"] for i in range(2)] == [34602, 2]
    alone = make("textvqa", tmp_path, {"val": TEXTVQA}, instructions="vqa")["val"]
    assert alone[0]["text_input"] == "Question: what is the brand? Short answer:"
    with pytest.raises(ValueError, match="has no field 'ocr_tokens' for the template"):
        make("textvqa", tmp_path, {"val": TEXTVQA})
    with pytest.raises(ValueError, match=r"val0\.json: expected .*TextVQA"):
        make("textvqa", tmp_path, {"val": [{"question": "?"}]})


def test_visual_dialog_has_a_record_for_each_round(tmp_path: Path) -> None:
    name = "VisualDialog_val2018/VisualDialog_val2018_{:012d}.jpg"
    for number in (185565, 7):
        picture(tmp_path / name.format(number))
    val = make("visdial", tmp_path, {"val": VISDIAL}, cleaned=True)["val"]
    assert [sample["question_id"] for sample in val] == ["185565_1", "185565_2", "7_1"]
    assert [sample["text_input"] for sample in val] == [
        "Dialog history: \n Question: is it nice? Short answer:",
        "Dialog history: q: is it nice? a: yes, it is\n Question: how many cats? Short answer:",
        "Dialog history: \n Question: is it nice? Short answer:",
    ]
    assert val[0]["candidates"] == ["maybe", "yes, it is", "2", "no, (not)"]
    assert [(r["label"], r["answers"]) for r in val.annotation] == [
        (1, ["yes, it is"]),
        (0, ["2"]),
        (1, ["yes, it is"]),
    ]
    told = make(
        "visdial", tmp_path, {"val": VISDIAL}, instructions={"output": "answer", "eval": "{caption}. {question}"}
    )
    assert told["val"][2]["text_input"] == "a dog. is it nice?"


def test_visual_dialogs_training_and_test_files(tmp_path: Path) -> None:
    picture(tmp_path / "VisualDialog_train2018" / "VisualDialog_train2018_000000185565.jpg")
    train = make("visdial_instruct", tmp_path, {"train": {**VISDIAL, "split": "train"}})["train"]
    assert len(train) == 3
    assert "candidates" not in train.annotation[0]
    assert train[1]["text_output"] == "2"
    bare = [{"question": 0, "answer": 2}, {"question": 1, "answer_options": [0, 1, 2, 3]}]
    dialogs = [{"image_id": 3, "caption": "c", "dialog": bare}]
    test = make("visdial", tmp_path, {"test": {"split": "test2018", "data": {**VISDIAL["data"], "dialogs": dialogs}}})
    (record,) = test["test"].annotation
    assert record["image"] == "VisualDialog_test2018/VisualDialog_test2018_000000000003.jpg"
    assert record["history"] == "q: is it nice? a: yes, it is"
    assert (record["question_id"], record["answers"]) == ("3_2", [])
    with pytest.raises(ValueError, match=r"expected Visual Dialog's"):
        make("visdial", tmp_path, {"val": {"data": []}})


def test_video_questions_have_the_answers_to_rank(tmp_path: Path, frames: None) -> None:
    files = {"train": VIDEO_QA, "test": VIDEO_QA, "ans2label": {"woman": 2, "play": 0, "two": 1}}
    data = make("msrvtt_qa", tmp_path, files, num_frames=3)
    assert list(data) == ["train", "test"]
    assert data["test"].answer_list == ["play", "two", "woman"]
    batch = data["test"].collater([data["test"][0], data["test"][1]])
    assert batch["image"].shape == (2, 3, 3, 2, 2)
    assert batch["question_id"] == [30, 31]
    assert batch["text_input"][1] == "Question: how many? Short answer:"
    assert data["train"][1]["text_output"] == "two"
    assert data["test"].annotation[1]["answers"] == ["two"]
    assert make("msvd_qa_instruct", tmp_path, {"test": VIDEO_QA})["test"].answer_list is None
    assert make("msvd_qa", tmp_path, {**files, "ans2label": ["b", "a"]})["test"].answer_list == ["b", "a"]
    with pytest.raises(ValueError, match=r"ans2label0\.json: expected the answers to rank"):
        make("msvd_qa", tmp_path, {**files, "ans2label": {"a": "b"}})
    (tmp_path / "ans2label0.json").unlink()
    entry = {"storage": str(tmp_path / "ans2label0.json")}
    builder = registry.get_builder_class("msvd_qa")(build_info={"annotations": {"test": entry, "ans2label": entry}})
    with pytest.raises(FileNotFoundError, match=r"ans2label0\.json"):
        builder.prepare([])


def test_ivqa_keeps_five_annotators(tmp_path: Path, frames: None) -> None:
    data = make("ivqa", tmp_path, {"train": IVQA, "test": IVQA})
    assert data["test"].annotation[0]["video"] == "dQ.mp4"
    assert data["test"].annotation[0]["answers"] == ["drill", "power drill", "drill", "drill"]
    random.seed(0)
    assert {data["train"][0]["text_output"] for _ in range(40)} == {"drill", "power drill"}
    cut = make("ivqa", tmp_path, {"test": IVQA}, video_name="{video_id}_{start}_{end}.mkv")["test"]
    assert cut.annotation[0]["video"] == "dQ_65_75.mkv"
    with pytest.raises(KeyError, match="'ende'"):
        make("ivqa", tmp_path, {"test": IVQA}, video_name="{ende}.mp4")


def test_video_captions_are_scored_by_video(tmp_path: Path, frames: None) -> None:
    rows = [{"video": f"v{i}.mp4", "caption": text} for i, text in ((1, "a dog"), (2, "a cat"), (1, "the dog"))]
    data = make("msvd_caption", tmp_path, {"train": rows, "test": rows, "blind": [{"video": "v1.mp4"}]})
    assert len(data["train"]) == 3
    assert data["train"][2]["text_output"] == "the dog"
    assert data["test"].references() == {"v1.mp4": ["a dog", "the dog"], "v2.mp4": ["a cat"]}
    assert data["test"][1]["image"].shape == (3, 4, 2, 2)
    assert (data["test"][1]["image_id"], data["test"][1]["prompt"]) == ("v2.mp4", "A short image description:")
    assert data["blind"].references() == {}
    numbered = [{**row, "image_id": i % 2} for i, row in enumerate(rows)]
    assert make("msrvtt_caption", tmp_path, {"test": numbered})["test"].references() == {
        0: ["a dog", "the dog"],
        1: ["a cat"],
    }


class Seer(torch.nn.Module):
    """Says what its table has for the clip's first value, the length of the video's name."""

    def __init__(self, says: dict[float, str]) -> None:
        super().__init__()
        self.says = says
        self.given: dict[str, Any] = {}

    def generate(self, samples: dict[str, Any], **settings: Any) -> list[str]:
        self.given = {"prompt": samples["prompt"]}
        return [self.says[float(clip[0, 0, 0, 0])] for clip in samples["image"]]

    def predict_answers(self, samples: dict[str, Any], *, answer_list: list[str], **settings: Any) -> list[str]:
        self.given = {"answer_list": answer_list, "asked": samples["text_input"]}
        return [self.says[float(clip[0, 0, 0, 0])] for clip in samples["image"]]


def test_the_captioning_and_question_tasks_score_videos(
    tmp_path: Path, frames: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption_java, "find_java", lambda: None)
    rows = [
        {"video": "v1.mp4", "caption": "a dog runs far away"},
        {"video": "v22.mp4", "caption": "two cats sleep here"},
    ]
    data = make("msrvtt_caption", tmp_path, {"test": rows})["test"]
    model = Seer({6.0: "a dog runs far away", 7.0: "two cats sleep here"})
    loader = DataLoader(data, batch_size=2, collate_fn=data.collater)
    metrics = CaptionTask(metrics=["bleu"]).evaluate(model, loader, split="test", result_dir=tmp_path)
    assert metrics["Bleu_4"] == pytest.approx(1, abs=1e-3)
    assert model.given == {"prompt": ["A short image description:"] * 2}
    questions = [{**VIDEO_QA[1], "video": row["video"], "question_id": i} for i, row in enumerate(rows)]
    data = make("msrvtt_qa", tmp_path, {"test": questions, "ans2label": {"two": 0, "dog": 1}})["test"]
    model = Seer({6.0: "two", 7.0: "dog"})
    loader = DataLoader(data, batch_size=2, collate_fn=data.collater)
    metrics = VQATask(accuracy="normalised").evaluate(model, loader, split="test", result_dir=tmp_path)
    assert metrics["overall"] == 50.0
    assert model.given == {"answer_list": ["two", "dog"], "asked": ["Question: how many? Short answer:"] * 2}


@pytest.mark.parametrize(
    "name", ["vsr_classification", "vsr_caption", "iconqa", "visdial", "msvd_qa", "msrvtt_caption"]
)
def test_instruct_names_are_the_same_sets(name: str) -> None:
    for kind in dataset_zoo.types(name):
        assert packaged_dataset(name, kind) == packaged_dataset(f"{name}_instruct", kind)
