"""Instruction data: templates, LAVIS's text processor, the user's own files, and which mistakes are told at loading."""

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavis_lite.common.errors import InputError
from lavis_lite.common.prompts import joined_words, lettered
from lavis_lite.datasets import load_dataset, visual
from lavis_lite.datasets.instruct import InstructBuilder, InstructDataset
from lavis_lite.datasets.templates import PLACEHOLDER, PROMPTS, Templates, fill, load_templates, with_prompt
from lavis_lite.processors import load_processor

REFERENCE = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference"))
TABLE = json.loads((REFERENCE / "tables" / "text_processors.json").read_text())
DATA_PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
NAMES = sorted(path.stem for path in PROMPTS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def kept_generator() -> Iterator[None]:
    """Leaves python's generator as it was."""
    state = random.getstate()
    yield
    random.setstate(state)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate("abcd"):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / f"{name}.jpg", quality=100)
    return tmp_path


def build(root: Path, lines: list[Any], *, split: str = "val", file: str = "own.jsonl", **options: Any) -> Any:
    """The dataset of a file of these lines: records as JSON, texts as they are."""
    path = root / file
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    info = {"annotations": {split: {"storage": str(path)}}, "images": {"storage": str(root)}}
    return InstructBuilder(build_info=info, **options).build()[split]


def asked(number: int = 0, **fields: Any) -> dict[str, Any]:
    """A record of the user's; a field that is None is left out."""
    record = {"image": "abcd"[number] + ".jpg", "instruction": f"say {number}", "output": f"o{number}", **fields}
    return {key: value for key, value in record.items() if value is not None}


# Templates


@pytest.mark.parametrize("name", NAMES)
def test_every_packaged_file_holds_templates(name: str) -> None:
    templates = load_templates(name)
    needed = set(PLACEHOLDER.findall(templates.eval))
    for template in templates.train:
        assert template.strip()
        assert set(PLACEHOLDER.findall(template)) == needed, template
    if not name.startswith("shapes_"):
        assert templates.source


def test_training_templates_of_the_paper() -> None:
    counts = {"caption": 13, "vqa": 10, "vqg": 6, "plain": 1, "textcaps": 13, "ocr_vqa": 10, "aokvqa": 10}
    assert {name: len(set(load_templates(name).train)) for name in counts} == counts
    learned = {name: load_templates(name).output for name in counts}
    assert learned.pop("vqg") == "question"
    assert learned == dict.fromkeys(("caption", "textcaps"), "caption") | {"plain": "output"} | dict.fromkeys(
        ("vqa", "ocr_vqa", "aokvqa"), "answer"
    )
    assert load_templates("vqa").train[7:] == (
        "Use the provided image to answer the question: {question} Provide your answer as short as possible:",
        'What is the answer to the following question? "{question}"',
        'The question "{question}" can be answered using the image. A short answer is',
    )


@pytest.mark.parametrize(
    ("name", "fields", "instruction"),
    [
        ("caption", {}, "A short image description:"),
        ("vqa", {"question": "why?"}, "Question: why? Short answer:"),
        ("ocr_vqa", {"question": "why?"}, "Question: why? Short answer:"),
        ("textvqa", {"ocr_tokens": ["a", "b"], "question": "why?"}, "OCR tokens: a, b. Question: why? Short answer:"),
        (
            "iconqa",
            {"question": "which?", "candidates": ["blue", "red"]},
            "Question: which? Options: (a) blue (b) red. Short answer:",
        ),
        (
            "scienceqa",
            {"context": "A hint.", "question": "which?", "candidates": ["blue", "red"]},
            "Context: A hint. Question: which? Options: (a) blue (b) red. Answer:",
        ),
        ("hateful_memes", {"text": "hi {}"}, 'This is an image with: "hi {}" written on it. Is it hateful? Answer:'),
        ("vsr", {"statement": "It is."}, 'Based on the image, is this statement true or false? "It is." Answer:'),
        (
            "visdial",
            {"history": "q: a? a: b", "question": "c?"},
            "Dialog history: q: a? a: b\n Question: c? Short answer:",
        ),
    ],
)
def test_evaluation_prompts_of_the_paper(root: Path, name: str, fields: dict[str, Any], instruction: str) -> None:
    dataset = build(root, [{"image": "a.jpg", **fields}], instructions=name)
    assert dataset[0]["text_input"] == instruction


