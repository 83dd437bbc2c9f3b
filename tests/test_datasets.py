"""Annotation files, datasets and builders, on records written by hand in each benchmark's form."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis_lite.common.config.config import Config
from lavis_lite.common.config.files import load_yaml
from lavis_lite.common.config.zoo import dataset_zoo, packaged_dataset
from lavis_lite.common.errors import InputError, UserError
from lavis_lite.common.registry import registry
from lavis_lite.common.rng import seed_sample
from lavis_lite.datasets import load_dataset
from lavis_lite.datasets.annotations import read_records
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.caption import CaptionBuilder, CaptionEvalDataset, CaptionTrainDataset
from lavis_lite.datasets.classification import ClassificationBuilder, ClassificationDataset
from lavis_lite.datasets.nlvr import NLVREvalDataset, NLVRTrainDataset, swap_sides
from lavis_lite.datasets.pairs import PairsDataset
from lavis_lite.datasets.readers import READERS
from lavis_lite.datasets.readers.files import SplitFiles, rename_columns
from lavis_lite.datasets.retrieval import RetrievalEvalDataset, RetrievalTrainDataset
from lavis_lite.datasets.vqa import VQABuilder, VQAEvalDataset, VQATrainDataset
from lavis_lite.tasks.captioning import CaptionTask

DATA_PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


def to_tensor(image: Image.Image) -> torch.Tensor:
    """One number a picture: its first pixel's red, so that a test sees which file was opened."""
    return torch.tensor([float(image.getpixel((0, 0))[0])])  # type: ignore[index]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(["a.png", "b.png", "val2014/COCO_val2014_000000391895.png"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (number, 0, 0)).save(path)
    return tmp_path


def make(root: Path, dataset_class: Any, records: Any, *, split: str = "val", files: Any = None, **options: Any) -> Any:
    paths = []
    for number, content in enumerate([records] if files is None else files):
        paths.append(root / f"notes{number}.json")
        paths[-1].write_text(json.dumps(content))
    return dataset_class(paths, root / "images", split=split, vis_processor=to_tensor, **options)


# Annotation files


def test_all_kinds_of_files_give_the_same_records(tmp_path: Path) -> None:
    records = [{"image": "a.png", "caption": "ä, b"}, {"image": "b.png", "caption": "c\u2028d"}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "a.jsonl") == records
    (tmp_path / "a.csv").write_text('image,caption\na.png,"ä, b"\nb.png,"two\nlines"\n', encoding="utf-8-sig")
    (tmp_path / "a.tsv").write_text("image\tcaption\na.png\tä, b\n", encoding="utf-8")
    assert read_records(tmp_path / "a.csv") == [records[0], {"image": "b.png", "caption": "two\nlines"}]
    assert read_records(tmp_path / "a.tsv") == records[:1]


def test_objects_become_records_with_sample_id_and_files_are_joined(tmp_path: Path) -> None:
    files = [{"x": {"title": 1}, "y": [2]}, [{"title": 3, "instance_id": "own"}]]
    dataset = make(tmp_path, BaseDataset, None, files=files)
    assert dataset.annotation == [
        {"sample_id": "x", "title": 1, "instance_id": "0"},
        {"sample_id": "y", "data": [2], "instance_id": "1"},
        {"title": 3, "instance_id": "own"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.json", '[{"a": 1},\n {"a": ', r"cut\.json.*line 2, column 8"),
        ("cut.jsonl", '{"a": 1}\n{"a"', r"cut\.jsonl.*line 2, column"),
        ("odd.json", "[1]", r"odd\.json: record 0 is a int"),
        ("odd.json", "3", r"odd\.json: expected a list"),
        ("odd.jsonl", '{"a": 1}\n\n[2]', r"odd\.jsonl: line 3 is a list, expected an object"),
        ("lack.jsonl", '\n{"a": 1}\n \n{"b": 1}', r"lack\.jsonl: line 4 has no field 'a'; .*'b'"),
        ("lack.json", '[{"a": 1}, {"b": 1, "c": 2}]', r"lack\.json: record 1 has no field 'a'; .*'b', 'c'"),
        ("null.json", '[{"a": null}]', r"record 0: field 'a' is null"),
        ("wide.csv", "a,b\n1,2,3\n", r"wide\.csv: line 2 has 3 columns"),
        ("what.xml", "<a/>", r"what\.xml: unknown kind .*\.jsonl"),
    ],
)
def test_bad_annotation_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    files = SplitFiles(paths=[tmp_path / name], split="val")
    with pytest.raises(ValueError, match=message):
        list(files.records(files.needs("a")))


