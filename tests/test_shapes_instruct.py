"""`shapes` as instructions: true by another reading of their texts, balanced, in known words, the same every time."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lavis_lite.common.config.zoo import packaged_dataset
from lavis_lite.common.registry import registry
from lavis_lite.datasets.shapes.build import ensure_built
from lavis_lite.datasets.shapes.groups import GROUPS
from lavis_lite.datasets.shapes.instructions import as_plain_text, ensure_instructions
from lavis_lite.datasets.shapes.scene import Scene, SceneObject, ShapesConfig
from lavis_lite.datasets.shapes.tokenizer import FOLDER
from lavis_lite.datasets.templates import fill, load_templates

TEMPLATES = {name: packaged_dataset(f"shapes_instruct_{name}")["instructions"] for name in ("caption", *GROUPS)}
LLMS = FOLDER.parents[1] / "llms"
SIZES = {"num_train": 300, "num_val": 5, "num_test": 200}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "few": {"colors": 8, "shapes": ["circle", "cross", "triangle"], "max_objects": 2, "sizes": ["large"]},
    "many": {"min_objects": 2, "max_objects": 4, "shapes": 6, "sizes": ["small"]},
}
WORDS = ("circle", "cross", "diamond", "square", "star", "triangle")
SIDE = r"(?:to the )?(left of|right of|above|over|below|under)"


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`made(group, split)`: a config's records, each with its scene."""
    config = ShapesConfig(**SIZES, **CONFIGS[request.param])
    folder = ensure_built(config, tmp_path_factory.mktemp("shapes"))

    @cache
    def read(group: str, split: str = "train") -> list[tuple[dict[str, Any], Scene]]:
        scenes = json.loads((folder / f"scenes_{split}.json").read_text())
        records = json.loads(ensure_instructions(config, folder, group, split).read_text())
        return [(r, Scene.from_dict(scenes[str(int(Path(r["image"]).stem.split("_")[-1]))])) for r in records]

    return read


# A second reading of the texts: what they say, looked up in the scene's coordinates.


def fitting(scene: Scene, words: str) -> list[SceneObject]:
    """The objects that "large red circle", "red shapes" or "crosses" may mean."""
    said = words.split()
    return [
        t
        for t in scene.things
        if all(w in ("shape", "shapes", t.color, t.size, t.shape, f"{t.shape}s", f"{t.shape}es") for w in said)
    ]


def one(things: list[SceneObject]) -> SceneObject:
    (thing,) = things
    return thing


def beside(scene: Scene, relation: str, other: SceneObject) -> list[SceneObject]:
    """The objects on that side of another, by at least the margin."""
    ahead = {
        "left of": lambda t: other.x - t.x,
        "right of": lambda t: t.x - other.x,
        "above": lambda t: other.y - t.y,
        "over": lambda t: other.y - t.y,
        "below": lambda t: t.y - other.y,
        "under": lambda t: t.y - other.y,
    }
    return [t for t in scene.things if ahead[relation](t) >= scene.margin]


def claim(text: str, scene: Scene) -> bool | None:
    """Whether a statement holds; None for other texts."""
    if found := re.fullmatch(r"there (?:is|are) (no|exactly one|exactly two|exactly three|exactly four) (.+)", text):
        number = ["no", "exactly one", "exactly two", "exactly three", "exactly four"].index(found[1])
        return len(fitting(scene, found[2])) == number
    if found := re.fullmatch(r"there is an? (.+)", text):
        return bool(fitting(scene, found[1]))
    if found := re.fullmatch(rf"the (\w+ \w+) is {SIDE} the (\w+ \w+)", text):
        return one(fitting(scene, found[1])) in beside(scene, found[2], one(fitting(scene, found[3])))
    if found := re.fullmatch(r"the (\w+) is (\w+)", text):
        return one(fitting(scene, found[1])).color == found[2]
    return None


