"""The generated dataset: its truth, its balance, its formats, its reproducibility."""

import errno
import hashlib
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lavis_lite.common.errors import MissingFileError, WriteError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.shapes.build import ensure_built
from lavis_lite.datasets.shapes.builders import ShapesBuilder
from lavis_lite.datasets.shapes.language import plural
from lavis_lite.datasets.shapes.render import RGB, render
from lavis_lite.datasets.shapes.scene import COLORS, SHAPES, SPLITS, Scene, SceneMaker, SceneObject, ShapesConfig
from lavis_lite.datasets.shapes.tokenizer import FOLDER, train_tokenizer
from lavis_lite.datasets.shapes.truth import is_true, parse_caption, true_rate

SMALL = {"num_train": 300, "num_val": 120, "num_test": 120, "gallery_size": 60}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def folder(data_root: Path) -> Path:
    return ensure_built(ShapesConfig(**SMALL), data_root / "shapes")


@pytest.fixture
def data(data_root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVIS_LITE_DATA", str(data_root))
    return data_root


def notes(folder: Path, name: str) -> Any:
    return json.loads((folder / "annotations" / name).read_text())


def scenes(folder: Path, split: str) -> dict[str, Scene]:
    content = json.loads((folder / f"scenes_{split}.json").read_text())
    return {key: Scene.from_dict(value) for key, value in content.items()}


def scene_id(image: str) -> str:
    return str(int(Path(image).stem.split("_")[-1]))


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def thing(shape: str, color: str, size: str, x: int, y: int) -> SceneObject:
    return SceneObject(shape=shape, color=color, size=size, x=x, y=y, diameter=18 if size == "large" else 10)


PAIR = Scene(
    things=(thing("circle", "red", "small", 10, 10), thing("square", "blue", "large", 35, 11)),
    background=(230, 230, 230),
    margin=8,
)


# Truth


@pytest.mark.parametrize(
    "text",
    [
        "a small red circle left of a large blue square",
        "the blue square is to the right of the red circle",
        "there are two shapes a blue square and a red circle",
        "a red circle and a blue square on a plain background",
        "A picture of a red circle.",
        "the circle is red",
        "a blue square that is large",
        "there is a shape that is small",
        "one red shape",
        "a red circle left of a blue square and two shapes",
    ],
)
def test_true_captions(text: str) -> None:
    assert is_true(text, PAIR)
    assert is_true(text, json.loads(json.dumps(PAIR.to_dict())))


def test_captions_without_relations_list_and_count(tmp_path: Path) -> None:
    """The descriptions for retrieval say where things are all the same."""
    config = ShapesConfig(num_train=40, num_val=2, num_test=2, gallery_size=2, min_objects=2, relations=False)
    made = ensure_built(config, tmp_path)
    places = re.compile(r"\b(left|right|above|over|below|under)\b")
    assert not any(places.search(record["caption"]) for record in notes(made, "caption_train.json"))
    assert all(places.search(record["caption"]) for record in notes(made, "retrieval_train.json"))


@pytest.mark.parametrize(
    "text",
    [
        "a red circle right of a blue square",
        "a red circle above a blue square",  # one pixel: neither above nor below
        "a red circle below a blue square",
        "a red square",
        "a large red circle",
        "the circle is blue",
        "a red circle and a red circle",
        "a red circle and a green triangle",
        "there are three shapes a red circle and a blue square",
        "one shape a red circle",
        "a red circle on its own",
        "two red shapes",
        "there are two circles",
        "a red circle left of a red circle",
        "a blue square left of a red circle and a blue square",
        # Says nothing, or can't be read
        "",
        "two shapes",
        "there are two shapes",
        "a shape",
        "a shape left of a shape",
        "a red circle left of",
        "a red",
        "red circle blue square",
        "a red circle a blue square",
        "a red circle and",
        "a red circle is red blue",
        "a dog on a bench",
        "a red circle left of a blue square square",
    ],
)
def test_false_captions(text: str) -> None:
    assert not is_true(text, PAIR)


def test_parse_gives_none_for_other_language_and_claims_for_its_own() -> None:
    assert parse_caption("a man rides a horse") is None
    claims = parse_caption("a red circle to the left of a square")
    assert claims is not None
    assert [type(claim).__name__ for claim in claims] == ["Exists", "Exists", "Relation"]


def test_true_rate_takes_any_kind_of_id() -> None:
    truth = {"1": PAIR, "2": PAIR.to_dict()}
    captions = {1: "a red circle", "2": "a green circle"}
    assert true_rate(captions, truth) == 50.0
    with pytest.raises(KeyError, match="3"):
        true_rate({3: "a red circle"}, truth)
    with pytest.raises(ValueError, match="at least one"):
        true_rate({}, truth)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["caption", "retrieval"])