def test_templates_from_a_file_a_mapping_and_a_base(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text('base: vqa\neval: "{question} Now:"\n')
    own = load_templates(tmp_path / "own.yaml")
    assert (own.train, own.eval, own.output) == (load_templates("vqa").train, "{question} Now:", "answer")
    assert load_templates({"train": ["a", "b"]}) == Templates(train=("a", "b"), eval="a")
    assert load_templates({"eval": "a", "output": "x"}) == Templates(train=("a",), eval="a", output="x")
    assert load_templates({"base": "caption", "eval": "Tell."}).output == "caption"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("trian: [a]", ["'trian'", "train, eval"]),
        ("train: []", ["`train`", "[]"]),
        ("train: what?", ["`train`", "'what?'"]),
        ("output: answer", ["`train`", "None"]),
        ("train: [{question}]", ["{'question': None}"]),
        ("train: [Question: {question}]", ["{'Question': {'question': None}}"]),
        ("train: [a]\neval: 3", ["3"]),
        ('train: ["Question: {}"]', ["'Question: {}'", "{question}"]),
        ('train: ["{answer}?"]', ["'answer'"]),
        ("train: [a", ["line"]),
    ],
)
def test_mistakes_in_templates_are_named(tmp_path: Path, content: str, words: list[str]) -> None:
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "own.yaml"))) as error:
        load_templates(tmp_path / "own.yaml")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["question", "caption", "statement"])
def test_blank_texts_of_instructions_can_be_left_out(root: Path, split: str, name: str) -> None:
    lines = [{"image": "a.jpg", name: text, "answer": "x"} for text in ("what?", "", " ")]
    templates = {"train": [f"Q: {{{name}}}"]}
    with pytest.raises(InputError, match=f"line 2: field '{name}' is empty"):
        build(root, lines, split=split, instructions=templates)
    kept = build(root, lines, split=split, instructions=templates, blank_texts="skip")
    assert [kept[i]["text_input"] for i in range(len(kept))] == ["Q: what?"]
    with pytest.raises(InputError, match=f"line 1 has no field '{name}'"):
        build(root, [{"image": "a.jpg", "answer": "x"}], split=split, instructions=templates, blank_texts="skip")


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("base: vqaa")
    with pytest.raises(FileNotFoundError, match=r"'vqaa'.*'vqa'"):
        load_templates(tmp_path / "own.yaml")


def test_unknown_templates_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Did you mean 'vqg'"):
        load_templates("vqgg")
    with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
        load_templates(tmp_path / "no.yaml")


def test_other_braces_are_text() -> None:
    assert fill("{a} {b c} {{", {"a": "{x} {}"}) == "{x} {} {b c} {{"
    with pytest.raises(KeyError, match=r"'b'.*has a"):
        fill("{b}", {"a": 1, "b": None})


def test_no_frames_are_refused_before_a_video_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_frames: must be a whole number from 1 to 10,000, got 0"):
        build(tmp_path, [asked()], num_frames=0)


def test_lists_are_worded() -> None:
    assert lettered(["red", 3]) == "(a) red (b) 3"
    assert lettered(list("x" * 26)).endswith("(z) x")
    with pytest.raises(ValueError, match="at most 26"):
        lettered(["x"] * 27)
    assert joined_words([str(i) for i in range(40)]) == ", ".join(str(i) for i in range(30))


# Properties of filling templates

FIELDS = st.dictionaries(
    st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.text(min_size=1, max_size=30), min_size=1, max_size=4
)
TEXTS = st.text(max_size=20).filter(lambda text: not PLACEHOLDER.search(text))
quick = settings(max_examples=200, derandomize=True, database=None, deadline=None)


@st.composite
def filled_templates(draw: st.DrawFn) -> tuple[list[str], list[str], dict[str, str]]:
    """Fixed texts, the names of the placeholders between them, and the fields."""
    fields = draw(FIELDS)
    names = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=5))
    return [draw(TEXTS) for _ in range(len(names) + 1)], names, fields


