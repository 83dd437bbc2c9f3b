"""`lavis-lite data` on miniature datasets and a web server on this machine."""

import hashlib
import io
import json
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lavis_lite.cli.data import command, named, needs, unpack
from lavis_lite.cli.data import download as downloads
from lavis_lite.cli.data.table import size_text
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.zoo import dataset_zoo, packaged_dataset
from lavis_lite.common.errors import InputError
from lavis_lite.common.sources import download
from lavis_lite.datasets.base import BaseBuilder
from lavis_lite.datasets.storage import annotation_files, num_samples, section_of, visual_folder
from lavis_lite.datasets.zoo import load_dataset

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "projects").glob("*/*/*.yaml") if not path.name.startswith("_"))


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` with a version; at most `server.portion` bytes at once, if that is set."""

    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        self.server.requests.append((self.path, self.headers["Range"]))
        if content is None:
            self.send_error(404)
            return
        start = 0
        if self.headers["Range"] and self.headers["If-Range"] == '"1"':
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(content[start : start + self.server.portion if self.server.portion else None])

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data root, with a fresh cache."""
    for name in ("LAVIS_LITE_OFFLINE", "LAVIS_LITE_MIRROR", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LAVIS_LITE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def server(root: Path) -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.portion = {}, [], 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def data(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as end:
        command.main([str(word) for word in argv])
    found = capsys.readouterr()
    return int(end.value.code or 0), found.out, found.err


def jpeg(color: str = "red", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, "JPEG")
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_recipe(
    folder: Path, build_info: dict[str, Any], *, name: str = "own", layout: str = "caption", run: Any = (), **more: Any
) -> Path:
    recipe = {
        "model": {"arch": "blip_caption", "model_type": "tiny"},
        "datasets": {name: {"layout": layout, "build_info": build_info, **more}},
        "run": {"task": "captioning", "valid_splits": ["val"], "metrics": ["cider"], **dict(run)},
    }
    path = folder / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_split(root: Path, split: str, records: list[dict[str, Any]], *, images: bool = True) -> str:
    """The storage of a split's records, with their images."""
    path = root / "own" / f"{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    for number, record in enumerate(records if images else []):
        file = root / "own/images" / record["image"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 10), (number * 40, 100, 200)).save(file)
    return f"own/{split}.json"


def own_set(root: Path) -> dict[str, Any]:
    """`build_info` of a whole little dataset."""
    train = [{"image": f"t{i}.png", "caption": f"tulip {i}"} for i in range(4)]
    val = [{"image": f"v{i}.png", "caption": ["a daisy", f"daisy {i}"]} for i in range(2)]
    return {
        "annotations": {
            "train": {"storage": write_split(root, "train", train), "num_samples": 4},
            "val": {"storage": write_split(root, "val", val), "num_samples": 2},
        },
        "images": {"storage": "own/images"},
    }


# The packaged YAMLs


@pytest.mark.parametrize("name", dataset_zoo.names())
def test_packaged_addresses_are_well_formed(name: str) -> None:
    for kind in dataset_zoo.types(name):
        info = packaged_dataset(name, kind).get("build_info") or {}
        for split, entry in section_of(info, "annotations").items():
            if entry is not None:
                num_samples(info, split)
                assert annotation_files(info, split, owner=name)
        folder = visual_folder(info, owner=name) if info else None
        for archive in folder.archives if folder else ():
            assert archive.url.startswith("http")
            assert archive.sha256 is None or len(archive.sha256) == 64
            assert (archive.sha256 is None) or archive.size
        for listed in folder.listed if folder else ():
            assert "{" in listed.address
            assert "{" in listed.file


def test_sizes_are_the_published_ones() -> None:
    def sizes(name: str, kind: str = "default") -> dict[str, int | None]:
        info = packaged_dataset(name, kind)["build_info"]
        return {split: num_samples(info, split) for split in info["annotations"]}

    assert sizes("coco_caption") == {"train": 566_747, "val": 5000, "test": 5000}
    assert sizes("coco_retrieval") == sizes("coco_caption")
    assert sizes("gqa_instruct")["train"] is None  # other files than gqa's
    assert sizes("gqa_instruct", "balanced_val") == {"train": 943_000, "val": 132_062, "test": None}
    assert set(sizes("vsr_caption").values()) == {None}


def test_commands_in_the_docs_are_understood() -> None:
    text = (ROOT / "docs/data.md").read_text() + command.DESCRIPTION
    lines = re.findall(r"^ *lavis-lite data (.+)$", text, re.MULTILINE)
    parsed = [command.parser().parse_args(line.split("#")[0].split()) for line in lines]
    assert {args.command for args in parsed} == {"list", "status", "download", "check", "preview"}
    for args in parsed:
        recipe = vars(args).get("recipe") or vars(args).get("dataset") or ""
        assert not recipe.endswith(".yaml") or (ROOT / recipe).is_file()


# list


def test_list_names_every_dataset_and_what_is_here(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = data(capsys, "list")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()[1:] if line} >= set(dataset_zoo.names())
    _, out, _ = data(capsys, "list", "--here", "coco_caption")
    assert out.startswith("no file of these datasets is on this machine\n")
    path = root / "coco/annotations/coco_karpathy_val.json"
    path.parent.mkdir(parents=True)
    path.write_text("[]")
    (root / "coco/images").mkdir()
    _, out, _ = data(capsys, "list", "--here", "coco_caption", "gqa")
    rows = [line for line in out.splitlines()[1:] if line and not line.startswith("paths")]
    assert len(rows) == 1
    assert "train 0/1, val 1/1, test 0/1" in rows[0]
    assert " here " in rows[0]


def test_an_unknown_dataset_has_near_names(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["list", "coco_captoin"], ["check", "coco_captoin"], ["download", "coco_captoin"]):
        code, _, err = data(capsys, *argv)
        assert code == 2
        assert "Did you mean 'coco_caption'" in err
    code, _, err = data(capsys, "check", "gqa/balanced_vall")
    assert code == 2
    assert "'balanced_val'" in err
    code, _, err = data(capsys, "check", "gqa", "--split", "vall")
    assert code == 2
    assert "Did you mean 'val'" in err
    code, _, err = data(capsys, "check", "caption")
    assert code == 2
    assert "your own" in err


# status


def test_status_lists_all_that_is_missing(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = ROOT / "projects/blip2/train/caption_coco_ft.yaml"
    code, out, _ = data(capsys, "status", recipe, "--json", "--options", "model.tokenizer=shapes")
    rows = {(row["kind"], row["name"]): row for row in json.loads(out)}
    assert code == 1
    assert {name for kind, name in rows if kind == "annotations"} == {
        f"coco_caption/{s}" for s in ("train", "val", "test")
    }
    images = rows["images", "coco_caption/train2014"]
    assert images["size"] == 13_510_573_713
    assert images["place"] == str(root / "coco/images/train2014")
    assert images["source"] == "http://images.cocodataset.org/zips/train2014.zip"
    assert ("images", "coco_caption/test2015") not in rows
    assert ("weights", "model.vit_model") in rows  # the pretrained file lacks the frozen image encoder
    assert ("language model", "model.opt_model") in rows
    assert rows["tokenizer", "model.tokenizer"]["is_there"]


def test_status_is_of_a_recipe(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = data(capsys, "status", "coco_caption")
    assert code == 2
    assert "coco_caption: is a packaged dataset, not a recipe's file" in err


def test_status_of_references(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "projects/blip/eval/nocaps.yaml"
    _, out, _ = data(capsys, "status", recipe, "--json", "--options", "model.tokenizer=shapes")
    (references,) = (row for row in json.loads(out) if row["name"] == "run.annotation_file")
    assert (references["kind"], references["source"].rpartition("/")[2]) == (
        "references",
        "nocaps_val_4500_captions.json",
    )


def test_status_is_satisfied_by_whole_data(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    info = own_set(root) | {"homepage": "https://example.org", "licence": "CC0"}
    recipe = write_recipe(tmp_path, info)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"12345")
    code, out, _ = data(capsys, "status", recipe, "--options", f"model.pretrained={weights}", "run.report_metric=false")
    assert code == 0, out
    assert "https://example.org (licence: CC0)" in out
    assert "5 B" in out
    (root / "own/train.json").unlink()
    code, out, _ = data(
        capsys, "status", recipe, "--options", "model.checkpoint=/no/such.pth", "run.report_metric=false"
    )
    assert code == 1
    assert data(capsys, "check", recipe, "--split", "val", "--options", "model.checkpoint=/no/such.pth")[0] == 0
    missing = [line.split()[1:3] for line in out.splitlines() if line.startswith("MISSING")]
    assert missing == [["weights", "model.checkpoint"], ["annotations", "own/train"]]


def test_status_of_packages(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    info = own_set(root)
    cfg = Config.from_file(write_recipe(tmp_path, info, run={"metrics": ["meteor"]}))
    found = {need.name: need for need in needs.package_needs(cfg, has_videos=True)}
    assert not any(need.is_there for need in found.values())
    assert list(found) == ["decord (reading videos)", "java (the PTB tokenizer, METEOR)"]
    options = ["model.llm_lora={r: 2}", "model.llm_quantization=int8", "model.apply_lemmatizer=true"]
    cfg = Config.from_file(ROOT / "projects/instructblip/eval/gqa.yaml", options)
    found = {need.name.split()[0]: need.source for need in needs.package_needs(cfg, has_videos=False)}
    assert list(found) == ["peft", "bitsandbytes", "accelerate", "spacy", "en_core_web_sm"]
    assert found["peft"] == "pip install peft"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}-{path.stem}")
def test_every_recipe_has_a_status(recipe: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = data(capsys, "status", recipe, "--json")
    assert code in (0, 1), err
    rows = json.loads(out)
    assert {row["kind"] for row in rows} & {"annotations", "generated"}
    assert all(row["place"] or row["kind"] in ("generated", "package", "program") for row in rows)


def test_cached_weights_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index counts only with all its files."""
    for name in ("model-1.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    cached = {path.name: str(path) for path in tmp_path.iterdir()}
    monkeypatch.setattr(needs.huggingface_hub, "try_to_load_from_cache", lambda source, file: cached.get(file))
    assert not needs.weights_need("model.finetuned", "owner/name").is_there
    assert needs._tokenizer_need("owner/name").is_there
    (tmp_path / "model-2.safetensors").write_text("{}")
    cached["model-2.safetensors"] = str(tmp_path / "model-2.safetensors")
    assert needs.weights_need("model.finetuned", "owner/name").is_there


# check


def test_check_of_whole_data(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = data(capsys, "check", write_recipe(tmp_path, own_set(root)))
    assert code == 0
    assert "4 samples, as published" in out
    assert "2 images decoded" in out
    assert "problems: 0, notes: 0" in out


def test_check_names_every_problem(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    info = own_set(root)
    records = [
        {"image": "t0.png", "caption": "tulip"},
        {"image": "t0.png", "caption": "tulip"},
        {"image": "t1.png", "caption": " "},
        {"image": "gone.png", "caption": "a rose"},
    ]
    write_split(root, "train", records, images=False)
    write_split(root, "val", [{"image": "t0.png", "caption": ["x"]}, {"image": "v1.png", "caption": []}], images=False)
    (root / "own/images/v1.png").write_bytes(b"\x89PNG broken")
    code, out, _ = data(capsys, "check", write_recipe(tmp_path, info), "--decode", "all")
    train, val = out.split("own/val\n")
    assert code == 1
    assert "PROBLEM: 1 records have blank texts" in train
    assert "note: 1 records repeat an earlier one" in train
    assert "PROBLEM: 1 of 2 images" in train
    assert str(root / "own/images/gone.png") in train
    assert "cannot be decoded" in val
    assert "note: 1 images are in a training split too" in val
    assert "2 samples, as published" in val


def test_check_counts_and_strictness(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    info = own_set(root)
    records = [{"image": "t0.png", "caption": "tulip"}] * 3 + [{"image": "t1.png", "caption": ""}]
    write_split(root, "train", records, images=False)
    recipe = write_recipe(tmp_path, info, blank_texts="skip")
    code, out, _ = data(capsys, "check", recipe, "--split", "train")
    assert code == 0
    assert "3 samples and 1 left out, as published" in out
    assert data(capsys, "check", recipe, "--split", "train", "--strict")[0] == 1
    info["annotations"]["train"]["num_samples"] = 9
    code, out, _ = data(capsys, "check", write_recipe(tmp_path, info, blank_texts="skip"))
    assert code == 1
    assert "3 samples, 9 were published" in out
    code, _, err = data(capsys, "check", recipe, "--decode", "some")
    assert code == 2
    assert "'some'" in err


def test_check_without_images_reads_the_annotations(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    info = own_set(root)
    os.rename(root / "own/images", root / "elsewhere")
    recipe = write_recipe(tmp_path, info)
    code, out, _ = data(capsys, "check", recipe)
    assert code == 1
    assert f"image folder not found: {root / 'own/images'}" in out
    assert "4 samples, as published" in out
    elsewhere = f"datasets.own.build_info.images.storage={root / 'elsewhere'}"
    assert data(capsys, "check", recipe, "--options", elsewhere)[0] == 0
    (root / "own/val.json").write_text("[{")
    code, out, _ = data(capsys, "check", recipe, "--options", elsewhere)
    assert code == 1
    assert f"PROBLEM: {root / 'own/val.json'}" in out
    (root / "own/val.json").unlink()
    code, out, _ = data(capsys, "check", recipe, "--options", elsewhere)
    assert f"annotation file not found: {root / 'own/val.json'}" in out


def test_a_dataset_of_another_class_is_counted_only(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseBuilder, "build", lambda self, splits: {split: [1, 2] for split in splits})
    recipe = write_recipe(tmp_path, own_set(root))
    code, out, _ = data(capsys, "check", recipe)
    assert code == 0
    assert out.count("2 samples; list is not a BaseDataset") == 2
    code, _, err = data(capsys, "preview", recipe, "--out", tmp_path / "x.png")
    assert code == 2
    assert "own/train: list is not a BaseDataset" in err


def test_a_recipe_with_other_files_has_another_size(root: Path, tmp_path: Path) -> None:
    storage = write_split(root, "val", [{"image": "v.png", "caption": "x"}])
    recipe = {
        "model": {"arch": "blip_caption", "model_type": "tiny"},
        "datasets": {"coco_caption": {"build_info": {"annotations": {"val": {"storage": storage}}}}},
        "run": {"task": "captioning", "evaluate": True, "valid_splits": ["val"], "test_splits": ["test"]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    (found,) = named.find_datasets(str(path))
    assert found.sizes == {"train": 566_747, "test": 5000}
    assert found.splits == ["val", "test"]


# download


def published(server: Any, root: Path) -> tuple[dict[str, Any], bytes]:
    """`build_info` of a dataset on the server, and its archive."""
    archive = zipped({"pics/a.jpg": jpeg(), "pics/b.jpg": jpeg("blue"), "pics/more/": b""})
    server.files = {
        "/train.json": json.dumps([{"image": "pics/a.jpg", "caption": "red"}]).encode(),
        "/val.json": json.dumps([{"image": "pics/b.jpg", "caption": ["blue"]}]).encode(),
        "/pics.zip": archive,
    }
    entry = {"url": f"{server.url}/pics.zip", "sha256": hashlib.sha256(archive).hexdigest(), "size": len(archive)}
    return {
        "annotations": {
            split: {"url": f"{server.url}/{split}.json", "storage": f"own/{split}.json"} for split in ("train", "val")
        },
        "images": {"storage": "own/images", "archives": {"pics": entry}},
    }, archive


def test_download_of_annotations_and_images(
    server: Any, root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    info, _ = published(server, root)
    recipe = write_recipe(tmp_path, info)
    code, out, err = data(capsys, "download", recipe, "--split", "val")
    assert code == 0, err
    assert [path.name for path in (root / "own").iterdir()] == ["val.json"]
    code, out, err = data(capsys, "download", recipe, "--images")
    assert code == 0, err
    assert "own/pics: 2 files" in out
    assert (root / "own/images/pics/b.jpg").read_bytes() == jpeg("blue")
    assert not (root / "own/images/.archives").exists()
    requests = len(server.requests)
    code, out, _ = data(capsys, "download", recipe, "--images")
    assert code == 0
    assert f"{root / 'own/images/pics'} is there" in out
    assert len(server.requests) == requests
    assert data(capsys, "check", recipe, "--decode", "all")[0] == 0


def test_an_interrupted_download_is_resumed(
    server: Any, root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, archive = published(server, root)
    recipe = write_recipe(tmp_path, info)
    server.portion = len(archive) // 2
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    code, _, err = data(capsys, "download", recipe, "--images", "--split", "train")
    assert code == 1
    assert "the next attempt resumes there" in err
    assert not (root / "own/images/pics").exists()
    server.portion = 0
    code, _, err = data(capsys, "download", recipe, "--images", "--split", "train")
    assert code == 0, err
    assert server.requests[-1] == ("/pics.zip", f"bytes={len(archive) // 2}-")
    assert (root / "own/images/pics/a.jpg").is_file()


def test_a_wrong_checksum_and_a_missing_file_leave_nothing(
    server: Any, root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    info, _ = published(server, root)
    info["images"]["archives"]["pics"]["sha256"] = "0" * 64
    del server.files["/val.json"]
    code, out, err = data(capsys, "download", write_recipe(tmp_path, info), "--images")
    assert code == 1
    assert "own/train: " in out
    assert "error: own/val: " in err
    assert "sha256" in err
    assert "2 of the above could not be downloaded" in err
    assert not any(path.is_file() for path in (root / "own/images").rglob("*.jpg"))
    assert not list((root / "own/images/.archives").glob("*.zip"))


def test_listed_images(server: Any, root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """nocaps' form: a JSON file with addresses; and VSR's: addresses in the annotations."""
    info, _ = published(server, root)
    server.files |= {
        "/a": jpeg(),
        "/list.json": json.dumps({"images": [{"u": f"{server.url}/a", "n": "a.jpg"}]}).encode(),
    }
    listed = {"url": f"{server.url}/list.json", "records": "images", "address": "{u}", "file": "pics/{n}"}
    own = {"address": f"{server.url}/{{caption}}", "file": "{image}"}
    info["images"] = {
        "storage": "own/images",
        "needed": {"train": ["listed"], "val": ["own"]},
        "listed": {"listed": listed, "own": own},
    }
    server.files["/val.json"] = json.dumps([{"image": f"pics/{n}.jpg", "caption": n} for n in ("a", "gone")]).encode()
    recipe = write_recipe(tmp_path, info)
    code, out, err = data(capsys, "download", recipe, "--images")
    assert code == 1
    assert "own/train: 1 images" in out
    assert "1 of 2 images could not be downloaded" in err
    assert f"{server.url}/gone" in err
    assert [path.name for path in (root / "own/images/pics").glob("*.jpg")] == ["a.jpg"]
    server.files["/gone"] = jpeg()
    code, out, _ = data(capsys, "download", recipe, "--images")
    assert code == 0
    assert sum(path == "/a" for path, _ in server.requests) == 1


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg", "C:\\a.jpg", "..\\a.jpg"])
def test_listed_names_stay_in_the_folder(name: str, server: Any, root: Path, tmp_path: Path) -> None:
    info, _ = published(server, root)
    server.files["/train.json"] = json.dumps([{"image": name, "caption": "x"}]).encode()
    info["images"] = {"storage": "own/images", "listed": {"own": {"address": f"{server.url}/a", "file": "{image}"}}}
    (found,) = named.find_datasets(str(write_recipe(tmp_path, info)), splits=["train"])
    with pytest.raises(InputError, match="outside the folder"):
        downloads.fetch_listed(visual_folder(info, owner="own").listed[0], found, "train", root / "own/images")


def test_without_an_address_the_owners_page_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = data(capsys, "download", "hateful_memes", "--split", "val", "--images")
    assert code == 1
    assert "dev_seen.jsonl" in err
    assert "https://hatefulmemeschallenge.com" in err
    code, out, _ = data(capsys, "download", "shapes_vqa")
    assert code == 0
    assert "generated" in out


# Archives


def info_of(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_link() -> bytes:
    entry = zipfile.ZipInfo("pics/link")
    entry.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pics/a.jpg", jpeg())
        archive.writestr(entry, "/etc/passwd")
    return buffer.getvalue()


GOOD = (info_of("pics/a.jpg"), b"a")
HOSTILE = {
    "absolute": (zipped({"pics/a.jpg": b"a", "/tmp/evil": b"x"}), "'/tmp/evil'"),
    "parent": (zipped({"pics/a.jpg": b"a", "pics/../../evil": b"x"}), "'pics/../../evil'"),
    "backslash": (zipped({"pics/a.jpg": b"a", "..\\evil": b"x"}), "evil"),
    "drive": (zipped({"pics/a.jpg": b"a", "C:/evil": b"x"}), "'C:/evil'"),
    "zip link": (zip_link(), "'pics/link' is a link"),
    "tar absolute": (tarred(GOOD, (info_of("/tmp/evil"), b"x")), "'/tmp/evil'"),
    "tar parent": (tarred(GOOD, (info_of("../evil"), b"x")), "'../evil'"),
    "tar symlink": (tarred(GOOD, (info_of("pics/l", tarfile.SYMTYPE, "/etc"), b"")), "'pics/l' is a link"),
    "tar hard link": (tarred(GOOD, (info_of("pics/l", tarfile.LNKTYPE, "pics/a.jpg"), b"")), "'pics/l' is a link"),
    "tar device": (tarred(GOOD, (info_of("pics/d", tarfile.CHRTYPE), b"")), "'pics/d' is not a plain file"),
    "tar pipe": (tarred(GOOD, (info_of("pics/p", tarfile.FIFOTYPE), b"")), "'pics/p' is not a plain file"),
    "twice": (tarred(GOOD, GOOD), "twice"),
    "file and folder": (tarred(GOOD, (info_of("pics/a.jpg/b"), b"x")), "twice, or is a file and a folder"),
    "neither": (b"<html>not found</html>", "neither a zip nor a tar"),
    "cut short": (tarred((info_of("pics/a.jpg"), os.urandom(50_000)))[:20_000], "cannot be unpacked"),
    "empty": (zipped({}), "has no files"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_bad_archives_are_refused_by_name_and_leave_nothing(case: str, tmp_path: Path) -> None:
    content, words = HOSTILE[case]
    archive, folder = tmp_path / "x.zip", tmp_path / "images"
    archive.write_bytes(content)
    folder.mkdir()
    (folder / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(InputError) as error:
        unpack.unpack(archive, folder)
    assert words in str(error.value)
    assert str(archive) in str(error.value)
    assert [path.name for path in folder.rglob("*")] == ["mine.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "x.zip"]


def test_a_damaged_member_is_found(tmp_path: Path) -> None:
    archive = tmp_path / "x.zip"
    content = zipped({"pics/a.jpg": b"0123456789" * 50})
    archive.write_bytes(content.replace(b"0123456789", b"0123X56789", 1))
    with pytest.raises(InputError, match="Bad CRC"):
        unpack.unpack(archive, tmp_path / "images")


def test_unpacking_joins_folders_and_strips(tmp_path: Path) -> None:
    archive, folder = tmp_path / "x.tar.gz", tmp_path / "images"
    archive.write_bytes(tarred((info_of("pics", tarfile.DIRTYPE), b""), GOOD, (info_of("pics/in/b.jpg"), b"b")))
    (folder / "in").mkdir(parents=True)
    (folder / "in/old.jpg").write_bytes(b"old")
    (folder / ".unpack-left").mkdir()
    assert unpack.unpack(archive, folder, strip=1) == 2
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["a.jpg", "in/b.jpg", "in/old.jpg"]
    assert not list(folder.glob(".*"))
    with pytest.raises(InputError, match="below 3 folders"):
        unpack.unpack(archive, folder, strip=3)


def test_a_full_disk_is_said_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "x.zip"
    archive.write_bytes(zipped({"a.jpg": b"0" * 5000}))
    usage = unpack.shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match=r"have 5.0 kB, and 2.0 kB are free"):
        unpack.unpack(archive, tmp_path / "images")


# preview


def test_preview_draws_a_png_and_a_page(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    info = own_set(root)
    write_split(root, "train", [{"image": "t0.png", "caption": "<b>tulip</b> & rose"}], images=False)
    recipe = write_recipe(tmp_path, info)
    sheet, page = tmp_path / "sheet.png", tmp_path / "new/page.html"
    code, out, _ = data(capsys, "preview", recipe, "--out", sheet, "-n", "3")
    assert code == 0
    assert "1 samples" in out
    with Image.open(sheet) as image:
        assert image.size[0] > 224
        assert len(image.getcolors(1 << 20)) > 3
    code, out, _ = data(capsys, "preview", recipe, "--split", "train", "val", "--out", page)
    text = page.read_text()
    assert code == 0
    assert "3 samples" in out
    assert text.count('src="data:image/jpeg;base64,') == 3
    assert "&lt;b&gt;tulip&lt;/b&gt; &amp; rose" in text
    assert "a daisy | daisy 1" in text
    assert re.search(r"https?:", text) is None


def test_preview_shows_what_cannot_be_read(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    info = own_set(root)
    (root / "own/images/t1.png").write_bytes(b"no image")
    page = tmp_path / "page.html"
    code, out, _ = data(capsys, "preview", write_recipe(tmp_path, info), "--out", page)
    assert code == 1
    assert "4 samples, 1 of them cannot be read" in out
    assert page.read_text().count('class="error"') == 1
    code, _, err = data(capsys, "preview", "coco_caption", "--out", tmp_path / "x.gif")
    assert code == 2
    assert ".png or an .html" in err


def test_preview_of_videos_shows_frames(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    info = own_set(root)
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue", "white")]
    frames[0].save(root / "own/images/clip.gif", save_all=True, append_images=frames[1:])
    records = [{"video": "clip.gif", "instruction": "What is it?", "output": "colours"}]
    (root / "own/train.json").write_text(json.dumps(records))
    page = tmp_path / "page.html"
    recipe = write_recipe(tmp_path, info, layout="instruct", num_frames=4)
    code, _, err = data(capsys, "preview", recipe, "--out", page)
    assert code == 0, err
    assert page.read_text().count("data:image/jpeg") == 4
    assert '<span class="soft">text_output</span> colours' in page.read_text()


# Errors name the command


def test_errors_name_the_command(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lavis-lite data status"):
        load_dataset("hateful_memes", splits=["val"])
    path = root / "nocaps/annotations/nocaps_val.json"
    path.parent.mkdir(parents=True)
    path.write_text('[{"image": "val/a.jpg", "img_id": 0}]')
    with pytest.raises(FileNotFoundError, match="lavis-lite data download nocaps --images"):
        load_dataset("nocaps", splits=["val"])
    (root / "nocaps/images").mkdir()
    with pytest.raises(InputError, match="lavis-lite data check"):
        load_dataset("nocaps", splits=["val"])["val"][0]


def test_sizes_are_written_in_decimal_units() -> None:
    sizes = {None: "", 5: "5 B", 5000: "5.0 kB", 815_585_330: "816 MB", 999_500: "1.0 MB", 13_510_573_713: "13.5 GB"}
    assert {size: size_text(size) for size in sizes} == sizes