def meant(text: str, scene: Scene) -> tuple[SceneObject, str] | None:
    """The one object that a question of a property is about, and the property; None for other texts."""
    if found := re.fullmatch(rf"what color is the shape {SIDE} the (\w+ \w+)\?", text):
        return one(beside(scene, found[1], one(fitting(scene, found[2])))), "color"
    if found := re.fullmatch(rf"what is {SIDE} the (\w+ \w+)\?", text):
        return one(beside(scene, found[1], one(fitting(scene, found[2])))), "shape"
    if found := re.fullmatch(r"what color is the (.+)\?", text):
        return one(fitting(scene, found[1])), "color"
    if found := re.fullmatch(r"what is the (\w+ shape)\?", text):
        return one(fitting(scene, found[1])), "shape"
    if found := re.fullmatch(r"is there an? (.+)\?", text):
        things = fitting(scene, found[1])
        return (things[0], "exists") if len(things) == 1 else None
    return None


def answered(text: str, scene: Scene, focus: SceneObject | None = None) -> str:
    """The answer to a question; `focus` is what an earlier round was about."""
    if found := re.fullmatch(r"how many (.+) are there\?", text):
        return str(len(fitting(scene, found[1])))
    if found := re.fullmatch(r"what is its (\w+)\?", text):
        return str(getattr(focus, found[1]))
    if found := re.fullmatch(r"is the (\w+ \w+|shape) (left|above) or (right of|below) the (\w+ \w+)\?", text):
        asked = focus if found[1] == "shape" else one(fitting(scene, found[1]))
        first = "left of" if found[2] == "left" else "above"
        other = one(fitting(scene, found[4]))
        assert (asked in beside(scene, first, other)) != (asked in beside(scene, found[3], other))
        return found[2] if asked in beside(scene, first, other) else found[3].split()[0]
    if found := re.fullmatch(r"is (there|the (?:\w+ )?(?:" + "|".join(WORDS) + r")) (.+)\?", text):
        return "yes" if claim(f"{found[1]} is {found[2]}", scene) else "no"
    about = meant(text, scene)
    assert about is not None, text
    return str(getattr(*about))


def check(record: dict[str, Any], scene: Scene) -> None:
    """The record's answer is the one that the scene gives, and stands at its label."""
    assert record["candidates"][record["label"]] == record["answer"]
    assert len(set(record["candidates"])) == len(record["candidates"]) > 1
    focus = None
    if "statement" in record:
        assert record["answer"] == {True: "true", False: "false"}[claim(record["statement"], scene)], record  # type: ignore[index]
    elif "options" in record:
        assert record["options"] == record["candidates"]
        if record["question"] == "what is in the picture?":
            right = [option for option in record["options"] if fitting(scene, option)]
        else:
            thing = meant(record["question"], scene)[0]  # type: ignore[index]
            right = [option for option in record["options"] if fitting(scene, option) == [thing]]
        assert right == [record["answer"]], record
    else:
        rounds = re.findall(r"([^?]+\?) (\w+)\. ?", record.get("history", ""))
        assert " ".join(f"{q} {a}." for q, a in rounds) == record.get("history", "")
        for question, said in rounds:
            assert answered(question, scene, focus) == said, record
            focus = focus or meant(question, scene)[0]  # type: ignore[index]
        assert answered(record["question"], scene, focus) == record["answer"], record


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_the_second_reading_agrees(made: Callable[..., Any], group: str) -> None:
    for split in ("train", "test"):
        pairs = made(group, split)
        for record, scene in pairs:
            check(record, scene)
        assert len({record["question_id"] for record, _ in pairs}) == len(pairs)
    images = Counter(record["image"] for record, _ in made(group))
    assert max(images.values()) == 2
    assert len(images) > 0.6 * SIZES["num_train"]