def template_of(texts: list[str], names: list[str]) -> str:
    return texts[0] + "".join(f"{{{name}}}{text}" for name, text in zip(names, texts[1:], strict=True))


@quick
@given(filled_templates())
def test_a_filled_template_is_its_texts_and_its_fields(case: tuple[list[str], list[str], dict[str, str]]) -> None:
    """Fields with braces, other placeholders or any script stay as they are."""
    texts, names, fields = case
    template = template_of(texts, names)
    assume(PLACEHOLDER.findall(template) == names)  # texts around a placeholder can make another one: "{" + "a}"
    filled = fill(template, fields)
    assert filled == texts[0] + "".join(fields[name] + text for name, text in zip(names, texts[1:], strict=True))


@quick
@given(filled_templates())
def test_a_filled_template_can_be_read_back(case: tuple[list[str], list[str], dict[str, str]]) -> None:
    """Marks that no field has show which field is at which place, and that no placeholder is left."""
    texts, names, _ = case
    template = template_of(texts, names)
    assume(PLACEHOLDER.findall(template) == names)
    assume("\ue000" not in template and "\ue001" not in template)
    filled = fill(template, {name: f"\ue000{name}\ue001" for name in names})
    assert re.sub("\ue000(.*?)\ue001", r"{\1}", filled) == template
    assert not PLACEHOLDER.search(fill(template, dict.fromkeys(names, "")).replace("{", ""))


@quick
@given(filled_templates())
def test_templates_fill_what_they_name(case: tuple[list[str], list[str], dict[str, str]]) -> None:
    """The instruction needs the fields that its template names, and no other."""
    texts, names, fields = case
    template = template_of(texts, names)
    assume(PLACEHOLDER.findall(template) == names and "{}" not in template and "learned" not in names)
    templates = load_templates({"output": "learned", "train": [template, template], "eval": template})
    own = {name: fields[name] for name in names}
    assert fill(templates.train[0], own) == fill(templates.eval, fields)
    own.pop(names[0])
    with pytest.raises(KeyError, match=re.escape(repr(names[0]))):
        fill(templates.eval, own)


@quick
@given(st.text(max_size=40).filter(lambda text: "{}" not in text), st.text(min_size=1, max_size=40))
def test_an_explicit_prompt_is_filled_with_the_raw_question(text: str, question: str) -> None:
    assume(not PLACEHOLDER.search(text) and not text.endswith("{"))
    instructions = with_prompt("vqa", f"{text}{{}} Answer:")
    assert instructions is not None
    templates = load_templates(instructions)
    assert fill(templates.eval, {"question": question}) == f"{text}{question} Answer:"


# LAVIS's text processor


def test_instruction_processor_equals_the_table() -> None:
    texts = TABLE["strings"]
    evaluated = load_processor("blip_instruction", {"task": "eval", "prompt": "P: "})
    assert [evaluated(text) for text in texts] == TABLE["blip_instruction(task='eval',prompt='P: ')"]
    caption = load_processor("blip_instruction")
    expected = TABLE["blip_instruction(task='caption') non-empty only"]
    assert [caption(text) if text else None for text in texts] == expected
    question = load_processor("blip_instruction", {"task": "qa", "modality": "image"})
    random.seed(0)
    expected = TABLE["blip_instruction(task='qa',modality='image') random.seed(0), sequential"]
    assert [question(text) for text in texts[: len(expected)]] == expected
    random.seed(1)
    expected = TABLE["blip_instruction(task='caption',modality='image') '' x8, random.seed(1)"]
    assert [caption("") for _ in expected] == expected


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("task", ["qa", "caption", "classification"])
def test_templates_of_lavis_equal_the_table(modality: str, task: str) -> None:
    templates = load_templates(f"lavis_{modality}_{task}")
    assert [text.replace("{question}", "{}") for text in templates.train] == TABLE[f"TEMPLATES_{modality}"][task]


