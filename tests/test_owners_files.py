"""Owners' files through packaged datasets and tasks: training collation, evaluation, metrics and server files."""

import json
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import test_owners as owners
import yaml
from PIL import Image

from lavis_lite.datasets.annotations import read_records
from lavis_lite.registry import registry


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), "red").save(path)


def built(name: str, split: str, content: Any, root: Path, *, suffix: str = ".json", **more: Any) -> Any:
    """The split of a packaged dataset, of one owner's file and the images below `root`."""
    path = root / f"annotations{suffix}"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    files = {"annotations": {split: {"storage": str(path)}}, "images": {"storage": str(root)}}
    section = yaml.safe_load((Path(cli_helpers.ROOT) / f"lavis_lite/configs/datasets/{name}/default.yaml").read_text())
    body = dict(section["datasets"][name] or {})
    layout = body.pop("layout", name)
    eye = {"name": "blip_image_eval", "image_size": 16}
    body |= {"build_info": files, "vis_processor": {"train": eye, "eval": eye}, **more}
    builder = registry.get_builder_class(layout)(**body)
    return builder.build([split])[split]


@pytest.mark.parametrize(
    ("name", "split", "content", "files", "keys"),
    [
        ("coco_caption", "train", owners.KARPATHY_COCO, ["val2014/COCO_val2014_000000391895.jpg"], {"text_input"}),
        ("coco_caption", "test", owners.KARPATHY_COCO, ["val2014/COCO_val2014_000000391895.jpg"], {"image_id"}),
        ("flickr30k_caption", "val", owners.KARPATHY_FLICKR, ["1000092795.jpg"], {"image_id"}),
        ("gqa", "val", owners.GQA, ["2354786.jpg"], {"question_id"}),
        ("aok_vqa", "val", owners.AOKVQA, ["val2017/000000461751.jpg"], {"question_id"}),
        ("snli_ve", "test", owners.SNLI_VE, ["4705552913.jpg"], {"label"}),
        ("vg_caption", "train", owners.GENOME_REGIONS, ["VG_100K/7.jpg"], {"text_input"}),
        ("vg_vqa", "train", owners.GENOME_QUESTIONS, ["VG_100K/7.jpg"], {"answer"}),
        ("sbu_caption", "train", owners.SBU, ["4385058960_b0f291553e.jpg"], {"text_input"}),
        ("conceptual_caption_3m", "train", owners.BLIP, ["00000/000000001.jpg"], {"text_input"}),
        ("nocaps", "val", owners.NOCAPS, ["0013ea2087020901.jpg"], {"image_id"}),
        ("iconqa", "test", owners.ICONQA, ["test/choose_txt/0/image.png"], {"candidates"}),
    ],
)
def test_an_owners_file_makes_samples_and_batches(
    name: str, split: str, content: Any, files: list[str], keys: set[str], tmp_path: Path
) -> None:
    for file in ["train2014/COCO_train2014_000000391895.jpg", *files]:
        image(tmp_path / file)
    dataset = built(name, split, content, tmp_path)
    batch = dataset.collater([dataset[index] for index in range(len(dataset))])
    assert keys | {"image"} <= batch.keys()
    assert batch["image"].shape[1:] == (3, 16, 16)


def test_nlvr2_as_its_owner_writes_it(tmp_path: Path) -> None:
    """One object per line, in a file that is called .json."""
    lines = "\n".join(json.dumps({**owners.NLVR2[0], "identifier": f"dev-1-0-{n}", "label": "False"}) for n in (0, 1))
    for side in (0, 1):
        image(tmp_path / f"images/dev/dev-1-0-img{side}.png")
    rows = [{key: value for key, value in json.loads(line).items() if key != "directory"} for line in lines.split("\n")]
    dataset = built("nlvr", "val", "\n".join(map(json.dumps, rows)), tmp_path)
    assert len(dataset) == 2
    assert dataset[1]["label"] == 0
    assert dataset.annotation[1]["identifier"] == "dev-1-0-1"