def test_every_caption_is_true_of_its_scene_and_mostly_false_of_others(folder: Path, kind: str, split: str) -> None:
    truth = scenes(folder, split)
    ids = list(truth)
    texts = []
    for record in notes(folder, f"{kind}_{split}.json"):
        captions = record["caption"] if isinstance(record["caption"], list) else [record["caption"]]
        texts += [(text, scene_id(record["image"])) for text in captions]
    assert all(is_true(text, truth[key]) for text, key in texts)
    others = [(text, ids[(ids.index(key) + 17) % len(ids)]) for text, key in texts]
    assert sum(is_true(text, truth[key]) for text, key in others) < 0.1 * len(others)
    assert len({text for text, _ in texts}) > 0.5 * len(texts)


# Scenes and pictures


def test_splits_share_no_scene_and_scenes_are_unambiguous(folder: Path) -> None:
    config = ShapesConfig(**SMALL)
    maker = SceneMaker(config)
    keys = {split: {maker.key(list(s.things)) for s in scenes(folder, split).values()} for split in SPLITS}
    assert not keys["train"] & keys["val"]
    assert not keys["train"] & keys["test"]
    assert not keys["val"] & keys["test"]
    counts: Counter[int] = Counter()
    for scene in scenes(folder, "train").values():
        counts[len(scene.things)] += 1
        assert len({(t.color, t.shape) for t in scene.things}) == len(scene.things)
        for i, a in enumerate(scene.things):
            assert min(a.x, a.y) >= a.diameter / 2
            assert max(a.x, a.y) <= 48 - a.diameter / 2
            for b in scene.things[:i]:
                assert scene.relations(a, b)
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > (a.diameter + b.diameter) / 2
    assert set(counts) == {1, 2, 3}


@pytest.mark.parametrize("size", [32, 48, 96])
def test_pictures_show_each_object_in_its_colour(size: int) -> None:
    config = ShapesConfig(image_size=size, shapes=len(SHAPES), colors=len(COLORS))
    maker = SceneMaker(config)
    for number in range(40):
        scene = maker.make("train", random.Random(number))
        pixels = np.asarray(render(scene, size)).astype(int)
        assert pixels.shape == (size, size, 3)
        for item in scene.things:
            assert abs(pixels[item.y, item.x] - RGB[item.color]).max() <= 2, item
        assert (pixels[0, 0] == scene.background).all()


def test_jpeg_files_keep_the_colours(folder: Path) -> None:
    truth = scenes(folder, "test")
    for record in notes(folder, "caption_test.json")[:30]:
        pixels = np.asarray(Image.open(folder / "images" / record["image"])).astype(int)
        for item in truth[scene_id(record["image"])].things:
            assert abs(pixels[item.y, item.x] - RGB[item.color]).max() < 25


# Questions, statements, pairs


def answer_by_hand(question: str, scene: Scene) -> str | None:
    """An independent answer to the plainest kinds of question; None for the others."""
    words = question.lower().rstrip("?").split()
    if words[:2] == ["how", "many"]:
        kinds = words[2:-2]
        fits = [t for t in scene.things if all(k in (t.color, plural(t.shape), "shapes") for k in kinds)]
        return str(len(fits))
    if words[:2] == ["is", "there"]:
        return "yes" if any((t.color, t.shape) == tuple(words[3:]) for t in scene.things) else "no"
    found = re.fullmatch(
        r"is the (\w+) (\w+) (?:to the )?(left|right|above|over|below|under)(?: of)? the (\w+) (\w+)", " ".join(words)
    )
    if found:
        a, b = (next(t for t in scene.things if (t.color, t.shape) == found.group(i, i + 1)) for i in (1, 4))
        truth = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
        return "yes" if truth[{"over": "above", "under": "below"}.get(found[3], found[3])] else "no"
    found = re.fullmatch(r"what color is the (?:(\w+) )?(circle|square|triangle|cross)", " ".join(words))
    if found:
        (one,) = [t for t in scene.things if t.shape == found[2] and found[1] in (None, t.size)]
        return one.color
    return None


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_and_balanced(folder: Path, split: str) -> None:
    truth = scenes(folder, split)
    if split == "train":
        asked = [(r["question"], r["answer"], scene_id(r["image"])) for r in notes(folder, "vqa_train.json")]
    else:
        texts = notes(folder, f"v2_OpenEnded_shapes_{split}_questions.json")["questions"]
        truths = notes(folder, f"v2_shapes_{split}_annotations.json")["annotations"]
        assert [q["question_id"] for q in texts] == [t["question_id"] for t in truths]
        asked = [
            (q["question"], [a["answer"] for a in t["answers"]], str(q["image_id"]))
            for q, t in zip(texts, truths, strict=True)
        ]
    allowed = set(notes(folder, "answer_list.json"))
    checked = 0
    yes_no: Counter[str] = Counter()
    noisy = 0
    for question, answers, key in asked:
        assert len(answers) == 10
        assert set(answers) <= allowed
        (answer, count), *_ = Counter(answers).most_common()
        assert count >= 8
        noisy += count < 10
        yes_no[answer] += 1
        expected = answer_by_hand(question, truth[key])
        if expected is not None:
            checked += 1
            assert answer == expected, (question, truth[key])
    assert checked > 0.6 * len(asked)
    assert 0.1 < noisy / len(asked) < 0.6
    assert 0.4 < yes_no["yes"] / (yes_no["yes"] + yes_no["no"]) < 0.6