def test_missing_annotation_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_records(tmp_path / "none.json")


# Captions, pairs, retrieval


def test_caption_training_counts_images_in_first_seen_order(root: Path) -> None:
    records = [
        {"image": "b.png", "caption": "Second", "image_id": "coco_9"},
        {"image": "a.png", "caption": ["First", "?"], "image_id": "coco_2"},
        {"image": "b.png", "caption": "Zweites Bild", "image_id": "coco_9"},
    ]
    dataset = make(root, CaptionTrainDataset, records, split="train", text_processor=str.lower)
    batch = dataset.collater([dataset[i] for i in range(4)])
    assert batch["text_input"] == ["second", "first", "?", "zweites bild"]
    assert batch["image"].flatten().tolist() == [1, 0, 0, 1]
    assert batch["image_id"].tolist() == [0, 1, 1, 0]
    assert batch["image_id"].dtype == torch.long
    assert batch["instance_id"] == ["0", "1", "2", "3"]
    assert dataset.collater([dataset[0]])["image"].shape == (1, 1)


@pytest.mark.parametrize(
    ("records", "ids"),
    [
        ([{"image": "val2014/COCO_val2014_000000391895.png", "caption": ["c", "d"]}], [391895]),
        ([{"image": "a.png", "img_id": "x-1"}, {"image": "b.png", "img_id": "y"}], ["x-1", "y"]),
        ([{"image": "a.png", "image_id": 7, "caption": "c"}, {"image": "a.png", "image_id": 7, "caption": "d"}], [7]),
        ([{"image": "one/1.png"}, {"image": "two/1.png"}], ["one/1.png", "two/1.png"]),
        ([{"image": "a.png", "caption": "c"}, {"image": "b.png", "caption": "d"}], ["a.png", "b.png"]),
    ],
)
def test_caption_evaluation_ids(root: Path, records: list[Any], ids: list[Any]) -> None:
    dataset = make(root, CaptionEvalDataset, records)
    assert [record["image_id"] for record in dataset.annotation] == ids
    captions = [c for r in records for c in (r.get("caption") or [])]
    assert [c for texts in dataset.references().values() for c in texts] == captions


def test_caption_files_of_coco_itself(root: Path) -> None:
    coco = {
        "images": [{"id": 5, "file_name": "b.png"}, {"id": 6, "file_name": "a.png"}],
        "annotations": [{"image_id": 6, "id": 1, "caption": "x"}, {"image_id": 5, "id": 2, "caption": "y"}] * 2,
    }
    dataset = make(root, CaptionEvalDataset, coco)
    assert dataset.references() == {5: ["y", "y"], 6: ["x", "x"]}
    batch = dataset.collater([dataset[0], dataset[1]])
    assert batch["image_id"] == [5, 6]
    assert batch["image"].flatten().tolist() == [1, 0]
    assert len(make(root, CaptionTrainDataset, coco, split="train")) == 4


def test_pairs(root: Path) -> None:
    dataset = make(root, PairsDataset, [{"image": str(root / "images" / "b.png"), "caption": "日本 text"}])
    assert dataset[0]["text_input"] == "日本 text"
    assert dataset[0]["image"].item() == 1


def test_images_without_processor_do_not_become_a_batch(root: Path) -> None:
    (root / "notes.json").write_text('[{"image": "a.png", "caption": "x"}]')
    dataset = PairsDataset([root / "notes.json"], root / "images", split="train")
    assert isinstance(dataset[0]["image"], Image.Image)
    with pytest.raises(ValueError, match="vis_processor"):
        dataset.collater([dataset[0]])


