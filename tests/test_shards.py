"""Local shards with an index: records, random access, damage, the cache, and runs on them."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shard_helpers
import torch
from safetensors.torch import save

from lavis_lite.common.errors import InputError, MissingFileError, SettingError, UnreadableSample
from lavis_lite.common.members import Member, find_member
from lavis_lite.common.registry import registry
from lavis_lite.datasets import copies, shards
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.runners.resume import annotation_digests


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(storage: Any, layout: str = "pairs", **more: Any) -> BaseDataset:
    storage = list(map(str, storage)) if isinstance(storage, list) else str(storage)
    info = {"annotations": {"train": {"storage": storage}}}
    dataset = registry.get_builder_class(layout)(build_info=info, **more).build()["train"]
    assert isinstance(dataset, BaseDataset)
    return dataset


def mixed(tmp_path: Path) -> BaseDataset:
    """Samples whose JSON objects differ in fields and types."""
    fields = [
        {"caption": "one", "width": 3, "similarity": None},
        {"caption": ["two", "too"], "width": 2.5, "similarity": 0.25, "exif": {"a": [1]}},
        {"caption": "three", "width": "wide", "exif": {}},
    ]
    samples = [{"__key__": f"{n}", "png": shard_helpers.png(n), "json": one} for n, one in enumerate(fields)]
    return build([shard_helpers.write_shard(tmp_path / f"{n}.tar", [one]) for n, one in enumerate(samples)])


def test_json_fields_need_not_be_alike(tmp_path: Path) -> None:
    records = list(mixed(tmp_path).annotation)
    assert [record["caption"] for record in records] == ["one", "two", "too", "three"]
    assert [record["similarity"] for record in records] == [None, 0.25, 0.25, None]
    assert [record["width"] for record in records] == ["3", "2.5", "2.5", "wide"]
    captions = ["a", 3, ["b", "c"], "d"]
    samples = [{"__key__": f"{n}", "png": shard_helpers.png(n), "json": {"caption": c}} for n, c in enumerate(captions)]
    assert texts(build(shard_helpers.write_shard(tmp_path / "lists.tar", samples))) == ["a", "3", "b", "c", "d"]


def texts(dataset: BaseDataset) -> list[str]:
    return [record["caption"] for record in dataset.annotation]


def numbered(*numbers: int) -> list[str]:
    return [f"picture number {number}" for number in numbers]


@pytest.mark.parametrize("form", ["list", "braces", "glob", "relative"])
def test_samples_are_those_that_were_written(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = shard_helpers.write_shards(tmp_path, [3, 1, 4])
    monkeypatch.setenv("LAVIS_LITE_DATA", str(tmp_path))
    names = {"list": paths, "braces": tmp_path / "train-{0000..0002}.tar", "glob": tmp_path / "train-*.tar"}
    dataset = build(names.get(form, "train-{0000,0001,0002}.tar"))
    assert texts(dataset) == numbered(*range(8))
    for number in (7, 0, 3):
        assert np.array_equal(np.asarray(dataset[number]["image"]), np.asarray(shard_helpers.picture(number)))


def test_fields_of_members(tmp_path: Path) -> None:
    png = shard_helpers.png(1)
    samples = [
        {"__key__": "a/0", "jpg": png, "txt": "text\n", "json": {"caption": "other", "width": 3}},
        {"__key__": "a/1", "left.png": png, "right.png": png, "json": ["first", "second"], "cls": "12"},
        {"__key__": "a/2", "webp": png, "blip.txt": "synthetic", "cls": "tulip"},
    ]
    first, second, third = shards.make_index(shard_helpers.write_shard(tmp_path / "a.tar", samples)).records
    assert {key: value for key, value in first.items() if key != "image"} == {
        "__key__": "a/0",
        "caption": "text",
        "width": 3,
    }
    assert find_member(first["image"]).name == "a/0.jpg"
    assert find_member(second["left.png"]).read() == find_member(second["right.png"]).read() == png
    assert (second["caption"], second["label"]) == (["first", "second"], 12)
    assert (third["blip.txt"], third["label"]) == ("synthetic", "tulip")


def test_columns_choose_members_and_fields(tmp_path: Path) -> None:
    samples = [{"__key__": f"{n}", "left.png": shard_helpers.png(n), "json": {"alt": f"text {n}"}} for n in range(3)]
    path = shard_helpers.write_shard(tmp_path / "a.tar", samples)
    dataset = build(path, columns={"image": "left.png", "caption": "alt"})
    assert texts(dataset) == ["text 0", "text 1", "text 2"]
    assert np.array_equal(np.asarray(dataset[2]["image"]), np.asarray(shard_helpers.picture(2)))


def test_members_in_any_order_and_long_names(tmp_path: Path) -> None:
    """All images first, then all texts; names beyond the 100 characters of the oldest format."""
    key, path = "folder/" * 20 + "x" * 90, tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for suffix, content in (("png", shard_helpers.png(5)), ("txt", b"five")):
            for name in (f"{key}é", f"{key}b"):
                file = tmp_path / "content"
                file.write_bytes(content)
                tar.add(file, f"{name}.{suffix}")
    dataset = build(path)
    assert texts(dataset) == ["five", "five"]
    assert np.array_equal(np.asarray(dataset[1]["image"]), np.asarray(shard_helpers.picture(5)))


def test_a_shard_cut_anywhere(tmp_path: Path) -> None:
    """With `skip` exactly the whole samples remain; else the error names the file and where it is cut."""
    path = shard_helpers.write_shards(tmp_path, [4])[0]
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        members = [(info.offset_data + info.size, info.name) for info in tar]
    ends = [end for end, name in members if name.endswith(".txt")]
    for cut in range(2100, len(data), 300):  # the first header is whole
        path.write_bytes(data[:cut])
        os.utime(path, ns=(cut, cut))
        whole = sum(end <= cut for end in ends)
        index = shards.make_index(path)
        assert [record["caption"] for record in index.records] == numbered(*range(whole)), cut
        if cut < -(-ends[-1] // 512) * 512 + 512:  # before the end marker
            assert index.cut_at is not None
            assert index.cut_at <= cut
            with pytest.raises(InputError, match=rf"train-0000\.tar.*{index.cut_at:,}"):
                shards.shard_records(path, "error")
        else:
            assert index.cut_at is None


def test_a_member_without_its_pair(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [shard_helpers.sample(n) for n in range(8)]
    del samples[2]["png"], samples[5]["txt"]
    samples[6]["txt"] = b"\xff\xff"
    path = shard_helpers.write_shard(tmp_path / "a.tar", samples)
    with pytest.raises(InputError, match=r"a\.tar.*000002.*000005.*000006"):
        build(path)
    assert texts(build(path, incomplete_samples="skip")) == numbered(0, 1, 3, 4, 7)
    assert "sample 000002 has no image" in caplog.text
    with pytest.raises(SettingError, match="incomplete_samples"):
        build(path, incomplete_samples="drop")


def test_broken_json_and_members_twice(tmp_path: Path) -> None:
    samples = [{"__key__": f"{n}", "png": shard_helpers.png(n), "json": {"caption": f"{n}"}} for n in range(3)]
    samples[1]["json"] = b'{"caption": '
    path = shard_helpers.write_shard(tmp_path / "a.tar", [*samples, samples[2]])
    with pytest.raises(InputError, match=r"2\.png.*1\.json"):
        build(path)
    assert texts(build(path, incomplete_samples="skip")) == ["0", "2"]


@pytest.mark.parametrize("content", [b"", b"no tar", b"x" * 2000, gzip.compress(b"x", mtime=0), bytes(10240)])
def test_files_that_are_no_shards(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tar"):
        build(path, incomplete_samples="skip")


def test_missing_shards(tmp_path: Path) -> None:
    shard_helpers.write_shards(tmp_path, [1])
    with pytest.raises(MissingFileError, match=r"train-0001\.tar"):
        build(tmp_path / "train-{0000..0001}.tar")
    with pytest.raises(MissingFileError, match="other-"):
        build(tmp_path / "other-*.tar")


def test_an_address_is_not_read_with_an_index() -> None:
    with pytest.raises(InputError, match=r"train\.storage.*https://example\.org/a\.tar.*stream"):
        build("https://example.org/{a,b}.tar")


def test_an_index_is_made_once_and_anew_for_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard_helpers.write_shards(tmp_path, [3])[0]
    made = []
    make = shards.make_index
    monkeypatch.setattr(shards, "make_index", lambda path: made.append(path) or make(path))
    assert texts(build(path)) == texts(build(path)) == numbered(0, 1, 2)
    assert made == [path]
    shard_helpers.write_shard(path, [shard_helpers.sample(n) for n in range(5)])
    assert texts(build(path)) == numbered(*range(5))
    assert made == [path, path]


def test_a_shard_that_changes_during_a_run(tmp_path: Path) -> None:
    path = shard_helpers.write_shards(tmp_path, [3])[0]
    dataset = build(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(UnreadableSample, match=r"train-0000\.tar.*000002\.png"):
        dataset[2]
    path.write_bytes(data[512:])
    with pytest.raises(UnreadableSample, match=r"000000\.png"):
        dataset[0]
    path.unlink()
    with pytest.raises(UnreadableSample, match=r"train-0000\.tar"):
        dataset[0]


def test_paths_of_members() -> None:
    member = Member("/data/a b.tar", 1536, 70, "folder/x.y.jpg")
    assert find_member(str(member)) == member
    for path in ("/data/a.tar", "/data/a.tar/x.jpg", "a.jpg", "/data/a.tar/@1+/x.jpg", "/data/@1+2/x.jpg"):
        assert find_member(path) is None


def test_evaluation_ids_come_from_members_names(tmp_path: Path) -> None:
    info = {"annotations": {"val": {"storage": str(shard_helpers.write_shards(tmp_path, [3])[0])}}}
    dataset = registry.get_builder_class("caption")(build_info=info).build()["val"]
    assert dataset.references() == {n: [text] for n, text in enumerate(numbered(0, 1, 2))}


def test_digests_follow_the_content_not_the_place(tmp_path: Path) -> None:
    def digest(folder: str, *, first: int = 0) -> str | None:
        samples = [shard_helpers.sample(n) for n in range(first, first + 3)]
        path = shard_helpers.write_shard(tmp_path / folder / "a.tar", samples)
        return annotation_digests({"web": build(path)})["web"]

    assert digest("a") == digest("b")
    assert digest("a") != digest("c", first=1)


# The real entry points


@pytest.fixture
def project(tmp_path: Path, shapes_data: Path) -> Path:
    """Captioning with all splits in shards, and images that are augmented."""
    section = shard_helpers.stream_section(tmp_path)
    del section["stream"]
    names = {split: str(shard_helpers.write_shards(tmp_path, [6], name=split)[0]) for split in ("val", "test")}
    section["build_info"]["annotations"] |= {split: {"storage": name} for split, name in names.items()}
    return cli_helpers.project(tmp_path, "caption", {"datasets": {"shapes_caption": None, "web": section}})


@pytest.mark.slow
def test_a_run_on_shards_equals_one_on_files(project: Path, tmp_path: Path) -> None:
    assert cli_helpers.train(project, "run.num_workers=2") == 0
    plain: dict[str, Any] = {}
    for split, pattern in (("train", "shards1/train-*"), ("val", "val-*"), ("test", "test-*")):
        records = []
        for shard in sorted(tmp_path.glob(f"{pattern}.tar")):
            folder = tmp_path / "plain" / split / shard.stem
            with tarfile.open(shard) as tar:
                tar.extractall(folder, filter="data")
            names = sorted(folder.glob("*.png"))
            records += [{"image": str(name), "caption": name.with_suffix(".txt").read_text()} for name in names]
        plain[split] = {"storage": str(tmp_path / "plain" / f"{split}.json")}
        Path(plain[split]["storage"]).write_text(json.dumps(records))
    (tmp_path / "files").mkdir()
    section = shard_helpers.stream_section(tmp_path) | {"build_info": {"annotations": plain}}
    del section["stream"]
    files = cli_helpers.project(tmp_path / "files", "caption", {"datasets": {"shapes_caption": None, "web": section}})
    assert cli_helpers.train(files) == 0
    found, expected = (
        cli_helpers.weights(path.parent / "output" / "job" / "checkpoint_last.pth") for path in (project, files)
    )
    cli_helpers.assert_same_state(expected, found)
    results = [path.parent / "output" / "job" / "result" / "test_captions.json" for path in (project, files)]
    assert results[0].read_text() == results[1].read_text()


@pytest.mark.slow
def test_dry_run_and_data_check(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lavis_lite.cli.data.command import main

    assert cli_helpers.train(project, flags=["--dry-run"]) == 0
    assert "31 image files found" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["check", str(project)])
    out = capsys.readouterr().out
    assert end.value.code in (0, None), out
    assert "31 images, all there" in out


def test_fields_of_one_shard_need_not_be_alike(tmp_path: Path) -> None:
    values: list[Any] = [None, 1, "x", 10**30, {"a": 1}, {"a": "y"}, [1], ["z", 2]]
    samples = [
        {"__key__": f"{n}", "png": shard_helpers.png(n), "json": {"caption": "c" if n else ["a", "b"], "other": value}}
        for n, value in enumerate(values)
    ]
    records = list(build(shard_helpers.write_shard(tmp_path / "a.tar", samples)).annotation)
    assert [record["caption"] for record in records] == ["a", "b"] + ["c"] * 7
    shown = [None, "1", "x", str(10**30), '{"a": 1}', '{"a": "y"}', "[1]", '["z", 2]']
    assert [record["other"] for record in records[1:]] == shown


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_wrong_sample_is_named_by_its_shard_and_key(tmp_path: Path, split: str) -> None:
    good, bad = shard_helpers.sample(3), {**shard_helpers.sample(7), "txt": " "}
    paths = [shard_helpers.write_shard(tmp_path / f"{n}.tar", [one]) for n, one in enumerate((good, bad))]
    info = {"annotations": {split: {"storage": list(map(str, paths))}}}
    with pytest.raises(InputError, match=r"1\.tar: sample 000007: field 'caption' is empty"):
        registry.get_builder_class("caption")(build_info=info).build()


def test_a_split_is_cut_off_alike_wherever_the_shards_are(tmp_path: Path) -> None:
    def cut(folder: Path) -> list[str]:
        shard_helpers.write_shards(folder, [10, 10])
        info = {"annotations": {"train": {"storage": str(folder / "train-*.tar")}}}
        builder = registry.get_builder_class("pairs")(build_info=info, split_off={"val": 0.4})
        return texts(builder.build(["val"])["val"])  # type: ignore[arg-type]

    assert cut(tmp_path / "one") == cut(tmp_path / "two/further")


def bitmap(number: int) -> bytes:
    """A picture as a file, of which all have as many bytes."""
    buffer = io.BytesIO()
    shard_helpers.picture(number).save(buffer, "bmp")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["shard", "table"])
@pytest.mark.parametrize("layout", ["caption", "retrieval"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_pictures_of_one_id_and_size_are_compared(
    tmp_path: Path, kind: str, layout: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(name: str, *rows: tuple[int, str]) -> Path:
        fields = [{"caption": f"c{n}", "image_id": image_id} for n, (_, image_id) in enumerate(rows)]
        images = [bitmap(number) for number, _ in rows]
        if kind == "shard":
            samples = [{"__key__": f"{n:03}", "bmp": images[n], "json": one} for n, one in enumerate(fields)]
            return shard_helpers.write_shard(tmp_path / f"{name}.tar", samples)
        table = pa.Table.from_pylist([one | {"image": images[n]} for n, one in enumerate(fields)])
        pq.write_table(table, tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    def built(path: Path) -> int:
        info = {"annotations": {split: {"storage": str(path)}}}
        return len(registry.get_builder_class(layout)(build_info=info).build()[split])

    path = written("a", (1, "x"), (2, "y"), (1, "x"))
    assert built(path) == (3 if split == "train" else 2)
    with pytest.raises(InputError, match=r"b\.(tar|parquet): .*b\.(tar|parquet): .*image_id 'x'"):
        built(written("b", (1, "x"), (2, "y"), (3, "x")))
    if split == "train" or kind == "shard":
        monkeypatch.setattr(copies, "_differ", lambda *_: pytest.fail("compared again"))
        assert built(path)


def features_of(number: int, kind: str) -> bytes:
    """A member of `number` + 1 tokens."""
    array = np.full((number + 1, 8), number, np.float32)
    if kind == "safetensors":
        return save({"tokens": torch.from_numpy(array)})
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def animation(number: int) -> bytes:
    """A video of four frames, a GIF; the first tells the number."""
    buffer = io.BytesIO()
    frames = [shard_helpers.picture(number + at) for at in range(4)]
    frames[0].save(buffer, "gif", save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


LAYOUTS = ("caption", "retrieval", "instruct", "caption_instruct")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, layout) for kind in ("npy", "safetensors", "mp4") for layout in LAYOUTS[kind == "mp4" :]],
)
@pytest.mark.parametrize("way", ["train", "val", "stream"])
def test_features_and_videos_in_shards(tmp_path: Path, kind: str, layout: str, way: str) -> None:
    """Captions of videos have the layout `caption_instruct`."""
    texts = [{"caption": f"c{n}", "instruction": "what?", "output": f"c{n}", "image_id": n} for n in range(3)]
    content = [animation(n) if kind == "mp4" else features_of(n, kind) for n in range(3)]
    samples = [{"__key__": f"{n}", kind: content[n], "json": texts[n]} for n in range(3)]
    split = "val" if way == "val" else "train"
    storage = {"storage": str(shard_helpers.write_shard(tmp_path / "a.tar", samples))}
    own = {"name": "blip_image_eval", "image_size": 16} if kind == "mp4" else {"name": "features"}
    more: dict[str, Any] = {"stream": {"epoch_length": 3, "shuffle_buffer": 1}} if way == "stream" else {}
    if layout == "caption_instruct" and kind == "mp4":
        more["reader"] = "video_captions"
    dataset = registry.get_builder_class(layout)(
        build_info={"annotations": {split: storage}},
        columns={"video" if kind == "mp4" else "image": kind},
        vis_processor={"train": own, "eval": own},
        **more,
    ).build([split])[split]
    found = [one.read() for one in dataset.first(3)] if way == "stream" else [dataset[n] for n in range(3)]
    shapes = sorted(tuple(one["image"].shape) for one in found)
    assert shapes == ([(3, 4, 16, 16)] * 3 if kind == "mp4" else [(1, 8), (2, 8), (3, 8)])
    if kind == "mp4":
        assert len({one["image"].sum().item() for one in found}) == 3
    else:
        assert all((one["image"] == len(one["image"]) - 1).all() for one in found)


def test_broken_members_are_named_with_their_shard(tmp_path: Path) -> None:
    samples = [
        {"__key__": "0", "npy": features_of(0, "npy")[:40], "txt": "x"},
        {"__key__": "1", "npy": b"", "txt": "y"},
    ]
    path = shard_helpers.write_shard(tmp_path / "a.tar", samples)
    dataset = build(path, "caption", columns={"image": "npy"}, vis_processor={"train": {"name": "features"}})
    for number in range(2):
        with pytest.raises(UnreadableSample, match=rf"a\.tar/.*/{number}\.npy"):
            dataset[number]
    path = shard_helpers.write_shard(tmp_path / "b.tar", [{"__key__": "0", "mp4": animation(0)[:40], "txt": "x"}])
    dataset = build(path, "retrieval", columns={"video": "mp4"})
    with pytest.raises(UnreadableSample, match=r"b\.tar/.*/0\.mp4"):
        dataset[0]