def test_statements_are_balanced_and_right(folder: Path) -> None:
    truth = scenes(folder, "train")
    records = notes(folder, "nlvr_train.json")
    assert Counter(record["label"] for record in records) == {"True": 150, "False": 150}
    checked = 0
    for record in records:
        assert record["images"][0] != record["images"][1]
        assert not re.search(r"(left|right) of", record["sentence"])
        left, right = (truth[scene_id(image)].things for image in record["images"])
        side = re.fullmatch(r"there is an? (.+) in the (left|right) image", record["sentence"])
        if side:
            checked += 1
            words = side[1].split()
            fits = [
                all(w in (t.color, t.shape, "shape") for w in words) for t in (left if side[2] == "left" else right)
            ]
            assert str(any(fits)) == record["label"], record
        if "more shapes" in record["sentence"]:
            checked += 1
            more = len(left) > len(right) if record["sentence"].startswith("the left") else len(right) > len(left)
            assert str(more) == record["label"], record
    assert checked > 80


def test_noisy_pairs_are_wrong_and_the_others_true(folder: Path) -> None:
    truth = scenes(folder, "train")
    records = notes(folder, "pairs_train.json")
    for record in records:
        assert is_true(record["caption"], truth[scene_id(record["image"])]) != record["is_noisy"]
    assert 0.2 < sum(record["is_noisy"] for record in records) / len(records) < 0.4


def test_gallery_texts_mean_one_image_each(tmp_path: Path) -> None:
    config = ShapesConfig(num_train=1, num_val=1, num_test=400, gallery_size=150, max_objects=2, colors=4, shapes=3)
    folder = ensure_built(config, tmp_path)
    truth = scenes(folder, "test")
    records = notes(folder, "retrieval_test.json")
    assert len(records) == 150
    kinds = {tuple(sorted((t.size, t.color, t.shape) for t in truth[scene_id(r["image"])].things)) for r in records}
    assert len(kinds) == 150


# Building