def test_retrieval_evaluation_indices(root: Path) -> None:
    records = [
        {"image": "a.png", "caption": ["A", "B"]},
        {"image": "b.png", "caption": "C"},
        {"image": "a.png", "caption": "D"},
    ]
    dataset = make(root, RetrievalEvalDataset, records, text_processor=str.lower)
    assert dataset.text == ["a", "b", "d", "c"]
    assert dataset.img2txt == [[0, 1, 2], [3]]
    assert dataset.txt2img == [0, 0, 0, 1]
    assert dataset.collater([dataset[1]])["index"] == [1]
    assert make(root, RetrievalTrainDataset, records, split="train").image_index == [0, 0, 1, 0]


# Questions


def test_vqa_training_weights(root: Path) -> None:
    records = [
        {"question_id": 1, "question": "What?", "answer": ["wood"] * 7 + ["oak"] * 2 + ["tree"], "image": "a.png"},
        {"question_id": 2, "question": "How many?", "answer": "two", "image": "b.png"},
        {"question_id": "q", "question": "To?", "direct_answers": ["ride", "bus"], "image": "b.png"},
        {"question": "?", "answers": [{"answer": "x"}, {"answer": "x"}], "image": "b.png"},
    ]
    dataset = make(root, VQATrainDataset, records, split="train", answer_weight=0.2)
    batch = dataset.collater([dataset[i] for i in range(4)])
    assert batch["answer"] == ["wood", "oak", "tree", "two", "ride", "bus", "x"]
    assert torch.allclose(batch["weight"], torch.tensor([0.7, 0.2, 0.1, 0.2, 0.5, 0.5, 1.0]))
    assert batch["n_answers"].tolist() == [3, 1, 2, 1]
    assert batch["text_input"] == ["What?", "How many?", "To?", "?"]
    assert batch["text_output"][1::2] == ["two", "x"]
    seed_sample(0)
    drawn = Counter(dataset[0]["text_output"] for _ in range(300))
    assert drawn.keys() == {"wood", "oak", "tree"}
    assert 180 < drawn["wood"] < 240  # 7 of 10; five standard deviations are 40
    seed_sample(3)
    first = dataset[0]["text_output"]
    seed_sample(3)
    assert dataset[0]["text_output"] == first
    with pytest.raises(ValueError, match=r"record 0 has no field 'answer' or 'answers' .*'question'"):
        make(root, VQATrainDataset, [{"question": "?", "image": "a.png"}], split="train")


def test_vqa_official_files_are_recognised_and_merged(root: Path) -> None:
    question = {"question_id": 4, "question": "Q?", "image": "a.png"}
    truth = {
        "question_id": 4,
        "answers": [{"answer": "yes", "answer_id": 1}],
        "question_type": "is",
        "answer_type": "yes/no",
    }
    official = {"data_subtype": "val2014", "questions": [{"question_id": 4, "question": "Q?", "image_id": 391895}]}
    dataset = make(root, VQAEvalDataset, None, files=[[question], ["yes", "no"], official, {"annotations": [truth]}])
    assert dataset.answer_list == ["yes", "no"]
    expected = {**question, **truth, "answers": ["yes"], "instance_id": "0"}
    assert dataset.annotation == [expected]
    assert dataset.collater([dataset[0]])["question_id"] == [4]
    alone = make(root, VQAEvalDataset, None, files=[official, {"annotations": [truth]}])
    assert alone.annotation[0]["image"] == "val2014/COCO_val2014_000000391895.jpg"
    assert alone.annotation[0]["answers"] == ["yes"]
    assert alone.answer_list is None


def test_vqa_answers_to_score_are_a_list_of_texts(root: Path) -> None:
    """A single text is one answer, not its letters; numbers are texts."""
    given = ["red", ["red", "pink"], 2, [{"answer": 3}, {"answer": "three"}], []]
    records = [{"question": "?", "image": "a.png", "answers": answers} for answers in given]
    dataset = make(root, VQAEvalDataset, records)
    assert [r["answers"] for r in dataset.annotation] == [["red"], ["red", "pink"], ["2"], ["3", "three"], []]


# Two images; classes