def test_instruction_processor_draws_names_and_prompts() -> None:
    process = load_processor("blip_instruction", {"task": "classification", "modality": "video", "prompt": "Now: "})
    random.seed(0)
    assert {process("Cat") for _ in range(50)} == {"a cat", "this is a cat", "it is a cat"}
    for name in ("an owl", "an Hourglass", "an x-ray fish", "a house"):
        assert process(name.split(maxsplit=1)[1]).endswith(name.lower())
    drawn = {process("") for _ in range(400)}
    assert drawn == {f"now: {text.lower()}" for text in TABLE["TEMPLATES_video"]["classification"]}


def test_mistakes_with_the_instruction_processor_are_named() -> None:
    with pytest.raises(ValueError, match="task: 'captoin' is not one of caption"):
        load_processor("blip_instruction", {"task": "captoin"})
    with pytest.raises(ValueError, match=r"modality: 'audio' is not one of image, video"):
        load_processor("blip_instruction", {"modality": "audio"})
    with pytest.raises(ValueError, match="max_words"):
        load_processor("blip_instruction", {"max_words": 0})


# The user's own data


def test_own_records_in_training_and_evaluation(root: Path) -> None:
    lines = [asked(0), asked(1, output=7, note="kept"), asked(2, output="x", candidates=["y", "x"], question_id="q")]
    train = build(root, lines, split="train")
    assert [(s["text_input"], s["text_output"]) for s in train] == [("say 0", "o0"), ("say 1", "7"), ("say 2", "x")]
    assert set(train[0]) == {"image", "text_input", "text_output", "instance_id", "prompt"}
    assert train[2]["image"].getpixel((0, 0))[0] == 2
    val = build(root, lines[2:])
    expected = {"text_input": "say 2", "question_id": "q", "candidates": ["y", "x"], "instance_id": "0"}
    expected |= {"prompt": "{}"}  # the instruction is complete
    assert {key: value for key, value in val[0].items() if key != "image"} == expected
    assert (val.annotation[0]["answers"], val.annotation[0]["label"]) == (["x"], 1)


def test_label_and_output_follow_from_each_other(root: Path) -> None:
    choices = ["no", "maybe", "no"]
    (by_label,) = build(root, [asked(output=None, candidates=choices, label=1)], split="train").annotation
    assert by_label["answers"] == ["maybe"]
    lines = [
        asked(candidates=choices, output="no", label=2),
        asked(candidates=choices, output=["perhaps", "maybe"]),
        asked(candidates=choices, output=None),
    ]
    dataset = build(root, lines)
    assert [record["label"] for record in dataset.annotation] == [2, 1, None]
    assert [record["answers"] for record in dataset.annotation] == [["no"], ["perhaps", "maybe"], []]


@pytest.mark.parametrize(
    ("form", "candidates"),
    [("text", ["red", "blue"]), ("letter_text", ["(a) red", "(b) blue"]), ("letter", ["(a)", "(b)"])],
)
def test_candidates_with_letters(root: Path, form: str, candidates: list[str]) -> None:
    templates = {"train": ["{question} {options}"]}
    line = {"image": "a.jpg", "question": "which?", "candidates": ["red", "blue"], "label": 1, "answer": "blue"}
    options = {"instructions": templates, "candidate_format": form}
    (train,), (val,) = (build(root, [line], split=split, **options) for split in ("train", "val"))
    assert (val["candidates"], train["text_output"]) == (candidates, candidates[1])
    assert train["text_input"] == val["text_input"] == "which? (a) red (b) blue"
    unknown = build(root, [{**line, "label": None, "answer": None}], **options)
    assert (unknown[0]["candidates"], unknown.annotation[0]["answers"]) == (candidates, [])
    with pytest.raises(ValueError, match="candidate_format: 'leter' is not one of text, letter_text, letter"):
        build(root, [line], candidate_format="leter")
    if form != "text":
        with pytest.raises(ValueError, match="line 1 at most 26 choices can be lettered, got 27"):
            build(root, [asked(candidates=["o0"] * 27)], candidate_format=form)


