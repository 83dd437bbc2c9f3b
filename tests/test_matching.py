"""The task `matching`, and what models score for it: pairs of images and texts, by both heads."""

import json
from pathlib import Path
from typing import Any

import cli_helpers
import pyarrow as pa
import pytest
import torch

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models import load_model
from lavis_lite.models.protocols import ScoresPairs
from lavis_lite.tasks.matching import MatchingTask, label_of

TEXTS = ["a red circle", "two blue squares", "a cross above a red circle", "image 4 of 5"]
SCORING = {
    *("blip2", "blip2_feature_extractor", "blip2_image_text_matching"),
    *("blip_image_text_matching", "blip_pretrain", "blip_retrieval"),
}


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(3))


def test_models_with_both_heads_score_pairs() -> None:
    classes = {name: registry.get_model_class(name) for name in registry.list_models()}
    own = {name for name, one in classes.items() if one.__module__.startswith("lavis_lite.")}
    assert {name for name in own if issubclass(classes[name], ScoresPairs)} == SCORING


@pytest.mark.parametrize("arch", ["blip_image_text_matching", "blip2_image_text_matching"])
def test_scores_are_those_of_each_pair_alone(arch: str) -> None:
    """Two texts of each image; the model's own `forward` scores one pair at a time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = load_model(arch, "tiny", is_eval=True)
    images = pictures()
    scores = model.match_scores({"image": images, "text_input": TEXTS})
    assert {name: (tuple(s.shape), s.dtype) for name, s in scores.items()} == {
        "itm": ((4,), torch.float32),
        "itc": ((4,), torch.float32),
    }
    for number, text in enumerate(TEXTS):
        pair = {"image": images[number // 2 : number // 2 + 1], "text_input": [text]}
        with torch.no_grad():
            no_match, match = model(pair)[0].tolist()
            similarity = model(pair, match_head="itc").item()
        probability = 1 / (1 + 2.718281828459045 ** (no_match - match))
        assert scores["itm"][number].item() == pytest.approx(probability, abs=1e-5)
        assert scores["itc"][number].item() == pytest.approx(similarity, abs=1e-5)


def test_texts_that_do_not_divide_among_the_images_are_refused() -> None:
    model: Any = load_model("blip_image_text_matching", "tiny", is_eval=True)
    with pytest.raises(InputError, match=r"text_input: 3 texts .* 2 images"):
        model.match_scores({"image": pictures(), "text_input": TEXTS[:3]})


def recipe(folder: Path, records: list[dict[str, Any]]) -> Path:
    pairs = cli_helpers.user_set(folder / "pairs", {"test": records})
    change = {
        "model": {"arch": "blip_image_text_matching", "embed_dim": 16},
        "datasets": {"shapes_pairs": None, "pairs": pairs},
        "run": {"task": "matching", "valid_splits": [], "test_splits": ["test"]},
    }
    path = cli_helpers.project(folder, "pretrain", change)
    path.write_text(path.read_text().replace("  queue_size: 48\n", ""))
    return path


@pytest.fixture
def records(tmp_path: Path, shapes_data: Path) -> list[dict[str, Any]]:
    paths = cli_helpers.pictures(tmp_path / "pictures", 5)
    texts = [*TEXTS, "a green cross"]
    labels = [1, False, "true", "0", True]
    return [
        {"image": path, "caption": text, "label": label, "image_id": f"p{number}"}
        for number, (path, text, label) in enumerate(zip(paths, texts, labels, strict=True))
    ]


def test_the_result_file_has_scores_and_the_areas_are_the_shares_of_ordered_pairs(
    records: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert cli_helpers.evaluate(recipe(tmp_path, records)) == 0
    folder = tmp_path / "output/evaluation"
    found = json.loads((folder / "result/test_matching.json").read_text())
    assert [(row["instance_id"], row["image_id"], row["caption"], row["label"]) for row in found] == [
        (str(n), f"p{n}", record["caption"], label)
        for n, (record, label) in enumerate(zip(records, [1, 0, 1, 0, 1], strict=True))
    ]
    measured = cli_helpers.metrics(folder, "test")
    for row in found:
        row["num_words"] = len(row["caption"].split())
    for name in ("itm", "itc", "num_words"):
        right = [row[name] for row in found if row["label"]]
        wrong = [row[name] for row in found if not row["label"]]
        wins = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
        assert measured[f"auc_{name}"] == pytest.approx(100 * sum(wins) / len(wins))
    assert measured["agg_metrics"] == measured["auc_itm"]


def test_images_inside_a_table_are_named_by_their_rows(records: list[dict[str, Any]], tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    path = recipe(tmp_path, records)
    assert cli_helpers.evaluate(path) == 0
    rows = [{"image": Path(record["image"]).read_bytes(), "caption": record["caption"]} for record in records]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    option = f"datasets.pairs.build_info.annotations.test.storage={tmp_path / 'pairs.parquet'}"
    assert cli_helpers.evaluate(path, option, job="table") == 0
    files, table = (
        json.loads((tmp_path / f"output/{job}/result/test_matching.json").read_text())
        for job in ("evaluation", "table")
    )
    assert [row["itm"] for row in table] == [row["itm"] for row in files]
    assert all(f"pairs.parquet: row {number}" in row["image"] for number, row in enumerate(table))


def test_without_labels_there_are_scores_alone(records: list[dict[str, Any]], tmp_path: Path) -> None:
    for record in records:
        del record["label"]
    assert cli_helpers.evaluate(recipe(tmp_path, records)) == 0
    folder = tmp_path / "output/evaluation"
    assert cli_helpers.metrics(folder, "test")["agg_metrics"] is None
    assert all(0 < row["itm"] < 1 for row in json.loads((folder / "result/test_matching.json").read_text()))


def test_shuffled_images_give_each_text_the_next_image(records: list[dict[str, Any]], tmp_path: Path) -> None:
    path = recipe(tmp_path, records)
    assert cli_helpers.evaluate(path, "run.batch_size_eval=5", "run.shuffle_images=true") == 0
    shuffled = json.loads((tmp_path / "output/evaluation/result/test_matching.json").read_text())
    images = [record["image"] for record in records]
    for number, record in enumerate(records):
        record["image"] = images[number - 1]
    assert cli_helpers.evaluate(recipe(tmp_path, records), "run.batch_size_eval=5", job="moved") == 0
    moved = json.loads((tmp_path / "output/moved/result/test_matching.json").read_text())
    assert [row["itm"] for row in shuffled] == pytest.approx([row["itm"] for row in moved], abs=1e-6)


@pytest.mark.parametrize(
    ("label", "words"), [(2, ("record 1", "2")), ("maybe", ("record 1", "maybe")), (None, ("record 1", "label"))]
)
def test_a_wrong_or_missing_label_is_named(
    label: Any,
    words: tuple[str, ...],
    records: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records[1]["label"] = label
    assert cli_helpers.evaluate(recipe(tmp_path, records)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in words), error


def test_labels_are_read_as_tables_have_them() -> None:
    assert [label_of({"label": value}, "x") for value in (1, 0, True, "1", "False", None)] == [
        *(True, False, True, True, False, None)
    ]
    with pytest.raises(InputError, match=r"here: .*\[1\]"):
        label_of({"label": [1]}, "here")


def test_shuffled_features_keep_their_masks() -> None:
    """Features of another encoder have a mask, which says how many of them count."""

    class Model:
        def match_scores(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
            assert torch.equal(samples["image"].sum(dim=(1, 2)), samples["image_mask"].sum(dim=1).float())
            return {"itm": samples["image_mask"].sum(dim=1) / 10}

    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    samples = {
        "image": mask[..., None].float(),
        "image_mask": mask,
        "text_input": ["a", "b"],
        "instance_id": ["0", "1"],
    }
    results = MatchingTask(shuffle_images=True).valid_step(Model(), samples)
    assert [result["itm"] for result in results] == pytest.approx([0.1, 0.3])