def test_nlvr_swaps_only_in_training_and_only_whole_words(root: Path) -> None:
    assert swap_sides("Left is bright, the leftmost RIGHT one left") == "Right is bright, the leftmost LEFT one right"
    records = [{"images": ["a.png", "b.png"], "sentence": "one on the left", "label": "False"}]
    evaluation = make(root, NLVREvalDataset, records)
    seen = {(s["image0"].item(), s["text_input"]) for s in (evaluation[0] for _ in range(20))}
    assert seen == {(0.0, "one on the left")}
    torch.manual_seed(0)
    training = make(root, NLVRTrainDataset, records, split="train")
    seen = {(s["image0"].item(), s["image1"].item(), s["text_input"]) for s in (training[0] for _ in range(40))}
    assert seen == {(0.0, 1.0, "one on the left"), (1.0, 0.0, "one on the right")}
    assert training.collater([training[0]])["label"].tolist() == [0]
    with pytest.raises(ValueError, match=r"record 0: label 'maybe'"):
        make(root, NLVREvalDataset, [{**records[0], "label": "maybe"}])
    with pytest.raises(ValueError, match="list of two paths"):
        make(root, NLVREvalDataset, [{**records[0], "images": ["a.png"]}])


def test_snli_ve_labels_and_image_names(root: Path) -> None:
    Image.new("RGB", (2, 2)).save(root / "images" / "4705552913.jpg")
    classes = packaged_dataset("snli_ve")["classes"]
    records = [
        {"image": "4705552913", "sentence": "s", "label": label} for label in ("entailment", "neutral", "contradiction")
    ]
    dataset = make(root, ClassificationDataset, records, classes=list(classes))
    assert dataset.collater([dataset[i] for i in range(3)])["label"].tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="Did you mean 'neutral'"):
        make(root, ClassificationDataset, [{**records[0], "label": "neutrall"}], classes=list(classes))
    assert make(root, ClassificationDataset, [{**records[0], "label": 3}])[0]["label"] == 3


# Builders


def info(root: Path, **annotations: Any) -> dict[str, Any]:
    return {"annotations": annotations, "images": {"storage": str(root / "images")}}