def test_evaluation_without_targets_is_allowed(root: Path) -> None:
    dataset = build(root, [asked(output=None), json.dumps({**asked(1, output=""), "question_id": None})])
    assert [record["answers"] for record in dataset.annotation] == [[], []]
    assert [record["question_id"] for record in dataset.annotation] == [0, 1]


def test_empty_cells_of_a_table_are_no_fields(root: Path) -> None:
    header, row = "image,video,instruction,output,conversations", 'a.jpg,,"say, 0",o0,'
    dataset = build(root, [header, row], split="train", file="own.csv")
    assert (dataset[0]["text_input"], dataset[0]["text_output"]) == ("say, 0", "o0")
    with pytest.raises(ValueError, match=r"own\.csv: line 2 has no field 'image' or 'video'"):
        build(root, [header, row.removeprefix("a.jpg")], file="own.csv")


@pytest.mark.parametrize(("file", "place"), [("own.jsonl", "line 4"), ("own.json", "record 1")])
def test_a_missing_field_is_named_with_its_line(root: Path, file: str, place: str) -> None:
    def write(record: dict[str, Any]) -> list[Any]:
        return ["", asked(), "  ", record] if file == "own.jsonl" else [json.dumps([asked(), record])]

    for split, record, message in (
        ("val", asked(image=None), "no field 'image' or 'video'"),
        ("val", asked(instruction=None), "no field 'instruction'"),
        ("train", asked(output=None), "no field 'output'"),
        ("train", asked(output=[]), "field 'output' is an empty list"),
        ("train", asked(output=""), "field 'output' is empty"),
        ("val", asked(output={"answer": "x"}), "field 'output' is .*expected a text"),
        ("val", asked(instruction=""), "field 'instruction' is empty"),
        ("val", asked(image=["a.jpg"]), "a list of 1 in its field 'image', the first record no list"),
        ("val", asked(image={"path": "a.jpg"}), "field 'image' is .*expected the path of a file"),
        ("val", asked(video="a.avi"), "'image', 'video'"),
        ("val", asked(conversations=[]), "'instruction', 'conversations'"),
    ):
        with pytest.raises(ValueError, match=rf"{re.escape(file)}: {place}.*{message}"):
            build(root, write(record), split=split, file=file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"candidates": []}, r"at least one.*got \[\]"),
        ({"candidates": "yes"}, "a list of texts in 'candidates'"),
        ({"candidates": ["yes", ""]}, "none empty"),
        ({"candidates": ["yes", 2]}, "a list of texts"),
        ({"candidates": ["a", "b"], "label": 2, "output": None}, "label 2.* 2 candidates"),
        ({"candidates": ["a", "b"], "label": -1, "output": None}, "label -1"),
        ({"candidates": ["a", "b"], "label": "a", "output": None}, "label 'a'"),
        ({"candidates": ["o1", "b"], "classes": [0]}, r"for each of its 2 candidates in 'classes'; got \[0\]"),
        ({"candidates": ["o1", "b"], "classes": 2}, "in 'classes'; got 2"),
        ({"candidates": ["o1", "b"], "classes": [0, "no"]}, r"in 'classes'; got \[0, 'no'\]"),
        ({"candidates": ["a", "b"], "output": "c"}, "'c' in its field 'output'.*'a', 'b'"),
        (
            {"candidates": ["a", "b"], "output": "b", "label": 0},
            "label 0, but 'b' in its field 'output' is candidate 1",
        ),
    ],
)
def test_choices_that_are_none_are_named(root: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"own\.jsonl: line 2 .*{message}"):
        build(root, [asked(candidates=["o0", "b"]), asked(1, **fields)])


def test_fields_that_cannot_be_collated_are_refused_at_loading(root: Path) -> None:
    with pytest.raises(ValueError, match=r"own\.jsonl: line 2 has a field 'video', the first record 'image'"):
        build(root, [asked(), asked(image=None, video="a.avi")], split="train")
    with pytest.raises(ValueError, match=r"own\.jsonl: line 2 and the first record differ in having 'candidates'"):
        build(root, [asked(candidates=["o0"]), asked(1)])
    assert len(build(root, [asked(candidates=["o0"]), asked(1)], split="train")) == 2


