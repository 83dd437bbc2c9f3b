"""Damaged tables, files that may not be read, names that differ by a letter's case or form, and cuts of pairs."""

import io
import json
import logging
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import shard_helpers

from lavis_lite.common.errors import InputError, UnreadableSample
from lavis_lite.common.registry import registry
from lavis_lite.datasets import image
from lavis_lite.datasets.image import open_image

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def build(storage: Any, layout: str = "pairs", **more: Any) -> Any:
    info = {"annotations": {"train": {"storage": str(storage)}}, **more.pop("info", {})}
    return registry.get_builder_class(layout)(build_info=info, **more).build()


def arrow(path: Path, count: int = 30, *, indexed: bool = False) -> list[int]:
    """Write an Arrow file of blocks of ten rows; return the positions at which blocks begin."""
    table = pa.table({"image": [shard_helpers.png(n) for n in range(count)], "caption": ["a thing"] * count})
    make = pa.ipc.new_file if indexed else pa.ipc.new_stream
    begins = []
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        for start in range(0, count, 10):
            begins.append(file.tell())
            writer.write_table(table.slice(start, 10))
    return begins


@pytest.mark.parametrize("indexed", [False, True])
def test_an_arrow_file_that_is_cut_is_named(tmp_path: Path, indexed: bool) -> None:
    path = tmp_path / "train.arrow"
    begins = arrow(path, indexed=indexed)
    assert len(build(path)["train"]) == 30
    content = path.read_bytes()
    for keep in (0, 3, 500, begins[1], begins[2], len(content) - 4):
        path.write_bytes(content[:keep])
        with pytest.raises(InputError, match=r"train\.arrow: is not an Arrow file, or is cut off"):
            build(path)


def test_a_damaged_arrow_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.arrow"
    begins = arrow(path)
    content = bytearray(path.read_bytes())
    content[begins[1] : begins[1] + 200] = b"\x07" * 200
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train\.arrow: cannot be read as arrow"):
        build(path)


def test_a_file_that_may_not_be_read_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image, "open_file", refused)  # the administrator, as whom tests may run, reads everything
    with pytest.raises(UnreadableSample, match=r"a\.png: this user may not read it"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("there", "asked", "how"),
    [
        ("a.JPG", "a.jpg", "the case of its suffix"),
        ("a.png", "a.PNG", "the case of its suffix"),
        (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png"), "accents"),
        (unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png"), "accents"),
    ],
)
def test_a_name_that_is_almost_right_is_pointed_out(tmp_path: Path, there: str, asked: str, how: str) -> None:
    (tmp_path / there).write_bytes(shard_helpers.png(1))
    with pytest.raises(UnreadableSample) as caught:
        open_image(tmp_path / asked)
    assert f"There is {there!a}" in str(caught.value)
    assert how in str(caught.value)
    with pytest.raises(UnreadableSample, match="image file not found") as caught:
        open_image(tmp_path / "other.png")
    assert "There is" not in str(caught.value)


@pytest.mark.parametrize("is_list", [False, True])
def test_pairs_are_cut_by_their_images(tmp_path: Path, is_list: bool) -> None:
    """Records of one pair are in one split, whatever else they have, and in any order."""
    pairs = [(f"{n}l.png", f"{n}r.png") for n in range(40)]
    records = [
        {"sentence": f"one is {word}", "label": "True"}
        | ({"images": [*pair]} if is_list else {"image0": pair[0], "image1": pair[1]})
        for pair in pairs
        for word in ("red", "blue")
    ]
    cut = []
    for number, ordered in enumerate((records, records[::-1])):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(ordered))
        built = build(path, "nlvr", split_off={"val": 0.3})
        cut.append({split: {tuple(record["images"]) for record in one.annotation} for split, one in built.items()})
        assert cut[-1]["train"].isdisjoint(cut[-1]["val"])
        assert cut[-1]["train"] | cut[-1]["val"] == set(pairs)
    assert cut[0] == cut[1]


def test_pairs_inside_tables_are_cut_by_their_content(tmp_path: Path) -> None:
    def cut(name: str, numbers: list[int]) -> set[str]:
        table = {f"image{side}": [shard_helpers.png(side + 2 * n) for n in numbers] for side in (0, 1)}
        path = tmp_path / f"{name}.parquet"
        texts = {"sentence": [f"pair {n}" for n in numbers], "label": ["True"] * len(numbers)}
        pq.write_table(pa.table(table | texts), path)
        return {record["sentence"] for record in build(path, "nlvr", split_off={"val": 0.3})["val"].annotation}

    numbers = [*range(40)]
    assert 3 < len(cut("first", numbers)) < 25
    assert cut("second", numbers[::-1]) == cut("first", numbers)


def test_bytes_in_place_of_a_text_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [shard_helpers.png(1)], "caption": [b"a thing"]}), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"train\.parquet: row 0: field 'caption' holds bytes.*expected a text"):
        build(tmp_path / "train.parquet")


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    columns = [pa.array(["a.png"]), pa.array(["one"]), pa.array(["two"])]
    pq.write_table(pa.Table.from_arrays(columns, ["image", "caption", "caption"]), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"train\.parquet: names the column 'caption' twice"):
        build(tmp_path / "train.parquet")


def test_an_address_as_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([{"image": "https://example.org/a.png", "caption": "a thing"}]))
    dataset = build(tmp_path / "train.json", info={"images": {"storage": str(tmp_path)}})["train"]
    with pytest.raises(UnreadableSample, match=r"It is an address \(https:/example\.org/a\.png\)"):
        _ = dataset[0]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_one_table_for_two_splits_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str) -> None:
    path = tmp_path / f"train.{suffix}"
    if suffix == "arrow":
        arrow(path)
    else:
        rows = {"image": [shard_helpers.png(n) for n in range(20)], "caption": ["a thing"] * 20}
        pq.write_table(pa.table(rows), path)
    with caplog.at_level(logging.WARNING):
        build(path, split_off={"val": 0.3})
    assert "trained on" not in caplog.text
    with caplog.at_level(logging.WARNING):
        registry.get_builder_class("pairs")(
            build_info={"annotations": {split: {"storage": str(path)} for split in ("train", "val")}}
        ).build()
    assert f"val: reads {path}, as the split 'train' does" in caplog.text


@pytest.mark.parametrize("share", ["0.1", True, None])
def test_a_share_that_is_no_number_is_named(tmp_path: Path, share: Any) -> None:
    arrow(tmp_path / "train.arrow")
    with pytest.raises(InputError, match=r"split_off\.val: must be a share between 0 and 1, got"):
        build(tmp_path / "train.arrow", split_off={"val": share})


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_shard_are_named(tmp_path: Path, kind: bytes) -> None:
    """As `tar` packs a folder of links, or of files that are there twice."""
    path = shard_helpers.write_shard(tmp_path / "train.tar", [shard_helpers.sample(n) for n in range(3)])
    with tarfile.open(path, "a") as shard:
        for name, content in (("000009.png", None), ("000009.txt", b"the same picture")):
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = kind, "000001.png"
            else:
                member.size = len(content)
            shard.addfile(member, None if content is None else io.BytesIO(content))
    with pytest.raises(InputError, match=r"train\.tar: 000009\.png is a link to 000001\.png.*incomplete_samples"):
        build(path)
    assert len(build(path, incomplete_samples="skip")["train"]) == 3
