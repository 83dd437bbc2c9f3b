"""Examples before an instruction, and several images in one prompt."""

import json
from pathlib import Path
from typing import Any

import cli_helpers
import pyarrow as pa
import pytest
import torch
import yaml

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.instruct import InstructDataset
from lavis_lite.models import load_model

COLORS = ("red", "blue", "green", "black", "white")
EYES = {name: {"name": "blip_image_eval", "image_size": 48} for name in ("train", "eval")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five training records and three to evaluate, of which the first shows a training image."""
    files = cli_helpers.pictures(tmp_path / "pictures", 7)
    train = [{"image": files[i], "instruction": f"what {i}?", "output": COLORS[i]} for i in range(5)]
    val = [{"image": files[i], "instruction": f"which {i}?", "output": COLORS[0]} for i in (0, 5, 6)]
    for name, records in (("train", train), ("val", val)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    return tmp_path


def section(root: Path, **keys: Any) -> dict[str, Any]:
    storage = {split: {"storage": str(root / f"{split}.json")} for split in ("train", "val")}
    return {"build_info": {"annotations": storage}, "vis_processor": EYES, **keys}


def built(root: Path, split: str = "val", **keys: Any) -> InstructDataset:
    dataset = registry.get_builder_class("instruct")(**section(root, **keys)).build([split])[split]
    assert isinstance(dataset, InstructDataset)
    return dataset


def test_examples_come_before_the_instruction(root: Path):
    template = "<{instruction}|{answer}>"
    dataset = built(root, few_shot_num=2, few_shot_template=template)
    possible = {f"<what {i}?|{color}>" for i, color in enumerate(COLORS)}
    seen = set()
    for index, number in enumerate((0, 5, 6)):
        text = dataset[index]["text_input"]
        assert text.endswith(f">which {number}?")
        examples = [f"{part}>" for part in text.split(">")[:-1]]
        assert len(set(examples)) == len(examples) == 2
        assert set(examples) <= possible
        assert f"<what {number}?|{COLORS[0]}>" not in examples or number  # no example shows the sample's own image
        assert dataset[index]["image"].shape == (3, 48, 48)
        seen |= set(examples)
    again = built(root, few_shot_num=2, few_shot_template=template)
    assert [again[i]["text_input"] for i in range(3)] == [dataset[i]["text_input"] for i in range(3)]
    other = built(root, few_shot_num=2, few_shot_template=template, few_shot_seed=1)
    assert [other[i]["text_input"] for i in range(3)] != [dataset[i]["text_input"] for i in range(3)]


def test_no_example_shows_the_sample_s_own_image_from_another_table(root: Path):
    pq = pytest.importorskip("pyarrow.parquet")
    for split in ("train", "val"):
        records = json.loads((root / f"{split}.json").read_text())
        rows = [{**record, "image": Path(record["image"]).read_bytes()} for record in records]
        pq.write_table(pa.Table.from_pylist(rows), root / f"{split}.parquet")
    keys = {"few_shot_num": 4, "few_shot_template": "<{instruction}|{answer}>"}
    storage = {split: {"storage": str(root / f"{split}.parquet")} for split in ("train", "val")}
    builder = registry.get_builder_class("instruct")(build_info={"annotations": storage}, vis_processor=EYES, **keys)
    text = builder.build(["val"])["val"][0]["text_input"]
    assert sorted(text.split(">")[:-1]) == [f"<what {i}?|{COLORS[i]}" for i in (1, 2, 3, 4)]


def test_the_default_template_and_the_training_split(root: Path):
    assert built(root, few_shot_num=1)[1]["text_input"].count("\n\n") == 1
    assert "\n" not in built(root, "train", few_shot_num=1)[1]["text_input"]
    assert built(root)[1]["text_input"] == "which 5?"


def test_images_of_examples_are_shown_first(root: Path):
    dataset = built(root, few_shot_num=2, few_shot_images=True, few_shot_template="{instruction}{answer};")
    sample, train = dataset[1], built(root, "train")
    assert sample["image"].shape == (3, 3, 48, 48)
    shown = [int(part.split("?")[0].removeprefix("what ")) for part in sample["text_input"].split(";")[:2]]
    for frame, number in enumerate(shown):
        assert torch.equal(sample["image"][:, frame], train[number]["image"])
    assert torch.equal(sample["image"][:, 2], built(root)[1]["image"])


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"few_shot_num": 6}, "few_shot_num.*'train' has 5"),
        ({"few_shot_num": -1}, "few_shot_num"),
        ({"few_shot_num": 1, "few_shot_split": "tain"}, "few_shot_split.*train"),
        ({"few_shot_num": 1, "few_shot_template": "{instruction}"}, "few_shot_template.*answer"),
    ],
)
def test_mistakes_name_the_key(keys: dict[str, Any], match: str, root: Path):
    with pytest.raises(InputError, match=match):
        built(root, **keys)


def test_too_few_examples_of_other_images(root: Path):
    dataset = built(root, few_shot_num=5)
    assert dataset[1]["text_input"].count("what") == 5
    with pytest.raises(InputError, match="only 4"):
        dataset[0]


def test_several_images_of_a_record_are_frames_in_order(root: Path):
    files = cli_helpers.pictures(root / "more", 4)
    records = [{"image": files[i : i + 2], "instruction": "same?", "output": "no"} for i in (0, 2)]
    (root / "train.json").write_text(json.dumps(records))
    dataset = built(root, "train")
    batch = dataset.collater([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 3, 2, 48, 48)
    assert not torch.equal(batch["image"][0, :, 0], batch["image"][0, :, 1])
    assert dataset.files_of(dataset.annotation[0]) == files[:2]
    torch.manual_seed(0)
    model = load_model("blip2_vicuna_instruct", "tiny", is_eval=True)
    one_by_one = [model.image_embeds({"image": batch["image"][:, :, i]}, ["same?"] * 2) for i in range(2)]
    both = model.image_embeds(batch, ["same?"] * 2)
    assert torch.allclose(both, torch.cat(one_by_one, dim=1), atol=1e-5)


@pytest.mark.parametrize("images", [[], ["a.png"], [1]])
def test_lists_of_images_that_do_not_fit_are_refused(images: list[Any], root: Path):
    records = [{"image": ["a.png", "b.png"], "instruction": "same?", "output": "no"}]
    (root / "train.json").write_text(json.dumps([*records, {**records[0], "image": images}]))
    with pytest.raises(InputError, match=r"train\.json.*image"):
        built(root, "train")


@pytest.mark.slow
@pytest.mark.parametrize("images", [False, True])
def test_a_run_with_examples(images: bool, root: Path):
    keys = {"few_shot_num": 2, "few_shot_images": images}
    run = {**cli_helpers.RUN, "task": "instruct", "test_splits": [], "max_len": 3, "output_dir": str(root)}
    model = {"arch": "blip2_vicuna_instruct", "model_type": "tiny"}
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump({"model": model, "datasets": {"instruct": section(root, **keys)}, "run": run}))
    assert cli_helpers.evaluate(path, job="few") == 0
    assert "accuracy" in cli_helpers.metrics(root / "few", "val")
