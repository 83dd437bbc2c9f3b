"""One's own instruction data through train.py and evaluate.py: several sets under names of one's own, and mistakes, of
which each is one clean line that says where.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import yaml
from test_bad_input import complains

pytestmark = pytest.mark.usefixtures("shapes_data")

RUN = {"batch_size_train": 2, "batch_size_eval": 2, "num_workers": 0, "log_freq": 1, "tensorboard": False}


def asked(number: int, **fields: Any) -> dict[str, Any]:
    """A record of the user's; a field that is None is left out."""
    record = {"image": f"picture{number % 4}.png", "instruction": "what color?", "output": "red", **fields}
    return {key: value for key, value in record.items() if value is not None}


def garden(folder: Path, lines: list[Any], *, root: str = "images", **fields: Any) -> dict[str, Any]:
    """A dataset's section: the same lines, records or texts, for training and validation."""
    folder.mkdir(parents=True, exist_ok=True)
    cli_helpers.pictures(folder, 4)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "own.jsonl").write_text("\n".join(texts))
    storage = {"storage": str(folder / "own.jsonl")}
    info = {"annotations": {"train": storage, "val": storage}, root: {"storage": str(folder)}}
    return {"builder": "instruct", "build_info": info, **fields}


def project(folder: Path, datasets: dict[str, Any], **run: Any) -> Path:
    settings = {"task": "instruct", "output_dir": str(folder / "output"), **RUN, **run}
    recipe = {"model": {"arch": "blip2_t5_instruct", "model_type": "tiny"}, "datasets": datasets, "run": settings}
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
def test_several_sets_of_ones_own_are_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = garden(tmp_path / "few", [asked(i, candidates=["red", "blue"]) for i in range(4)])
    many = garden(tmp_path / "many", [asked(i) for i in range(16)], num_frames=2)
    chosen = {"valid_splits": ["val"], "best_by": "mean", "train_dataset_sampling": "sqrt", "max_iters": 8}
    path = project(tmp_path, {"few": few, "many": many}, max_len=3, **chosen)
    assert cli_helpers.train(path, job=None, flags=["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "share       few: 33.33% of the steps\nshare       many: 66.67% of the steps" in out  # 2 to 4
    assert "steps       10 per epoch, 8 in all" in out
    assert cli_helpers.train(path) == 0
    job = tmp_path / "output" / "job"
    (mixture,) = [row["mixture"] for row in cli_helpers.log(job) if "mixture" in row]
    assert {name: row["samples"] for name, row in mixture.items()} == {"few": 4, "many": 16}
    (given,) = [row["datasets"] for row in cli_helpers.log(job) if "datasets" in row]
    assert sum(row["batches"] for row in given.values()) == 8
    accuracies = [cli_helpers.metrics(job, f"{name}_val")["accuracy"] for name in ("few", "many")]
    assert cli_helpers.metrics(job, "mean") == {"agg_metrics": sum(accuracies) / 2}
    assert cli_helpers.evaluate(job / "config.yaml", "run.test_splits=[val]", weights=job / "checkpoint_best.pth") == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (asked(1, output=None), ["line 3 has no field 'output'"]),
        (asked(1, instruction=None), ["line 3 has no field 'instruction'"]),
        (asked(1, image=None), ["line 3 has no field 'image' or 'video'"]),
        (asked(1, image=None, video="a.avi"), ["line 3 has a field 'video', the first record 'image'", "two datasets"]),
        (asked(1, candidates=[]), ["line 3 must have a list of texts in 'candidates', at least one"]),
        ("3", ["line 3 is a int, expected an object"]),
        ('{"image": ', ["broken or truncated JSON at line 3"]),
    ],
)
def test_a_line_that_is_no_sample_is_named(
    line: Any, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project(tmp_path, {"own": garden(tmp_path / "own", [asked(0), "", line])})
    complains(capsys, cli_helpers.train(path), str(tmp_path / "own" / "own.jsonl"), *words)


def test_a_candidate_longer_than_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [asked(0, candidates=["red", "a large red circle above a small blue square"])]
    path = project(tmp_path, {"own": garden(tmp_path / "own", lines)}, test_splits=["val"])
    words = ["'a large red circle above", "model.max_output_txt_len"]
    complains(capsys, cli_helpers.evaluate(path, "model.max_output_txt_len=6"), *words)


def test_questions_with_one_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers are kept by question_id; in training and for candidates it does not matter."""
    lines = [asked(i, question_id=id) for i, id in enumerate(["a", "b", "a"])]
    path = project(tmp_path, {"own": garden(tmp_path / "own", lines)}, test_splits=["val"], max_iters=1)
    vqa = ["run.task=vqa", "run.inference_method=generate", "run.max_len=2"]
    words = ("own/val: record 0 and", "own/val: record 2", "have the same question_id 'a'")
    complains(capsys, cli_helpers.evaluate(path, *vqa), *words)
    assert cli_helpers.train(path, *vqa, "run.test_splits=[]") == 0
    assert cli_helpers.evaluate(path, "run.max_len=2") == 0


@pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="needs decord")
def test_a_video_that_is_missing_or_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_video import noise, written

    lines = [asked(i, image=None, video="clip.avi") for i in range(2)]
    section = garden(tmp_path / "own", lines, root="videos", num_frames=5)
    path, clip = project(tmp_path, {"own": section}, max_iters=1), tmp_path / "own" / "clip.avi"
    complains(capsys, cli_helpers.train(path), f"video file not found: {clip}", "build_info.videos.storage")
    written(clip, noise(4))
    code = cli_helpers.train(path, "datasets.own.short_clips=error")
    complains(capsys, code, f"{clip} has 4 frames, and num_frames=5: lower num_frames")
    assert cli_helpers.train(path, "datasets.own.num_frames=4", "datasets.own.short_clips=error") == 0
    assert cli_helpers.train(path) == 0  # frames are repeated
    both = {**section["build_info"], "images": {"storage": str(tmp_path)}}
    path = project(tmp_path, {"own": {**section, "build_info": both}})
    complains(capsys, cli_helpers.train(path), "names two folders", "build_info.images or build_info.videos to null")
    gone = f"datasets.own.build_info.videos.storage={tmp_path / 'gone'}"
    complains(
        capsys, cli_helpers.train(path, "datasets.own.build_info.images=null", gone), "video folder not found", "gone"
    )