def test_flickrs_token_file(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg")
    dataset = built(
        "flickr30k_caption", "train", "1.jpg#0\tTwo men.\n1.jpg#1\tMen outside.\n", tmp_path, suffix=".token"
    )
    assert [dataset[index]["text_input"] for index in range(2)] == ["two men", "men outside"] or len(dataset) == 2
    (tmp_path / "bad.token").write_text("1.jpg\tTwo men.\n")
    with pytest.raises(ValueError, match=r"bad\.token: line 1: expected <image>#<number>"):
        read_records(tmp_path / "bad.token")


@pytest.mark.parametrize("line", ['a "dog\thttp://example.org/1.jpg', 'https://example.org/1.jpg\ta "dog'])
def test_tables_of_addresses_have_no_header(line: str, tmp_path: Path) -> None:
    """CC3M has the caption first, CC12M the address; quotation marks are text."""
    path = tmp_path / "cc.tsv"
    path.write_text(f"{line}\n{line}\n")
    records = read_records(path)
    assert [record["caption"] for record in records] == ['a "dog'] * 2
    assert records[0]["url"].startswith("http")
    path.write_text(f"{line}\na line without a tab\n")
    with pytest.raises(ValueError, match="line 2: expected an address, a tab and a caption"):
        read_records(path)


def test_visual_dialogs_dense_annotations(tmp_path: Path) -> None:
    data = {
        "questions": ["is it red"],
        "answers": ["yes", "no"],
        "dialogs": [
            {
                "image_id": 3,
                "caption": "a cat",
                "dialog": [{"question": 0, "answer": 0, "answer_options": [0, 1], "gt_index": 0}],
            }
        ],
    }
    image(tmp_path / "VisualDialog_val2018/VisualDialog_val2018_000000000003.jpg")
    dense = tmp_path / "dense.json"
    dense.write_text(json.dumps([{"image_id": 3, "round_id": 1, "gt_relevance": [1.0, 0.2]}]))
    path = tmp_path / "dialogs.json"
    path.write_text(json.dumps({"data": data, "split": "val2018", "version": "1.0"}))
    folder = {"annotations": {"val": {"storage": [str(path), str(dense)]}}, "images": {"storage": str(tmp_path)}}
    builder = registry.get_builder_class("instruct")(reader="visdial", instructions="visdial", build_info=folder)
    dataset = builder.build(["val"])["val"]
    assert dataset.annotation[0]["relevance"] == [1.0, 0.2]


DIALOG = {
    "questions": ["is it red"],
    "answers": ["yes", "no"],
    "dialogs": [
        {
            "image_id": 3,
            "dialog": [{"question": 0, "answer": 0, "answer_options": [0, 1], "gt_index": 0}],
            "caption": "a",
        }
    ],
}


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"image_id": 4, "gt_relevance": [1.0, 0.2]}, "no image_id and round_id is of these dialogues"),
        ({"image_id": 3, "gt_relevance": [1.0]}, "round 3_1: the relevance must be 2 numbers from 0 to 1"),
        ({"image_id": 3, "gt_relevance": [1.0, "a"]}, "round 3_1: the relevance must be 2 numbers from 0 to 1"),
        ({"image_id": 3, "gt_relevance": [0, 0.0]}, "round 3_1: no candidate has a relevance above 0"),
    ],
)
def test_dense_annotations_that_do_not_fit_are_an_error_at_loading(
    annotation: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path, dense = tmp_path / "dialogs.json", tmp_path / "dense.json"
    path.write_text(json.dumps({"data": DIALOG, "split": "val2018"}))
    dense.write_text(json.dumps([{"round_id": 1, **annotation}]))
    folder = {"annotations": {"val": {"storage": [str(path), str(dense)]}}, "images": {"storage": str(tmp_path)}}
    builder = registry.get_builder_class("instruct")(reader="visdial", instructions="visdial", build_info=folder)
    with pytest.raises(ValueError, match=rf"dense\.json: .*{message}"):
        builder.build(["val"])


def test_a_file_without_the_split_is_an_error(tmp_path: Path) -> None:
    content = {**owners.KARPATHY_FLICKR}
    with pytest.raises(ValueError, match=r"annotations.json: has no records of the split 'test' below"):
        built("flickr30k_caption", "test", content, tmp_path)


def test_images_elsewhere_are_named(tmp_path: Path) -> None:
    dataset = built("coco_caption", "test", owners.KARPATHY_COCO, tmp_path)
    with pytest.raises(ValueError, match=r"image file not found: .*val2014/COCO_val2014_000000391895\.jpg"):
        dataset[0]


def test_gqa_is_evaluated_with_its_own_metrics(tmp_path: Path) -> None:
    image(tmp_path / "2354786.jpg")
    path = tmp_path / "gqa.json"
    path.write_text(json.dumps(owners.GQA))
    scopes = tmp_path / "choices.json"
    scopes.write_text(json.dumps({"201640614": {"valid": ["yes", "no"], "plausible": ["yes"]}}))
    files = {"storage": [str(path), str(scopes)], "url": None}
    section = {"builder": "gqa", "build_info": {"annotations": {"val": files}}}
    section["build_info"]["images"] = {"storage": str(tmp_path)}
    changes = {
        "datasets": {"shapes_vqa": None, "mine": section},
        "run": {"task": "gqa", "inference_method": "generate", "valid_splits": [], "test_splits": ["val"]},
    }
    recipe = cli_helpers.project(tmp_path, "vqa_generate", changes)
    assert cli_helpers.evaluate(recipe) == 0
    metrics = json.loads((tmp_path / "output/evaluation/evaluation.json").read_text())["metrics"]["val"]
    assert {"binary", "per_structural", "exact", "official", "validity", "plausibility"} <= metrics.keys()
    written = json.loads((tmp_path / "output/evaluation/result/val_gqa_submission.json").read_text())
    assert written[0]["questionId"] == "201640614"
