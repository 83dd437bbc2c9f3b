"""A real train.py, killed at some step and resumed, ends bit for bit with the weights of a run that was not killed."""

import signal
import time
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import warm

from lavis_lite.common import checkpoint
from lavis_lite.tasks.captioning import CaptionTask

pytestmark = pytest.mark.usefixtures("shapes_data")

TOTAL = 35


def long_project(folder: Path, name: str) -> Path:
    """A recipe of some hundred steps with dropout, shuffling, random crops, two workers, accumulation, validation."""
    folder.mkdir()
    (dataset,) = cli_helpers.RECIPES[name]["datasets"]
    crops = {"vis_processor": {"train": {"name": "blip_image_train", "image_size": 48}}}
    run = {"max_iters": TOTAL, "max_epoch": 100, "num_workers": 2, "checkpoint_every": 4, "accum_grad_iters": 2}
    run["batch_size_train"] = 2
    return cli_helpers.project(folder, name, {"datasets": {dataset: crops}, "run": {**run, "test_splits": []}})


def kill_in_training(path: Path, *, after: int) -> int:
    """Starts train.py, kills it as soon as its log shows step `after`; the step of the checkpoint it left."""
    job = path.parent / "output" / "job"
    process = warm.start("train.py", "--cfg-path", str(path), "--job-id", "job")
    try:
        deadline = time.monotonic() + 120
        while not (job / "checkpoint_last.pth").exists() or count_steps(job / "log.txt") < after:
            assert process.poll() is None, f"ended by itself:\n{process.printed()}"
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    return checkpoint.load(job / "checkpoint_last.pth")["step"]


def count_steps(log: Path) -> int:
    """The number of training steps in a log that is being written."""
    return log.read_text(encoding="utf-8").count('"loss"') if log.exists() else 0


def saved(job: Path) -> dict[str, Any]:
    """What both checkpoints of a job hold, without its settings (job names differ)."""
    files = {name: checkpoint.load(job / f"checkpoint_{name}.pth") for name in ("last", "best")}
    return {name: {key: value for key, value in file.items() if key != "config"} for name, file in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "after"), [("caption", 12), ("retrieval", 18)])
def test_killed_and_resumed_equals_not_killed(name: str, after: int, tmp_path: Path) -> None:
    whole = long_project(tmp_path / "whole", name)
    assert cli_helpers.train(whole) == 0
    killed = long_project(tmp_path / "killed", name)
    step = kill_in_training(killed, after=after)
    assert 0 < step < TOTAL
    assert cli_helpers.train(killed, flags=["--resume", "auto"], job=None) == 0
    (job,) = (killed.parent / "output").iterdir()
    first, second = saved(whole.parent / "output" / "job"), saved(job)
    assert first["last"]["step"] == TOTAL
    cli_helpers.assert_same_state(first, second)
    losses = {
        row["step"]: row["loss"] for row in cli_helpers.steps(job)
    }  # steps between checkpoint and death are there twice
    assert losses == {row["step"]: row["loss"] for row in cli_helpers.steps(whole.parent / "output" / "job")}


@pytest.mark.slow
def test_resume_in_another_folder(tmp_path: Path) -> None:
    """`run.resume_ckpt_path` goes on in a job of its own, from any checkpoint with training state."""
    path = cli_helpers.project(tmp_path, "caption", {"run": {"keep_checkpoints": 9, "checkpoint_every": 2}})
    assert cli_helpers.train(path, job="whole") == 0
    output = tmp_path / "output"
    middle = output / "whole" / "checkpoint_4.pth"
    assert middle.is_file()
    assert cli_helpers.train(path, f"run.resume_ckpt_path={middle}", job="second") == 0
    first, second = saved(output / "whole"), saved(output / "second")
    cli_helpers.assert_same_state(first, second)
    assert [row["step"] for row in cli_helpers.steps(output / "second")] == [5, 6]
    assert cli_helpers.metrics(output / "second", "test") == cli_helpers.metrics(output / "whole", "test")


def test_resume_takes_what_a_run_needs_and_no_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(tmp_path, "caption", {"run": {"max_iters": 2, "test_splits": []}})
    assert cli_helpers.train(path, job="first") == 0
    best = tmp_path / "output" / "first" / "checkpoint_best.pth"
    assert cli_helpers.train(path, flags=["--resume", str(best)], job="second") == 2
    assert "holds no training state" in capsys.readouterr().err
    nlvr = cli_helpers.project(tmp_path, "nlvr", {"run": {"max_iters": 2}})
    assert cli_helpers.train(nlvr, flags=["--resume", str(best.with_name("checkpoint_last.pth"))], job="third") == 2
    assert "checkpoint_last.pth" in capsys.readouterr().err


def test_a_resumed_run_with_nothing_left_to_train_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """More steps within the epoch that the first run ended."""
    path = cli_helpers.project(tmp_path, "caption", {"run": {"valid_splits": [], "test_splits": []}})
    warning = "nothing is left to train: 1 of 1 epochs are done at step 2 of 3"
    assert cli_helpers.train(path, "run.max_iters=2") == 0
    assert "nothing is left" not in caplog.text
    assert cli_helpers.train(path, "run.max_iters=3", flags=["--resume", "auto"]) == 0
    assert warning in caplog.text


