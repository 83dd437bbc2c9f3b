"""What trackers and TensorBoard get: numbers by step, pictures with predictions, the configuration. And that bars leave
the log lines.
"""

import io
import json
import logging
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import cli_helpers
import pytest
from PIL import Image
from tqdm import tqdm

from lavis_lite.common import progress as common
from lavis_lite.runners.pictures import pictures_of
from lavis_lite.tasks.predictions import Prediction

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


def fake(name: str, functions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A module that records the calls of its functions."""
    module, calls = ModuleType(name), Calls()
    module.__spec__ = ModuleSpec(name, None)  # other packages look for it

    def recorded(function: str) -> Any:
        def call(*values: Any, **settings: Any) -> Any:
            calls.append((function, values, settings))
            return module

        return call

    for function in functions:
        setattr(module, function, recorded(function))
    monkeypatch.setitem(sys.modules, name, module)
    return calls


WANDB = ("init", "log", "Image", "finish")
MLFLOW = ("set_experiment", "start_run", "log_params", "log_dict", "log_metrics", "log_image", "end_run")


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_trackers_get_numbers_pictures_and_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    wandb, trackio = fake("wandb", WANDB, monkeypatch), fake("trackio", WANDB, monkeypatch)
    mlflow = fake("mlflow", MLFLOW, monkeypatch)
    path = cli_helpers.project(tmp_path, "vqa_generate", {"run": {"max_iters": 2}})
    options = ["run.tracker=[wandb,mlflow,trackio]", "run.tensorboard=true"]
    assert cli_helpers.train(path, *options) == 0
    job = tmp_path / "output" / "job"
    rows = cli_helpers.steps(job)
    for calls in (wandb, trackio):
        (begun,) = [settings for function, _, settings in calls if function == "init"]
        assert (begun["project"], begun["name"], begun["config"]["run"]["max_iters"]) == ("lavis_lite", "job", 2)
        logged = [(values[0], settings["step"]) for function, values, settings in calls if function == "log"]
        losses = [(numbers["train/loss"], step) for numbers, step in logged if "train/loss" in numbers]
        assert losses == [(row["loss"], row["step"]) for row in rows]
        assert any(numbers.get("val/overall") == cli_helpers.metrics(job, "val")["overall"] for numbers, _ in logged)
        images = [values[0] for function, values, _ in calls if function == "Image"]
        assert len(images) == 16  # eight of each of two splits
        assert all(isinstance(image, Image.Image) for image in images)
        captions = [settings["caption"] for function, _, settings in calls if function == "Image"]
        assert all("prediction: " in text and "reference: " in text for text in captions)
        assert calls[-1][0] == "finish"
    parameters = {key: value for f, values, _ in mlflow if f == "log_params" for key, value in values[0].items()}
    assert parameters["run.max_iters"] == "2"
    assert max(len(values[0]) for function, values, _ in mlflow if function == "log_params") <= 100
    files = [settings["artifact_file"] for function, _, settings in mlflow if function == "log_image"]
    assert files[0] == "val_predictions/step2_0.png"
    assert mlflow[-1][0] == "end_run"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(job / "tensorboard"))
    events.Reload()
    assert {f"val_predictions/{number}" for number in range(8)} <= set(events.Tags()["images"])


@pytest.mark.usefixtures("shapes_data")
def test_a_missing_tracker_is_one_line_and_others_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    path = cli_helpers.project(tmp_path, "classification", {"run": {"max_iters": 1, "tracker": "mlflow"}})
    assert cli_helpers.train(path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "run.tracker" in error
    assert "lavis-lite[mlflow]" in error
    assert not (tmp_path / "output" / "job").exists()
    assert cli_helpers.train(path, "run.tracker=null") == 0
    assert cli_helpers.train(path, "run.tracker=neptune") == 2
    assert "neptune" in capsys.readouterr().err


def test_pictures_are_of_the_same_samples_and_say_what_came_out(tmp_path: Path) -> None:
    paths = cli_helpers.pictures(tmp_path, 30)
    rows: list[Prediction] = [
        {"instance_id": str(i), "images": [path], "prediction": f"a picture {i}", "references": ["one"]}
        for i, path in enumerate(paths)
    ]
    later: list[Prediction] = [{**row, "prediction": "another"} for row in rows]
    first, second = pictures_of(rows, seed=3), pictures_of(later, seed=3)
    assert len(first) == 8
    numbers = [int(text.split("prediction: a picture ")[1].split(";")[0]) for _, text in first]
    assert numbers == sorted(numbers)
    assert all(text == "prediction: another; reference: one" for _, text in second)
    for number, (image, _) in zip(numbers, first, strict=True):
        own = Image.open(paths[number]).convert("RGB").getpixel((5, 5))
        colour = image.getpixel((image.width // 2, 60))
        assert max(abs(a - b) for a, b in zip(own, colour, strict=True)) <= 1
    broken: Prediction = {"instance_id": "0", "images": [str(tmp_path / "gone.mp4")], "prediction": "x"}
    assert pictures_of([broken], seed=0)[0][0].width > 0


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_log_lines_stay_above_a_bar_on_a_terminal_and_go_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lavis_lite.common import logger as run_logger

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run_logger.setup(tmp_path)
    with common.bar(3, name="epoch 1/1", unit="step") as shown:
        assert not shown.disable
        shown.update()
        logging.getLogger("lavis_lite").info("step 1 loss 2.5")
        shown.update()
    run_logger.remove_handlers()
    text = terminal.getvalue()
    assert "step 1 loss 2.5\n" in text
    assert "epoch 1/1" in text
    assert "step 1 loss 2.5" in (tmp_path / "console.txt").read_text()
    assert "epoch 1/1" not in (tmp_path / "console.txt").read_text()


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    items = list(common.progress("abcd", 10, name="val", sizes=[3, 3, 3, 1], say=said.append))
    assert items == list("abcd")
    # lines are due after more than 30 seconds: at 40 s after 6 images, at 80 s after all 10
    assert said == ["val: 6 of 10 images, 0.1 images/s, 27 s left", "val: 10 of 10 images, 0.1 images/s, 0 s left"]
    assert tqdm._instances is None or not list(tqdm._instances)


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_a_run_says_what_it_is_and_what_came_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = cli_helpers.project(tmp_path, "nlvr", {"run": {"max_iters": 2}})
    with caplog.at_level(logging.INFO):
        assert cli_helpers.train(path) == 0
    job = tmp_path / "output" / "job"
    rows = cli_helpers.log(job)
    model = cli_helpers.build("nlvr")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert rows[0]["run"]["trainable"] == trainable
    assert rows[0]["run"]["steps"] == 2
    assert rows[0]["run"]["seed"] == 42
    assert {"torch", "python", "lavis_lite"} <= rows[0]["run"]["versions"].keys()
    assert rows[-1]["result"]["seconds"] > 0
    text = (job / "console.txt").read_text()
    assert f"{trainable:,} trainable (100.0 %)" in text
    assert "2 steps in 1 epochs, validated on val" in text
    assert "images/s" in text
    assert f"evaluate: lavis-lite evaluate --cfg-path {job}/config.yaml --checkpoint {job}/checkpoint_best.pth" in text
    assert f"report: lavis-lite report {job}" in text
    assert cli_helpers.evaluate(job / "config.yaml", weights=job / "checkpoint_best.pth", job="again") == 0
    again = json.loads((job.with_name("again") / "evaluation.json").read_text())
    assert again["metrics"]["test"]["acc"] == cli_helpers.metrics(job, "test")["acc"]
