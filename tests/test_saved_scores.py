"""Scores of captions and answers in the result files: those of the models, beside the same texts."""

import json
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import yaml

from lavis_lite.common.errors import InputError
from lavis_lite.models import load_model
from lavis_lite.tasks.vqa import VQATask

ANSWERS = ["red", "a blue square", "two", "no", "yes"]


def batch(count: int = 3) -> dict[str, Any]:
    image = torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(5))
    return {"image": image, "text_input": ["what color is it?", "how many?", "is it red?"][:count]}


def tiny(arch: str) -> Any:
    torch.manual_seed(0)
    return load_model(arch, "tiny", is_eval=True)


@pytest.mark.parametrize("arch", ["blip_vqa", "blip2_opt", "blip2_t5"])
def test_the_first_scored_answer_is_the_answer(arch: str):
    model = tiny(arch)
    for settings in (
        {"inference_method": "rank", "answer_list": ANSWERS, "num_ans_candidates": 3},
        {"inference_method": "generate", "num_beams": 2, "max_len": 4},
    ):
        rows = model.scored_answers(batch(), **settings)
        assert [row[0][0] for row in rows] == model.predict_answers(batch(), **settings)
        assert {len(row) for row in rows} == {3 if settings["inference_method"] == "rank" else 1}
        assert all([score for _, score in row] == sorted((score for _, score in row), reverse=True) for row in rows)


def test_ranked_scores_are_log_likelihoods():
    model = tiny("blip2_opt")
    losses = model.class_losses({**batch(), "prompt": "{}"}, ANSWERS, divided=False)
    rows = model.scored_answers(batch(), inference_method="rank", answer_list=ANSWERS, num_ans_candidates=5)
    for row, own in zip(rows, losses.tolist(), strict=True):
        assert {text for text, _ in row} == set(ANSWERS)
        assert dict(row) == pytest.approx({text: -loss for text, loss in zip(ANSWERS, own, strict=True)}, abs=1e-4)


def test_a_generated_score_is_that_of_generate():
    model, samples = tiny("blip2_opt"), batch()
    settings = {"num_beams": 3, "max_len": 5, "length_penalty": 0.0}
    answers = model.scored_answers(samples, inference_method="generate", **settings)
    prompts = {"image": samples["image"], "prompt": samples["text_input"]}
    own = {"min_len": 1, "repetition_penalty": 1.0}
    written = model.generate(prompts, return_scores=True, **{**settings, **own, "max_len": 6})  # counts a start token
    assert [row[0][0] for row in answers] == [text for text, _ in written]
    assert [row[0][1] for row in answers] == pytest.approx([score for _, score in written], abs=1e-5)


def test_a_model_without_scores_is_refused():
    class Own:
        def predict_answers(self, samples: Any, **settings: Any) -> list[str]:
            raise AssertionError("not called")

    with pytest.raises(InputError, match=r"run\.save_scores.*Own"):
        VQATask(save_scores=True, inference_method="generate").check(Own, None, {}, split="val")  # type: ignore[arg-type]


RUNS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "captions": ({"arch": "blip_caption"}, "shapes_caption", {**cli_helpers.CAPTIONING, "num_captions": 2}),
    "rank": ({"arch": "blip_vqa"}, "shapes_vqa", {"task": "vqa", "num_ans_candidates": 12}),
    "generate": ({"arch": "blip2_t5"}, "shapes_vqa", {"task": "vqa", "inference_method": "generate"}),
    "instruct": ({"arch": "blip2_vicuna_instruct"}, "shapes_instruct_caption", {"task": "instruct", "max_len": 4}),
}
FILES = {"captions": "val_captions.json", "instruct": "val_predictions.json"}


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
@pytest.mark.parametrize("name", RUNS)
def test_result_files_gain_scores_and_nothing_else(name: str, tmp_path: Path):
    model, dataset, run = RUNS[name]
    run = {**cli_helpers.RUN, **run, "test_splits": [], "output_dir": str(tmp_path)}
    content = {"model": {**model, "model_type": "tiny"}, "datasets": {dataset: cli_helpers.SHAPES}, "run": run}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    assert cli_helpers.evaluate(path, job="plain") == 0
    assert cli_helpers.evaluate(path, "run.save_scores=true", job="scored") == 0
    plain, scored = (
        json.loads((tmp_path / job / "result" / FILES.get(name, "val_vqa.json")).read_text())
        for job in ("plain", "scored")
    )
    added = {"captions": {"score", "scores"}, "rank": {"score", "ranked"}}.get(name, {"score"})
    for without, row in zip(plain, scored, strict=True):
        assert row.keys() - without.keys() == added
        assert {key: row[key] for key in without} == without
        assert row["score"] < 0
    if name == "captions":
        assert all(row["scores"][0] == row["score"] >= row["scores"][1] for row in scored)
    if name == "rank":
        assert all(row["ranked"][0] == [row["answer"], row["score"]] for row in scored)
        assert {len(row["ranked"]) for row in scored} == {10}
    assert cli_helpers.metrics(tmp_path / "plain", "val") == cli_helpers.metrics(tmp_path / "scored", "val")
