"""Zero-shot classification by prompts: features and matching by hand, metrics by hand, and the entry points."""

import json
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import torch.nn.functional as F
import yaml

from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.models import load_model
from lavis_lite.models.batches import by_length
from lavis_lite.tasks.zero_shot_classification import ZeroShotClassificationTask, read_templates

LONGER = ["a red circle left of it", "dots", "a green star", "two dots", "the"]
PROMPTS = [["a red circle", "the red circle"], ["a blue square"], ["two dots", "dots", "a green dot"]]


def samples() -> dict[str, Any]:
    return {"image": torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))}


def test_texts_of_like_length_are_encoded_together() -> None:
    parts: list[list[str]] = []

    def encode(part: list[str]) -> torch.Tensor:
        parts.append(part)
        return torch.tensor([[len(text), ord(text[0])] for text in part])

    rows = by_length(encode, LONGER, at_once=2)
    assert parts == [["the", "dots"], ["two dots", "a green star"], ["a red circle left of it"]]
    assert rows.tolist() == [[len(text), ord(text[0])] for text in LONGER]


@pytest.mark.parametrize("arch", ["blip_retrieval", "blip_image_text_matching", "blip2", "blip2_image_text_matching"])
@torch.no_grad()
def test_scores_are_those_by_hand(arch: str) -> None:
    torch.manual_seed(0)
    model = load_model(arch, "tiny", is_eval=True)
    features = model.class_features(PROMPTS)
    contrast, matched = (model.class_scores(samples(), PROMPTS, features, match_head=head) for head in ("itc", "itm"))
    for number, own in enumerate(PROMPTS):
        mean = torch.stack([model.encode_text(*model.tokenize([text]))[0] for text in own]).mean(dim=0)
        feature = F.normalize(mean, dim=0)
        torch.testing.assert_close(features[number], feature, rtol=1e-4, atol=1e-5)
        for row in range(2):
            image = samples()["image"][row : row + 1]
            image_feat = model.image_features(image)[1][0]
            expected = (image_feat @ feature).max()  # of BLIP-2's queries the best; BLIP has one feature
            assert float(contrast[row, number]) == pytest.approx(float(expected), abs=1e-5)
            logs = [
                model.matching_logits(*model.tokenize([text]), model.image_context(image))[0].log_softmax(0)[1]
                for text in own
            ]
            assert float(matched[row, number]) == pytest.approx(float(torch.stack(logs).mean()), abs=1e-4)
    best = contrast.argmax(dim=1)
    first = model.class_scores(samples(), PROMPTS, features, match_head="itm", k_test=1)
    assert first.isfinite().sum(dim=1).tolist() == [1, 1]
    torch.testing.assert_close(first[range(2), best], matched[range(2), best], rtol=1e-4, atol=1e-5)


class Named:
    def __init__(self, classes: list[str]) -> None:
        self.classes = classes


def test_metrics_by_hand(tmp_path: Path) -> None:
    tops = [[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 4, 3, 2, 1], [2, 0, 1, 3, 4]]
    results = [
        {"instance_id": str(i), "top": top, "scores": [0.0] * 5, "target": target}
        for i, (top, target) in enumerate(zip(tops, [0, 0, 0, 2], strict=True))
    ]
    task = ZeroShotClassificationTask()
    found = task.score(results, dataset=Named(list("abcdef")), split="val", result_dir=tmp_path)
    assert found["acc1"] == found["agg_metrics"] == 50.0
    assert found["acc5"] == 75.0
    assert found["mean_per_class_acc"] == pytest.approx((100 / 3 + 100) / 2)
    assert "acc5" not in task.score(results, dataset=Named(list("abc")), split="val", result_dir=tmp_path)


def test_prompts_are_templates_with_the_names_of_classes(tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n\na drawing of a {}.\n")
    task = ZeroShotClassificationTask(templates=str(tmp_path / "templates.txt"), class_names={"n01": "tench"})
    found = task.prompts(Named(["n01", "gold_fish"]), "val")
    assert found == [
        ["a photo of a tench.", "a drawing of a tench."],
        ["a photo of a gold fish.", "a drawing of a gold fish."],
    ]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"templates": ["a photo"]}, r"run\.templates.*'a photo'"),
        ({"templates": []}, r"run\.templates"),
        ({"match_head": "both"}, r"run\.match_head.*both"),
        ({"k_test": -1}, r"run\.k_test.*-1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        ZeroShotClassificationTask(**settings)


def test_a_missing_file_and_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"run\.templates.*gone\.txt"):
        read_templates(str(tmp_path / "gone.txt"))
    task = ZeroShotClassificationTask(class_names={"dogg": "a dog"})
    with pytest.raises(InputError, match=r"run\.class_names.*dogg.*dog"):
        task.prompts(Named(["dog", "cat"]), "val")
    with pytest.raises(InputError, match="classes"):
        ZeroShotClassificationTask().prompts(Named([]), "val")


def test_packaged_templates_are_those_of_clip() -> None:
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    assert read_templates("imagenet") == [fill("{}") for fill in metadata.OPENAI_IMAGENET_TEMPLATES]


@pytest.mark.parametrize(
    ("arch", "head"), [("blip_retrieval", "itc"), ("blip_retrieval", "itm"), ("blip2", "itm"), ("blip2", "itc")]
)
def test_zero_shot_classification_through_the_entry_point(arch: str, head: str, tmp_path: Path) -> None:
    section = cli_helpers.classification_set(tmp_path)
    section["classes"] = ["contradiction", "neutral", "entailment"]
    path = recipe(tmp_path, arch, section, match_head=head)
    assert cli_helpers.evaluate(path) == 0
    job = tmp_path / "output/evaluation"
    results = json.loads(next(job.glob("**/val_predictions.json")).read_text())
    assert [result["target"] for result in results] == [0, 1, 2, 0, 1]
    hits = [result["top"][0] == result["target"] for result in results]
    assert cli_helpers.metrics(job, "val")["acc1"] == pytest.approx(100 * sum(hits) / 5)
    assert all(sorted(result["scores"], reverse=True) == result["scores"] for result in results)


def recipe(folder: Path, arch: str, section: dict[str, Any], **task: Any) -> Path:
    run = {"task": "zero_shot_classification", "evaluate": True, "valid_splits": ["val"], "batch_size_eval": 2, **task}
    run |= {"num_workers": 0, "output_dir": str(folder / "output"), "templates": ["a picture of {}", "{}"]}
    content = {"model": {"arch": arch, "model_type": "tiny"}, "datasets": {"classification": section}, "run": run}
    path = folder / "zero_shot.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_feature_extractor_has_no_matching_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "blip_feature_extractor", cli_helpers.classification_set(tmp_path), match_head="itm")
    assert cli_helpers.evaluate(path) != 0
    assert "run.match_head" in capsys.readouterr().err