@pytest.mark.slow
def test_the_second_reading_finds_what_is_false(made: Callable[..., Any]) -> None:
    """Else it would prove nothing: instructions of one scene held against another."""
    for group in GROUPS:
        pairs = made(group)
        wrong = 0
        for (record, _), (_, scene) in zip(pairs, pairs[7:], strict=False):
            try:
                check(record, scene)
            except (AssertionError, ValueError, TypeError):
                wrong += 1
        assert wrong > 0.4 * len(pairs), group


# Balance


def plain(text: str) -> str:
    """A text with its colours, shapes, sizes and sides blotted out."""
    text = re.sub(rf"\b(?:{SIDE}|small|medium|large)\b", "_", text)
    text = re.sub(r"\b(red|green|blue|yellow|purple|orange|black|brown)\b", "_", text.replace("an ", "a "))
    return re.sub(rf"\b(?:{'|'.join(WORDS)})(?:s|es)?\b", "_", text)


@pytest.mark.parametrize("group", GROUPS)
def test_answers_are_balanced_for_each_kind_of_question(made: Callable[..., Any], group: str) -> None:
    kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record, _ in made(group):
        text = plain(record.get("question") or record["statement"])
        is_choice = group == "options"
        kinds[f"{text} {len(record['candidates'])}"][str(record["label"]) if is_choice else record["answer"]] += 1
    large = {kind: counts for kind, counts in kinds.items() if sum(counts.values()) >= 40}
    assert sum(counts.total() for counts in large.values()) > 0.8 * len(made(group))
    for kind, counts in large.items():
        assert max(counts.values()) <= 1.15 * min(counts.values()) + 4, (kind, counts)
        assert len(counts) >= 2


@pytest.mark.parametrize("group", GROUPS)
def test_the_text_alone_is_worth_no_more_than_chance(made: Callable[..., Any], group: str) -> None:
    """The best answer to each text of the training split, by colour, shape, and place of options, on the test split."""

    def cues(record: dict[str, Any]) -> list[list[str]]:
        """For each candidate what might betray it."""
        words = [option.split() for option in record["candidates"]]
        text = record.get("question") or record["statement"]
        if group != "options":
            return [[f"{text} {c}", f"{plain(text)} {c}"] for c in record["candidates"]]
        colors, shapes = (Counter(w[i] for w in words) for i in (0, 1))
        return [[f"{len(words)} {colors[c]} {shapes[s]} {plain(text)}", f"{c in text} {s in text}"] for c, s in words]

    right, seen = Counter[str](), Counter[str]()
    given = defaultdict(set)
    for record, _ in made(group):
        given[plain(record.get("question") or record["statement"])].add(record["answer"])
        for index, found in enumerate(cues(record)):
            seen.update(found)
            right.update(found if index == record["label"] else [])
    gain = 0.0
    for record, _ in made(group, "test"):
        scores = [sum((right[cue] + 0.1) / (seen[cue] + 1) for cue in found) for found in cues(record)]
        best = [index for index, score in enumerate(scores) if score == max(scores)]
        num_real = min(len(scores), len(given[plain(record.get("question") or record["statement"])]))
        gain += (record["label"] in best) / len(best) - 1 / num_real
    assert gain / len(made(group, "test")) < 0.1


# Words


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "tiny_opt", "tiny_t5", "tiny_vicuna"])
def test_every_word_is_one_token(made: Callable[..., Any], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(FOLDER if name == "shapes" else LLMS / name))
    texts = {text for group in TEMPLATES for text in (load_templates(TEMPLATES[group]).eval, "the answer")}
    texts |= {text for group in TEMPLATES for text in load_templates(TEMPLATES[group]).train}
    texts = {re.sub(r"\{\w+\}", " ", text) for text in texts}
    for group in GROUPS:
        for record, _ in made(group):
            texts |= {as_plain_text({**record, "options": None})[0], *record["candidates"]}
    words = {word for text in texts for word in re.sub(r"[?:.]", " ", text).split()}
    assert len(words) > 50
    for word in words | {"(", ")", ".", "?", ":"}:
        tokens = [t for t in tokenizer.tokenize(word) if t != "\u2581"]
        assert len(tokens) == 1, word
        assert tokenizer.convert_tokens_to_ids(tokens[0]) != tokenizer.unk_token_id, word