@pytest.mark.slow
def test_a_dry_run_says_where_the_run_would_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(
        tmp_path, "caption", {"run": {"keep_checkpoints": 9, "checkpoint_every": 2, "test_splits": []}}
    )
    job = tmp_path / "output" / "job"
    auto = ["--dry-run", "--resume", "auto"]

    def told(*options: str, flags: list[str], job: str | None = None) -> str:
        assert cli_helpers.train(path, *options, flags=flags, job=job) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume  ")]
        return line.removeprefix("resume").strip()

    assert told(flags=auto) == f"nothing to resume below {tmp_path / 'output'}: the run starts from the beginning"
    assert cli_helpers.train(path) == 0
    before = {file: file.read_bytes() for file in job.rglob("*") if file.is_file()}
    assert told(flags=auto) == f"{job / 'checkpoint_last.pth'}: step 6 of 6, 1 of 1 epochs done"
    assert told(flags=auto, job="other").startswith("nothing to resume")
    middle = str(job / "checkpoint_4.pth")
    assert told(flags=["--dry-run", "--resume", middle]) == f"{middle}: step 4 of 6, 0 of 1 epochs done"
    assert told("run.max_iters=60", flags=auto).endswith("step 6 of 60, 1 of 2 epochs done")
    assert {file: file.read_bytes() for file in job.rglob("*") if file.is_file()} == before
    assert [folder.name for folder in (tmp_path / "output").iterdir()] == ["job"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["run.batch_size_train=3"], ["with 4 samples per step, this run has 3", "start anew"]),
        (["model.med.hidden_size=64"], ["parameters have other shapes", "model.med.hidden_size: 32 in the checkpoint"]),
        (["run.output_dir={damaged}"], ["none of the checkpoints can be resumed", "checkpoint_last.pth"]),
        (["run.output_dir={alien}"], ["holds no training state"]),
    ],
)
def test_a_dry_run_refuses_a_checkpoint_that_the_run_would(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cli_helpers.project(tmp_path, "caption", {"run": {"max_iters": 2, "test_splits": []}})
    assert cli_helpers.train(path) == 0
    whole = tmp_path / "output" / "job" / "checkpoint_last.pth"
    places = {name: tmp_path / name for name in ("damaged", "alien")}
    for folder in places.values():
        (folder / "job").mkdir(parents=True)
    content = bytearray(whole.read_bytes())
    content[len(content) // 2] ^= 255
    (places["damaged"] / "job" / whole.name).write_bytes(content)
    checkpoint.save({"model": checkpoint.load(whole)["model"]}, places["alien"] / "job" / whole.name)
    options = [option.format(**places) for option in options]
    for flags in (["--dry-run"], []):
        capsys.readouterr()
        assert cli_helpers.train(path, *options, flags=[*flags, "--resume", "auto"], job=None) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in words), err


def project_with(folder: Path, *, options: dict[str, Any] | None = None) -> Path:
    """Six steps of captioning, two epochs of three by `runner_iter`, validated after each."""
    run = {"runner": "runner_iter", "iters_per_inner_epoch": 3, "max_epoch": 1, "test_splits": ["test"]}
    return cli_helpers.project(folder, "caption", {"run": {**run, **(options or {})}})


def stop_after(monkeypatch: pytest.MonkeyPatch, path: Path, *, step: int, options: tuple[str, ...] = ()) -> Path:
    """A run that fails in the step after `step`; returns its job's folder."""
    calls, train_step = [], CaptionTask.train_step

    def failing(self: CaptionTask, *args: Any) -> Any:
        calls.append(1)
        if len(calls) > step:
            raise KeyError("stop here")
        return train_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CaptionTask, "train_step", failing)
        with pytest.raises(KeyError, match="stop here"):
            cli_helpers.train(path, *options)
    return path.parent / "output" / "job"


AUTO = ["--resume", "auto"]


@pytest.mark.slow
def test_changed_hyperparameters_are_applied_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The optimizer's state used to bring the old weight decay and betas back without a word."""
    path = project_with(tmp_path)
    job = stop_after(monkeypatch, path, step=3)
    before = checkpoint.load(job / "checkpoint_last.pth")["optimizer"]
    assert {(group["weight_decay"], tuple(group["betas"])) for group in before["param_groups"]} == {
        (0.05, (0.9, 0.999)),
        (0.0, (0.9, 0.999)),
    }
    caplog.set_level("INFO")
    flip = "datasets.shapes_caption.vis_processor.train={name: blip_image_train, image_size: 48}"
    changed = ["run.weight_decay=0.5", "run.beta1=0.5", "run.grad_clip_norm=0.1", "run.seed=7", "run.log_freq=2", flip]
    assert cli_helpers.train(path, *changed, "model.med.hidden_dropout=0.3", flags=AUTO) == 0
    after = checkpoint.load(job / "checkpoint_last.pth")["optimizer"]
    assert {(group["weight_decay"], tuple(group["betas"])) for group in after["param_groups"]} == {
        (0.5, (0.5, 0.999)),
        (0.0, (0.5, 0.999)),
    }
    assert [int(state["step"]) for state in after["state"].values()] == [6] * len(after["state"])
    for line in (
        "run.weight_decay: 0.05 in the checkpoint, 0.5 now: applied",
        "run.beta1: 0.9 in the checkpoint, 0.5 now: applied",
        "run.grad_clip_norm: None in the checkpoint, 0.1 now: applied",
        "run.log_freq: 1 in the checkpoint, 2 now: applied",
        "run.seed: 42 in the checkpoint, 7 now: applied, the order of the data",
        "datasets.shapes_caption.vis_processor.train.name: blip_image_eval in the checkpoint, blip_image_train now",
        "model.med.hidden_dropout: not set in the checkpoint, 0.3 now: applied",
    ):
        assert line in caplog.text
    assert len([r for r in caplog.records if "in the checkpoint" in r.message]) == 7


