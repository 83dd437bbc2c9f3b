"""Pictures that a system's packages install: records, splits, layouts and errors, on small packages made here."""

import gzip
import json
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from lavis_lite.cli.data import command
from lavis_lite.common.config.zoo import packaged_dataset
from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.packaged import fashion_mnist, openclipart, openmoji
from lavis_lite.datasets.packaged.store import split_of_keys


def built(name: str, **keys: Any) -> dict[str, Any]:
    return registry.get_builder_class(name)(**packaged_dataset(name), **keys).build()


@pytest.fixture(autouse=True)
def _own_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LAVIS_LITE_DATA", str(tmp_path / "data"))


@pytest.fixture
def emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of eight emoji, of which one has a skin tone; transparent PNG files."""
    monkeypatch.setattr(openmoji, "NUM_TEST", 2)
    monkeypatch.setattr(openmoji, "NUM_VAL", 2)
    root, entries = tmp_path / "package", []
    for number in range(9):
        base = "1F600" if number == 8 else ""
        tone, hexcode = (1, "1F600-1F3FB") if base else ("", f"1F60{number}")
        own = {"hexcode": hexcode, "annotation": f"face {number}", "tags": "smile, smile, eye", "openmoji_tags": "fun"}
        own |= {"group": f"group-{number % 2}", "subgroups": "x", "skintone": tone, "skintone_base_hexcode": base}
        entries.append(own)
        for drawing in openmoji.DRAWINGS:
            folder = root / drawing / "72x72"
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGBA", (72, 72), (0, 0, 0, 0))
            ImageDraw.Draw(picture).rectangle((20, 20, 50, 50), fill=(20 * number, 0, 0, 255))
            picture.save(folder / f"{hexcode}.png")
    (root / "data").mkdir()
    (root / openmoji.INDEX).write_text(json.dumps(entries))
    return root


def test_drawings_and_skin_tones_of_an_emoji_stay_together(emoji: Path):
    plain = built("openmoji", package_root=str(emoji), drawing_size=48)
    assert {split: len(dataset) for split, dataset in plain.items()} == {"train": 8, "val": 4, "test": 4}
    toned = built("openmoji", package_root=str(emoji), drawing_size=48, skin_tones=True)
    assert sum(map(len, toned.values())) == 18
    owners: dict[str, set[str]] = {}
    for split, dataset in toned.items():
        for record in dataset.annotation:
            owners.setdefault(record["emoji_id"], set()).add(split)
            assert record["tags"] == ["smile", "eye", "fun"]
    assert len(owners) == 8
    assert all(len(splits) == 1 for splits in owners.values())
    image = Image.open(plain["train"].vis_root / plain["train"].annotation[0]["image"])
    assert image.size == (48, 48)
    assert image.getpixel((1, 1)) == (255, 255, 255)  # transparent there


def test_groups_of_emoji_are_classes(emoji: Path):
    dataset = built("openmoji_classification", package_root=str(emoji))["train"]
    assert dataset.classes == ["group-0", "group-1"]
    for record, label in zip(dataset.annotation, dataset.labels, strict=True):
        assert dataset.classes[label] == record["group"]


def test_the_split_of_a_key_depends_on_the_key_alone():
    keys = [f"{number:x}" for number in range(40)]
    splits = split_of_keys(keys, num_test=10, num_val=5)
    assert splits == split_of_keys(reversed(keys), num_test=10, num_val=5)
    assert [list(splits.values()).count(name) for name in ("test", "val", "train")] == [10, 5, 25]


def test_svg_files_are_rendered(tmp_path: Path):
    path = tmp_path / "a.svg"
    path.write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="1" height="2"/></svg>')
    picture = openmoji.on_white(path, 16)
    assert [picture.getpixel(place) for place in ((2, 8), (13, 8))] == [(0, 0, 0), (255, 255, 255)]


SVG = """<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:cc="http://web.resource.org/cc/"
 xmlns:dc="http://purl.org/dc/elements/1.1/"><cc:Work><dc:title>{}</dc:title><dc:description> two
 lines</dc:description><dc:subject><rdf:Bag><rdf:li>a</rdf:li><rdf:li>b</rdf:li><rdf:li>a</rdf:li></rdf:Bag></dc:subject>