def test_lists_of_candidates_may_differ_in_a_batch(root: Path) -> None:
    lines = [asked(candidates=["o0", "b", "c"]), asked(1, candidates=["o1"])]
    dataset = build(root, lines, vis_processor={"eval": {"name": "blip_image_eval", "image_size": 4}})
    batch = dataset.collater([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 3, 4, 4)
    assert batch["candidates"] == [["o0", "b", "c"], ["o1"]]


def test_a_video_is_read_by_its_frames(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, num_frames: int, processor: Any, *, short_clips: str, part: None) -> torch.Tensor:
        assert path == root / "a.avi"
        return torch.zeros(3, num_frames, 2, 2)

    monkeypatch.setattr(visual, "read_frames", read)
    dataset = build(root, [asked(image=None, video="a.avi")], split="train", num_frames=5)
    assert dataset.collater([dataset[0]] * 2)["image"].shape == (2, 3, 5, 2, 2)


# Conversations


SAID = ["<image>\nWhat is it?", "a pot", "Its colour?", "red"]


@pytest.mark.parametrize(
    ("name", "keys", "speakers"),
    [
        ("conversations", ("from", "value"), ("human", "gpt")),
        ("messages", ("role", "content"), ("user", "assistant")),
        ("conversations", ("role", "content"), ("user", "assistant")),
    ],
)
def test_a_conversation_is_one_sample_a_question(
    root: Path, name: str, keys: tuple[str, str], speakers: tuple[str, str]
) -> None:
    turns = [{keys[0]: speakers[i % 2], keys[1]: text} for i, text in enumerate(SAID)]
    line = {"id": 5, "image": "b.jpg", "question_id": "q", name: turns}
    train = build(root, [asked(), line], split="train")
    assert [(s["text_input"], s["text_output"]) for s in train][1:] == [
        ("What is it?", "a pot"),
        ("What is it?\na pot\nIts colour?", "red"),
    ]
    assert [record["question_id"] for record in build(root, [asked(), line]).annotation] == [0, "q_0", "q_1"]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "pairs of a question and an answer in 'conversations', got 0 turns"),
        ([("human", "a"), ("gpt", "b"), ("human", "c")], "got 3 turns"),
        ("hello", "got 'hello'"),
        ([("gpt", "a"), ("human", "b")], r"\{from: human, value: a text\} in turn 0"),
        ([("human", "a"), ("human", "b")], r"\{from: gpt, value: a text\} in turn 1"),
        ([("human", "<image>"), ("gpt", "b")], "in turn 0"),
        ([("human", "a"), ("gpt", None)], "in turn 1"),
        ([("human", "a"), "b"], "in turn 1, got 'b'"),
    ],
)
def test_unequal_conversations_are_named(root: Path, turns: Any, message: str) -> None:
    if isinstance(turns, list):
        turns = [turn if isinstance(turn, str) else {"from": turn[0], "value": turn[1]} for turn in turns]
    with pytest.raises(ValueError, match=rf"own\.jsonl: line 3 .*{message}"):
        build(root, [asked(), "", {"image": "a.jpg", "conversations": turns}], split="train")


# Templates over records


def test_question_generation_is_the_same_records_with_other_templates(root: Path) -> None:
    line = {"image": "a.jpg", "question": "What is it? #1", "answer": ["a Pot"] * 3}
    cleaned = {"train": {"name": "blip_question"}}
    forth = build(root, [line], split="train", instructions="vqa", text_processor=cleaned)
    assert forth[0]["text_output"] == "a Pot"
    assert "what is it? 1" in forth[0]["text_input"]
    back = build(root, [line], split="train", instructions="vqg", text_processor=cleaned)
    assert back[0]["text_output"] == "what is it? 1"
    assert "a Pot" in back[0]["text_input"]