@pytest.mark.slow
def test_an_unchanged_resume_names_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = project_with(tmp_path)
    stop_after(monkeypatch, path, step=3)
    caplog.set_level("INFO")
    assert cli_helpers.train(path, flags=AUTO) == 0
    assert "in the checkpoint" not in caplog.text


@pytest.mark.slow
def test_another_model_is_refused_key_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project_with(tmp_path)
    stop_after(monkeypatch, path, step=3)
    capsys.readouterr()
    assert cli_helpers.train(path, "model.med.intermediate_size=32", flags=AUTO) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for part in ("other shapes", "model.med.intermediate_size: 64 in the checkpoint, 32 now", "same model"):
        assert part in told
    assert cli_helpers.train(path, "run.batch_size_train=5", flags=AUTO) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "4 samples per step, this run has 5" in told


@pytest.mark.slow
def test_other_annotations_of_the_same_length_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = cli_helpers.pictures(tmp_path / "pictures", 8)
    records = [{"image": path, "caption": f"a circle {i}", "image_id": i} for i, path in enumerate(pictures)]
    own = cli_helpers.user_set(tmp_path, {"train": records, "val": records[:2]})
    run = {"max_iters": 4, "valid_splits": [], "test_splits": []}
    path = cli_helpers.project(tmp_path, "caption", {"datasets": {"shapes_caption": None, "caption": own}, "run": run})
    job = stop_after(monkeypatch, path, step=3, options=("run.checkpoint_every=1",))
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "train.json").rename(tmp_path / "moved" / "train.json")
    there = f"datasets.caption.build_info.annotations.train.storage={moved}"
    changed = cli_helpers.user_set(tmp_path, {"train": [{**record, "caption": "a square"} for record in records]})
    assert changed["build_info"]["annotations"]["train"]["storage"] == str(tmp_path / "train.json")
    capsys.readouterr()
    assert cli_helpers.train(path, flags=AUTO) == 2
    assert "other annotations of 'caption'" in capsys.readouterr().err
    saved = checkpoint.load(job / "checkpoint_last.pth")
    assert cli_helpers.train(path, there, flags=AUTO) == 0  # the same content elsewhere
    checkpoint.save({key: value for key, value in saved.items() if key != "data"}, job / "checkpoint_last.pth")
    capsys.readouterr()
    assert cli_helpers.train(path, flags=AUTO) == 0  # a checkpoint of before there were digests
    assert "holds no digest of its annotations" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["gone", "cut", "flipped"])
def test_lost_best_weights_are_noticed_at_resume(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not after the whole training; and a job whose steps are done still ends."""
    path = project_with(tmp_path)
    job = stop_after(monkeypatch, path, step=4)
    damage(job / "checkpoint_best.pth", loss)
    assert cli_helpers.train(path, flags=AUTO) == 0
    assert "checkpoint_best.pth" in caplog.text
    assert "is forgotten" in caplog.text
    assert checkpoint.load(job / "checkpoint_best.pth")["best"]["epoch"] == 1
    damage(job / "checkpoint_best.pth", loss)
    assert cli_helpers.train(path, flags=AUTO) == 0
    cli_helpers.assert_same_state(
        cli_helpers.weights(job / "checkpoint_best.pth"), cli_helpers.weights(job / "checkpoint_last.pth")
    )


def damage(path: Path, how: str) -> None:
    """Lose a file, or some of it."""
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And ends as if nothing had happened."""
    for name in ("whole", "damaged"):
        (tmp_path / name).mkdir()
    options = {"checkpoint_every": 1, "keep_checkpoints": 2}
    whole, path = (project_with(tmp_path / name, options=options) for name in ("whole", "damaged"))
    assert cli_helpers.train(whole) == 0
    job = stop_after(monkeypatch, path, step=5)
    assert {file.name for file in job.glob("checkpoint_[0-9]*")} == {"checkpoint_4.pth", "checkpoint_5.pth"}
    damage(job / "checkpoint_last.pth", how)  # which is checkpoint_5.pth, too
    assert cli_helpers.train(path, flags=AUTO) == 0
    assert f"resuming {job / 'checkpoint_4.pth'} instead" in caplog.text
    cli_helpers.assert_same_state(saved(whole.parent / "output" / "job"), saved(job))