def test_builder_storage_and_local_url(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_DATA", str(root))
    (root / "train.jsonl").write_text('{"image": "a.png", "caption": "x"}\n')
    annotations = {"train": {"storage": "train.jsonl"}, "val": {"url": str(root / "train.jsonl")}}
    built = CaptionBuilder(build_info={"annotations": annotations, "images": {"storage": "images"}}).build()
    assert isinstance(built["train"], CaptionTrainDataset)
    assert isinstance(built["val"], CaptionEvalDataset)
    assert built["train"][0]["image"].size == (2, 2)
    assert list(CaptionBuilder(build_info=info(root, **annotations)).build(["val"])) == ["val"]


def test_builder_fetches_an_address_into_the_storage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_DATA", str(root / "data"))
    (root / "fetched").write_text('[{"image": "a.png", "caption": "x"}]')
    asked = []

    def fetch(url: str, **options: Any) -> Path:
        asked.append((url, options["md5"]))
        return root / "fetched"

    monkeypatch.setattr("lavis_lite.common.sources.download.fetch", fetch)
    entry = {"url": "https://example.org/t.json", "md5": "0" * 32, "storage": "sub/t.json"}
    builder = CaptionBuilder(build_info=info(root, train=entry))
    builder.prepare()
    assert len(builder.build()["train"]) == 1
    assert asked == [("https://example.org/t.json", "0" * 32)]  # once: afterwards it's there
    assert [path.name for path in (root / "data" / "sub").iterdir()] == ["t.json"]


@pytest.mark.parametrize(
    ("build_info", "error", "message"),
    [
        ({}, ValueError, "names no split"),
        ({"annotations": {"train": {}}}, ValueError, r"build_info\.annotations\.train needs a url or a storage"),
        (
            {"annotations": {"train": {"storage": ["a", "b"], "url": ["c"]}}},
            ValueError,
            "url has 1 entries, expected 2",
        ),
        ({"annotations": {"train": {"storage": "gone.json"}}}, FileNotFoundError, r"gone\.json.*LAVIS_LITE_DATA"),
        ({"annotations": {"train": {"url": "/no/such.json"}}}, FileNotFoundError, r"/no/such\.json"),
    ],
)
def test_builder_errors(build_info: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CaptionBuilder(build_info=build_info).build()


def test_missing_image_folder_and_split_and_processor(root: Path) -> None:
    (root / "t.json").write_text('[{"image": "a.png", "question": "?", "answer": "x"}]')
    annotations = {"train": {"storage": str(root / "t.json")}}
    with pytest.raises(FileNotFoundError, match=r"/no/images.*LAVIS_LITE_DATA"):
        VQABuilder(build_info={"annotations": annotations, "images": {"storage": "/no/images"}}).build()
    builder = VQABuilder(build_info=info(root, **annotations), answer_weight=0.2)
    with pytest.raises(KeyError, match="no split 'val'; there are train"):
        builder.build(["val"])
    assert builder.build()["train"][0]["weight"] == [0.2]
    with pytest.raises(KeyError, match="blip_caption"):
        VQABuilder(build_info=info(root, **annotations), text_processor={"train": {"name": "blip_captoin"}}).build()


@pytest.mark.parametrize("name", dataset_zoo.names())
def test_every_yaml_is_a_builders(name: str) -> None:
    """Each YAML has its builder, and each registered builder a default YAML; the entries name files and splits."""
    assert name in registry.list_builders()
    for kind in dataset_zoo.types(name):
        assert list(load_yaml(dataset_zoo.path(name, kind))["datasets"]) == [name]
        builder = registry.get_builder_class(name)(**packaged_dataset(name, kind))
        for entry in (builder.build_info.get("annotations") or {}).values():
            if entry is None:
                continue  # takes out a split of the base
            assert entry["storage"]
            urls = entry.get("url", [])
            assert all(url.startswith("https://") for url in (urls if isinstance(urls, list) else [urls]))


def test_every_builder_has_a_default_yaml() -> None:
    assert set(registry.list_builders()) == set(dataset_zoo.names())


def test_load_dataset_reads_the_yaml(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_DATA", str(root))
    (root / "coco").mkdir()
    (root / "images").rename(root / "coco" / "images")
    (root / "coco" / "annotations").mkdir()
    records = [{"image": "val2014/COCO_val2014_000000391895.png", "caption": ["c1 ", "c2"]}]
    (root / "coco" / "annotations" / "coco_karpathy_val.json").write_text(json.dumps(records))
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    with pytest.raises(KeyError, match="default"):
        load_dataset("coco_caption", "defautl")
    assert load_dataset("coco_caption", splits=["val"])["val"].references() == {391895: ["c1 ", "c2"]}


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, lavis_lite.datasets as d; d.dataset_zoo; str(d.dataset_zoo); assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_classification_builder_passes_classes(root: Path) -> None:
    (root / "t.csv").write_text("image,text,label\na.png,hello,cat\n")
    entry = {"storage": str(root / "t.csv")}
    built = ClassificationBuilder(build_info=info(root, test=entry), classes=["dog", "cat"]).build()
    assert built["test"][0]["label"] == 1
    assert built["test"][0]["text_input"] == "hello"


# Datasets that are a YAML alone


def project(root: Path, section: dict[str, Any], *, imports: list[str] | None = None) -> Config:
    """The configuration of a run with the dataset `flowers`."""
    model = {"arch": "blip_caption", "model_type": "tiny"}
    tree = {"model": model, "datasets": {"flowers": section}, "run": {"task": "captioning"}, "imports": imports or []}
    (root / "project.yaml").write_text(json.dumps(tree))
    return Config.from_file(root / "project.yaml")


def build(root: Path, section: dict[str, Any], **imports: Any) -> Any:
    """The split `train` of the dataset `flowers`, built as a run builds it."""
    cfg = project(root, section, **imports)
    own = {"vis_processor": {}, "text_processor": {}}
    cfg.datasets["flowers"] |= own
    return CaptionTask().build_datasets(cfg)["flowers"]["train"]


def lines(root: Path, *records: dict[str, Any]) -> dict[str, Any]:
    (root / "own.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return info(root, train={"storage": str(root / "own.jsonl")})


def test_a_dataset_of_ones_own_has_a_layout_and_columns(root: Path) -> None:
    files = lines(root, {"file_name": "a.png", "text": "a tulip"}, {"file_name": "b.png", "text": ["two", "three"]})
    columns = {"image": "file_name", "caption": "text"}
    dataset = build(root, {"layout": "caption", "columns": columns, "build_info": files})
    assert isinstance(dataset, CaptionTrainDataset)
    assert [dataset[i]["text_input"] for i in range(len(dataset))] == ["a tulip", "two", "three"]
    own = {"layout": "vqa_instruct", "columns": {"question": "q", "answer": "a"}}
    dataset = build(root, {**own, "build_info": lines(root, {"image": "a.png", "q": "what?", "a": "red"})})
    assert dataset[0]["text_output"] == "red"
    own = {"layout": "pairs", "columns": {"caption": "q"}}
    assert isinstance(build(root, {**own, "build_info": lines(root, {"image": "a.png", "q": "x"})}), PairsDataset)


def test_a_renamed_field_takes_the_place_of_another() -> None:
    records = [{"text": "x", "label": "red", "caption": "old"}, {"caption": "c"}]
    assert rename_columns(records, {"caption": "text", "answer": "label"}, Path("own.json")) == [
        {"caption": "x", "answer": "red"},
        {"caption": "c"},
    ]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"layout": "captoin"}, ["datasets.flowers.layout", "'captoin'", "'caption'"]),
        ({"layout": "caption", "columns": {"caption": "txt"}}, ["own.jsonl", "columns.caption", "'txt'", "'text'"]),
        ({"layout": "caption", "columns": {"image": "text"}}, ["own.jsonl: line 1", "'caption'"]),
        ({"layout": "caption", "columns": 3}, ["datasets.flowers.columns", "3"]),
        ({"layout": "caption", "reader": "caption"}, ["reader", "'caption'", "'captions'"]),
        ({"layout": "caption", "reader": "no_such_module.read"}, ["reader", "no_such_module", "imports"]),
        ({"layout": "caption", "reader": "json.no_such_reader"}, ["reader", "json", "'no_such_reader'"]),
    ],
)
def test_mistakes_in_a_dataset_of_ones_own_are_named(root: Path, section: dict[str, Any], words: list[str]) -> None:
    files = lines(root, {"image": "a.png", "text": "a tulip"})
    with pytest.raises(UserError) as error:
        build(root, {**section, "build_info": files})
    assert all(word in str(error.value) for word in words), error.value