# Files and datasets


def small(root: Path, monkeypatch: pytest.MonkeyPatch, group: str, **fields: Any) -> Any:
    """A group's builder with the packaged YAML, and few scenes."""
    monkeypatch.setenv("LAVIS_LITE_DATA", str(root))
    name = f"shapes_instruct_{group}"
    section = packaged_dataset(name)
    return registry.get_builder_class(name)(**{**section, "num_train": 30, "num_val": 8, "num_test": 8, **fields})


@pytest.mark.parametrize("group", TEMPLATES)
def test_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    datasets = small(tmp_path, monkeypatch, group).build(["train", "val"])
    train, val = datasets["train"], datasets["val"]
    sample = train[0]
    assert sample.keys() == {"image", "text_input", "prompt", "text_output", "instance_id"}
    assert sample["image"].shape == (3, 48, 48)
    assert sample["image"].dtype == torch.float32
    assert sample["text_output"] in train.annotation[0]["answers"]
    templates = load_templates(TEMPLATES[group])
    assert len(set(templates.train)) >= 7
    for template in templates.train:
        assert all("{" not in fill(template, train.values(record)) for record in train.annotation)
    sample = val[1]
    assert ("candidates" in sample) == (group != "caption")
    assert sample.keys() - {"candidates"} == {"image", "text_input", "prompt", "question_id", "instance_id"}
    if group in GROUPS:
        assert sample["candidates"][val.annotation[1]["label"]] == val.annotation[1]["answers"][0]
        # What the tiny language models learn to answer is what is asked in evaluation.
        said, answer = as_plain_text(val.annotation[1])
        assert sample["text_input"] == f"Question: {said} Short answer:"
        assert [answer] == val.annotation[1]["answers"]


def test_a_folder_without_instructions_is_completed_and_nothing_else_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path, monkeypatch, "caption").build()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    builder = small(tmp_path, monkeypatch, "dialogue")
    (first,) = builder.build(["train"])["train"].annotation_paths
    text = first.read_bytes()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*before, first}
    assert all(path.read_bytes() == content for path, content in before.items())
    os.utime(first, (1, 1))
    builder.build(["train"])
    assert first.stat().st_mtime == 1  # a second build writes nothing
    first.unlink()
    builder.build(["train"])
    assert first.read_bytes() == text  # the same bytes
    other = small(tmp_path, monkeypatch, "dialogue", seed=1)
    assert other.build(["train"])["train"].annotation_paths[0].read_bytes() != text


def test_a_group_that_the_scenes_do_not_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no scene of val allows .* the group relation; raise max_objects"):
        small(tmp_path, monkeypatch, "relation", max_objects=1).build(["val"])
    with pytest.raises(ValueError, match="takes no build_info"):
        small(tmp_path, monkeypatch, "color", build_info={"images": {}})


def test_other_templates_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = small(tmp_path, monkeypatch, "statement", instructions={"train": ["{statement}"], "eval": "x"})
    train = builder.build(["train"])["train"]
    assert train[0]["text_input"] == train.annotation[0]["statement"]


def test_records_as_text_alone() -> None:
    assert as_plain_text({"caption": ["a", "b", "b"]}) == ("b", None)
    assert as_plain_text({"question": "what?", "answer": ["red", "blue", "blue"]}) == ("what?", "blue")
    record = {"history": "is there a circle? yes.", "question": "what is its color?", "answer": "red"}
    assert as_plain_text(record) == ("is there a circle? yes. what is its color?", "red")
    record = {"question": "what is it?", "options": ["red cross", "blue star"], "answer": "blue star"}
    assert as_plain_text(record) == ("what is it? (a) red cross (b) blue star", "blue star")
    assert as_plain_text({"statement": "there are no stars", "answer": "true"}) == (
        "true or false? there are no stars",
        "true",
    )