<dc:publisher><cc:Agent><dc:title>Someone</dc:title></cc:Agent></dc:publisher></cc:Work></rdf:RDF></metadata><g/></svg>"""


@pytest.fixture
def clipart(tmp_path: Path) -> Path:
    """Forty different pictures, eight copies of one of them, one without title, one without SVG file, one broken."""
    root, draw = tmp_path / "openclipart", np.random.default_rng(0)
    (root / "png" / "a").mkdir(parents=True)
    (root / "svg" / "a").mkdir(parents=True)
    drawn = draw.integers(0, 256, (51, 34, 34), dtype=np.uint8)
    drawn[41:49] = drawn[40]
    for number in range(51):
        Image.fromarray(drawn[number]).save(root / "png" / "a" / f"{number}.png")
        title = "" if number == 49 else f"title {number}"
        if number != 50:
            (root / "svg" / "a" / f"{number}.svg").write_text(SVG.format(title))
    (root / "png" / "a" / "51.png").write_bytes(b"nonsense")
    (root / "svg" / "a" / "51.svg").write_text(SVG.format("broken"))
    return root


@pytest.mark.parametrize(
    ("title", "about", "expected"),
    [
        ("Red Apples", {"folder": "food/fruit", "keywords": ["apple"]}, 1),
        ("fruit bowl", {"folder": "food/fruit"}, 1),
        ("Lemon SVG theme", {"folder": "computer/icons", "keywords": ["folder"], "description": "a folder"}, 0),
        ("a b", {"folder": "a/b"}, 0),  # words have three letters
    ],
)
def test_a_title_names_the_subject_if_it_shares_a_word_with_what_the_picture_is_filed_under(
    title: str, about: dict[str, Any], expected: int
):
    assert openclipart.names_subject({"caption": title, **about}) == bool(expected)


def test_texts_of_pictures_and_groups_of_copies(clipart: Path):
    found = built("openclipart", package_root=str(clipart))
    records = [record for dataset in found.values() for record in dataset.annotation]
    assert len(records) == 49
    assert len({record["image_id"] for record in records}) == 49
    first = next(record for record in records if record["image_id"] == "a/0.png")
    assert first == {
        **{"image": "png/a/0.png", "image_id": "a/0.png", "caption": "title 0", "description": "two lines"},
        **{"keywords": ["a", "b"], "folder": "a", "names_subject": 0, "instance_id": first["instance_id"]},
    }
    copies = {f"a/{number}.png" for number in range(40, 49)}  # more than MOST_ALIKE
    assert copies <= {record["image_id"] for record in found["train"].annotation}
    assert all(len(dataset) for dataset in found.values())
    assert found["train"][0]["image"].size == (34, 34)


def test_similar_pictures_of_one_title_are_a_group():
    base = np.zeros(256, dtype=bool)
    near, far = base.copy(), base.copy()
    near[: openclipart.NEAR], far[: openclipart.NEAR + 1] = True, True
    prints = {"a": base, "b": near, "c": far, "d": near, "e": base}
    titles = {"a": "One", "b": "one", "c": "one", "d": "two", "e": "three"}
    groups = openclipart.grouped(titles, prints)
    assert groups == dict.fromkeys(titles, "a")  # c is near b, d equals b, e equals a
    apart = openclipart.grouped({"a": "one", "c": "one", "f": "two"}, {"a": base, "c": far, "f": ~base})
    assert apart == {"a": "a", "c": "c", "f": "f"}


@pytest.fixture
def clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fashion_mnist.make, "__kwdefaults__", {"num_val": 5})
    root = tmp_path / "fashion"
    root.mkdir()
    for name, count in (("train", 20), ("t10k", 7)):
        images = np.arange(count * 784, dtype=np.uint64).astype(np.uint8).reshape(count, 28, 28)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for form, values in ((fashion_mnist.IMAGES, images), (fashion_mnist.LABELS, labels)):
            header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">i4").tobytes()
            (root / form.format(name)).write_bytes(gzip.compress(header + values.tobytes()))
    return root


def test_fashion_mnist_has_its_labels(clothes: Path):
    found = built("fashion_mnist", package_root=str(clothes))
    assert {split: len(dataset) for split, dataset in found.items()} == {"train": 15, "val": 5, "test": 7}
    assert found["val"].labels == [5, 6, 7, 8, 9]
    assert found["train"].classes[7] == "sneaker"
    pixels = np.asarray(Image.open(found["test"].vis_root / found["test"].annotation[1]["image"]))
    assert pixels.ravel().tolist() == [(784 + i) % 256 for i in range(784)]


def test_damaged_idx_files_are_named(clothes: Path):
    path = clothes / fashion_mnist.IMAGES.format("train")
    for content in (b"no gzip", gzip.compress(b"\0\0\x08\x03too short"), gzip.compress(b"")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=path.name):
            fashion_mnist.read_idx(path, num_dims=3)


@pytest.mark.parametrize(
    ("name", "package"), [("openmoji", "npm"), ("openclipart", "openclipart-svg"), ("fashion_mnist", "dataset-fashion")]
)
def test_a_missing_package_is_named(name: str, package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(MissingFileError, match=package):
        built(name, package_root=str(tmp_path / "nowhere"))


def test_download_prepares_or_says_how(clothes: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    builder = registry.get_builder_class("fashion_mnist")
    for places, code in (((str(clothes),), 0), (("/nowhere",), 2)):
        monkeypatch.setattr(builder, "places", places)
        with pytest.raises(SystemExit) as end:
            command.main(["download", "fashion_mnist"])
        assert end.value.code == code
    shown = capsys.readouterr()
    assert str(clothes) in shown.out
    assert "apt-get install dataset-fashion-mnist" in shown.err


@pytest.mark.slow
def test_a_run_on_emoji(emoji: Path, tmp_path: Path):
    keys = {"package_root": str(emoji), "drawing_size": 48}
    run = {**cli_helpers.RUN, **cli_helpers.CAPTIONING, "max_iters": 2, "max_epoch": 1, "test_splits": []}
    content = {
        "model": {"arch": "blip_caption", "model_type": "tiny"},
        "datasets": {"openmoji_caption": keys},
        "run": {**run, "output_dir": str(tmp_path / "out")},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    assert cli_helpers.train(path) == 0
    assert "CIDEr" in cli_helpers.metrics(tmp_path / "out" / "job", "val")