def test_builds_are_byte_identical_and_keyed_by_config(folder: Path, tmp_path: Path) -> None:
    again = ensure_built(ShapesConfig(**SMALL), tmp_path)
    assert again.name == folder.name
    assert digest(again) == digest(folder)
    other = ensure_built(ShapesConfig(num_train=5, num_val=5, num_test=5, seed=1), tmp_path)
    assert other.name != folder.name
    named = ShapesConfig(**SMALL, shapes=list(SHAPES[:4]), colors=list(COLORS[:6]), sizes=["small", "large"])
    assert ensure_built(named, tmp_path) == again
    # A scene depends on its own number only, not on how many there are.
    few = ensure_built(ShapesConfig(num_train=5, num_val=5, num_test=5), tmp_path)
    assert list(scenes(few, "val").values()) == list(scenes(folder, "val").values())[:5]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    config = ShapesConfig(num_train=3, num_val=3, num_test=3)
    with monkeypatch.context() as patch:
        patch.setattr("lavis_lite.datasets.shapes.build.save_jpeg", stop)
        with pytest.raises(KeyboardInterrupt):
            ensure_built(config, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (ensure_built(config, tmp_path) / "scenes_test.json").is_file()


@pytest.mark.parametrize(
    "gone", ["images/val/SHAPES_val_000001000001.jpg", "images/train", "annotations", "scenes_test.json"]
)
def test_a_folder_that_lacks_files_is_to_be_deleted(tmp_path: Path, gone: str) -> None:
    config = ShapesConfig(num_train=3, num_val=3, num_test=3)
    folder = ensure_built(config, tmp_path)
    path = folder / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(MissingFileError, match=f"lacks .*{path}.*: delete the folder {folder}, and it is generated"):
        ensure_built(config, tmp_path)
    shutil.rmtree(folder)
    assert ensure_built(config, tmp_path) == folder


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lavis_lite.datasets.shapes.build.save_jpeg", full)
    with pytest.raises(WriteError, match=r"shapes could not be written to .*No space left on device.*LAVIS_LITE_DATA"):
        ensure_built(ShapesConfig(num_train=3, num_val=3, num_test=3), tmp_path / "shapes")
    assert list((tmp_path / "shapes").iterdir()) == []
    builder = registry.get_builder_class("shapes_instruct_color")(num_train=9, num_val=3, num_test=3)
    monkeypatch.undo()
    monkeypatch.setenv("LAVIS_LITE_DATA", str(tmp_path))
    builder.folder()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(WriteError, match="instruct_color_train"):
        builder.annotation_paths("train")


def test_losing_a_race_takes_the_winners_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lavis_lite.datasets.shapes import build as shapes_build

    config = ShapesConfig(num_train=3, num_val=3, num_test=3)
    real = shapes_build.build

    def build(config: ShapesConfig, aside: Path) -> None:
        real(config, aside)
        monkeypatch.setattr(shapes_build, "build", real)
        ensure_built(config, tmp_path)

    monkeypatch.setattr(shapes_build, "build", build)
    folder = ensure_built(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_objects": 3, "max_objects": 2}, "min_objects"),
        ({"image_size": 8}, "image_size"),
        ({"colors": ["red", "pink"]}, "pink"),
        ({"shapes": 99}, "shapes"),
        ({"noise_share": 1.5}, "noise_share"),
        ({"num_test": 0}, "num_test"),
        ({"build_info": {"images": {}}}, "build_info"),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesBuilder(**fields)


def test_builders_give_the_datasets(data: Path) -> None:
    caption = ShapesBuilder(kind="caption", **SMALL).build()
    assert {split: len(dataset) for split, dataset in caption.items()} == {"train": 1500, "val": 120, "test": 120}
    test = caption["test"]
    references = test.references()
    assert all(len(texts) == 5 for texts in references.values())
    assert test.extra_metrics({key: texts[0] for key, texts in references.items()}) == {"true_rate": 100.0}
    first, *rest = references
    assert test.extra_metrics({key: "nonsense" for key in rest} | {first: references[first][0]})["true_rate"] < 1
    retrieval = ShapesBuilder(kind="retrieval", **SMALL).build(["test"])["test"]
    assert (len(retrieval), len(retrieval.text)) == (60, 300)
    vqa = ShapesBuilder(kind="vqa", **SMALL).build()
    assert vqa["val"].answer_list == vqa["train"].answer_list
    assert len(vqa["val"].annotation[0]["answers"]) == 10
    assert vqa["val"].annotation[0]["answer_type"] in ("yes/no", "number", "other")
    assert len({record["question_id"] for record in vqa["test"].annotation}) == len(vqa["test"])
    assert sum(vqa["train"][0]["weight"]) == pytest.approx(1)
    assert len(ShapesBuilder(kind="nlvr", **SMALL).build(["val"])["val"]) == 120
    assert "is_noisy" in ShapesBuilder(kind="pairs", **SMALL).build(["train"])["train"].annotation[0]
    assert len(list((data / "shapes").iterdir())) == 1  # one folder serves all


# Tokenizer


def test_shipped_tokenizer_is_what_training_gives(tmp_path: Path) -> None:
    train_tokenizer(tmp_path)
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads((FOLDER / "tokenizer.json").read_text())


def test_every_word_of_the_data_is_one_token(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(FOLDER))
    texts = set(notes(folder, "answer_list.json"))
    for split in SPLITS:
        for kind in ("caption", "retrieval", "pairs"):
            for record in notes(folder, f"{kind}_{split}.json"):
                texts |= set(record["caption"] if isinstance(record["caption"], list) else [record["caption"]])
        texts |= {record["sentence"] for record in notes(folder, f"nlvr_{split}.json")}
        questions = "vqa_train.json" if split == "train" else f"vqa_{split}_eval.json"
        texts |= {record["question"].replace("?", " ?") for record in notes(folder, questions)}
    words = {word.lower() for text in texts for word in text.split()} | {"photo", "picture", *COLORS, *SHAPES}
    assert [word for word in words if tokenizer.tokenize(word) != [word]] == []
    ids = tokenizer("A zebra, 42!").input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a zebra, 42!"
    assert tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids) == ["[CLS]", "a", "[SEP]"]