def test_templates_and_answers_are_drawn_by_their_share(root: Path) -> None:
    line = asked(output=["a", "a", "a", "b"])
    templates = {"output": "output", "train": ["x {instruction}", "y {instruction}"], "eval": "z {instruction}"}
    train = build(root, [line], split="train", instructions=templates)
    random.seed(0)
    drawn = Counter((sample["text_input"][0], sample["text_output"]) for sample in (train[0] for _ in range(800)))
    assert set(drawn) == {(x, a) for x in "xy" for a in "ab"}
    # 800 draws: (x, a) has probability 3/8, so 300, with a standard deviation of 13.7; (x, b) 100, of 9.4
    assert all(abs(drawn[x, "a"] - 300) < 55 and abs(drawn[x, "b"] - 100) < 38 for x in "xy")
    assert build(root, [line], instructions=templates)[0]["text_input"] == "z say 0"
    most = build(root, [line], split="train", instructions=templates, answer_choice="most_frequent")
    assert {most[0]["text_output"] for _ in range(20)} == {"a"}
    line = {"image": "a.jpg", "question": "q", "answer": ["c", "d", "d"]}
    fixed = build(root, [line], instructions="vqg")  # evaluation asks the same each time
    assert all("is: d. Question:" in fixed[0]["text_input"] for _ in range(20))
    with pytest.raises(ValueError, match="'most_frequnt' is not one of drawn, most_frequent"):
        build(root, [line], answer_choice="most_frequnt")


def test_fields_are_drawn_in_the_order_of_the_gaps(root: Path) -> None:
    fields = {name: [f"{name}{i}" for i in range(50)] for name in ("p", "q", "r", "s")}
    templates = {"output": "s", "train": ["{q} {r} {p}"]}
    dataset = build(root, [{"image": "a.jpg", **fields}], split="train", instructions=templates)
    random.seed(3)
    q, r, p, s = (random.choice(fields[name]) for name in "qrps")
    random.seed(3)
    sample = dataset[0]
    assert (sample["text_input"], sample["text_output"]) == (f"{q} {r} {p}", s)


def test_a_placeholder_without_a_field_is_refused_at_loading(root: Path) -> None:
    templates = {"train": ["{question}", "{question} {hint}"], "eval": "{question}"}
    lines = [{"image": "a.jpg", "question": "q", "answer": "a", "hint": ""}, {"image": "a.jpg", "question": "q"}]
    assert len(build(root, lines, instructions=templates)) == 2
    lines[1]["answer"] = "b"
    with pytest.raises(ValueError, match=r"line 2 has no field 'hint' for the template '\{question\} \{hint\}'"):
        build(root, lines, split="train", instructions=templates)
    many = {"image": "a.jpg", "question": "q", "answer": "x", "options": ["x"] * 27}
    with pytest.raises(ValueError, match="line 1 at most 26 choices"):
        build(root, [many], instructions="iconqa")


def test_a_reader_of_another_format_needs_no_lines(root: Path) -> None:
    options = InstructBuilder(instructions="caption").dataset_options("train") | {"reader": lambda files: records}
    options |= {"num_frames": 4, "answer_choice": "drawn", "candidate_format": "text"}
    records = [{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg"}]
    with pytest.raises(ValueError, match=r"some\.json: record 1 has no field 'caption'.*there: 'image'"):
        InstructDataset([root / "some.json"], root, split="train", **options)


# The page


def test_the_example_of_the_page_is_read(root: Path) -> None:
    section = DATA_PAGE.split("\n## Instruction data")[1].split("\n## ")[0]
    (lines,) = re.findall(r"```jsonl\n(.*?)```", section, re.DOTALL)
    own, templates = (
        yaml.safe_load(text)["datasets"]["instruct"] for text in re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    )
    (root / "train.jsonl").write_text(lines)
    own["build_info"]["annotations"] = {"train": {"storage": str(root / "train.jsonl")}}
    own["build_info"]["images"] = {"storage": str(root)}
    train = InstructBuilder(**own).build()["train"]
    learned = [sample["text_output"] for sample in train]
    assert learned in (["tulips", flower, "no", "a pot", "red"] for flower in ("daisy", "aster"))
    assert load_templates(templates["instructions"]).eval == "Question: {question} Answer:"
    for name in NAMES:
        assert f"`{name}`" in section


def test_the_packaged_dataset_needs_files() -> None:
    with pytest.raises(ValueError, match="annotations names no split"):
        load_dataset("instruct")