@pytest.fixture
def flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the reader of docs/data.md."""
    (code,) = re.findall(r"```python\n(# my_flowers\.py\n.*?)```", DATA_PAGE, re.DOTALL)
    (root / "my_flowers.py").write_text(code)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield root
    sys.modules.pop("my_flowers", None)


def test_a_reader_of_ones_own(flowers: Path) -> None:
    (flowers / "own.txt").write_text("a.png|a tulip\nb.png|two daisies\n")
    files = info(flowers, train={"storage": str(flowers / "own.txt")})
    section = {"layout": "caption", "reader": "my_flowers.read_lines", "build_info": files}
    dataset = build(flowers, section, imports=["my_flowers"])
    assert [(dataset[i]["text_input"], dataset.image_index[i]) for i in range(2)] == [
        ("a tulip", 0),
        ("two daisies", 1),
    ]
    (flowers / "own.txt").write_text("a.png|\nb.png|two daisies\n")
    with pytest.raises(InputError, match=r"own\.txt: record 0.*'caption'"):
        build(flowers, section, imports=["my_flowers"])


def test_a_reader_that_gives_no_records(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, "odd", lambda files: [])
    files = lines(root, {"image": "a.png"})
    with pytest.raises(InputError, match=r"own\.jsonl: .*no records"):
        build(root, {"layout": "caption", "reader": "odd", "build_info": files})


def test_a_packaged_name_is_its_layout_with_its_settings() -> None:
    builder = registry.get_builder_class("vizwiz_vqa")
    assert issubclass(builder, registry.get_builder_class("instruct"))
    assert (builder().reader, builder().blank_texts, builder().instructions) == ("vizwiz", "skip", "vqa")
    assert builder is registry.get_builder_class("vizwiz_vqa")
    with pytest.raises(KeyError, match="'coco_caption'"):
        registry.get_builder_class("coco_captoin")
    with pytest.raises(KeyError, match="'coco_caption' is taken"):
        registry.register_builder("coco_caption")(CaptionBuilder)


def test_a_split_of_a_base_is_removed_by_null() -> None:
    assert registry.get_builder_class("coco_vqa")(**packaged_dataset("coco_vqa", "eval")).splits() == ["val"]
