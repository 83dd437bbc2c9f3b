"""The command line: help, clean errors, the dry run's figures, and which job a run goes on with."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lavis_lite
from lavis_lite.cli import app as command
from lavis_lite.cli import dry_run, failures
from lavis_lite.cli import main as cli
from lavis_lite.common.config.config import RunConfig, parser
from lavis_lite.runners import jobs
from lavis_lite.runners.stopping import Stopped

PROJECT = """
model: {arch: blip_caption, model_type: tiny}
datasets:
  shapes_caption: {num_train: 20, num_val: 4, num_test: 3}
run: {task: captioning, batch_size_train: 8, max_epoch: 2, num_workers: 0, valid_splits: [val], test_splits: [test]}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def project(tmp_path: Path) -> str:
    path = tmp_path / "project.yaml"
    path.write_text(PROJECT)
    return str(path)


def job(output: Path, name: str, *, age: int, damaged: bool = False) -> Path:
    """A job's folder with a checkpoint_last.pth written `age` seconds ago."""
    path = output / name / "checkpoint_last.pth"
    path.parent.mkdir(parents=True)
    torch.save({"step": 1}, path)
    if damaged:
        path.write_bytes(path.read_bytes()[:100])
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def run_config(output: Path, **settings: object) -> RunConfig:
    return RunConfig(task="captioning", output_dir=str(output), **settings)


def test_no_arguments_prints_the_help(capsys: pytest.CaptureFixture[str]):
    assert cli.main(parser(description=cli.TRAIN_HELP), []) == 2
    assert "torchrun --nproc_per_node=8 train.py" in capsys.readouterr().err


def test_a_mistake_is_one_line(project: str, capsys: pytest.CaptureFixture[str]):
    code = cli.main(parser(), ["--cfg-path", project, "--options", "run.max_epochs=3"])
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: --options: run.max_epochs: unknown key. Did you mean 'max_epoch' or ")
    assert err.count("\n") == 1


def test_dry_run_counts_and_writes_no_file(project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "output"
    assert cli.main(parser(), ["--cfg-path", project, "--dry-run", "--options", f"run.output_dir={output}"]) == 0
    out = capsys.readouterr().out
    from lavis_lite.models import load_model

    count = sum(p.numel() for p in load_model("blip_caption", "tiny").parameters())
    assert f"parameters  {count:,} in all, {count:,} trainable" in out
    assert "samples     shapes_caption/train: 100" in out  # five captions an image
    assert "samples     shapes_caption/test: 3" in out
    assert "steps       12 per epoch, 24 in all (8 samples per step)" in out
    assert "num_train: 20" in out
    assert not output.exists()


def test_dry_run_finds_a_training_set_smaller_than_a_batch(project: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(parser(), ["--cfg-path", project, "--dry-run", "--options", "run.batch_size_train=101"]) == 2
    assert "error: " in capsys.readouterr().err


def test_momentum_parameters_count_but_are_not_trainable():
    model = dry_run.build_without_weights(
        {"arch": "blip_retrieval", "model_type": "tiny", "pretrained": "gone", **TINY}
    )
    assert all(p.is_meta for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trainable < sum(p.numel() for p in model.parameters())


TINY = {
    "vit_type": "tiny",
    "image_size": 48,
    "tokenizer": "shapes",
    "med": {"hidden_size": 128, "num_layers": 3, "num_heads": 4, "intermediate_size": 512, "max_positions": 64},
    "embed_dim": 64,
    "queue_size": 512,
}


def test_resume_auto_takes_the_newest_readable_job(tmp_path: Path):
    job(tmp_path, "old", age=100)
    newer = job(tmp_path, "newer", age=50)
    job(tmp_path, "damaged", age=1, damaged=True)
    (tmp_path / "empty").mkdir()
    run, folder = jobs.start_job(run_config(tmp_path, resume="auto"))
    assert (folder, run.job_id, run.resume_ckpt_path) == (tmp_path / "newer", "newer", str(newer))
    run, folder = jobs.start_job(run_config(tmp_path, resume="auto", job_id="old"))
    assert (folder, run.resume_ckpt_path) == (tmp_path / "old", str(tmp_path / "old" / "checkpoint_last.pth"))


def test_resume_auto_without_a_job_starts_anew_with_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    run, folder = jobs.start_job(run_config(tmp_path / "none", resume="auto", job_id="first"))
    assert (folder.name, run.resume_ckpt_path) == ("first", None)
    assert "starting afresh" in caplog.text


def test_resume_path_may_be_a_job_folder_and_must_exist(tmp_path: Path):
    path = job(tmp_path, "old", age=1)
    run, folder = jobs.start_job(run_config(tmp_path, resume_ckpt_path=str(path.parent)))
    assert run.resume_ckpt_path == str(path)
    assert folder != path.parent
    (tmp_path / "cut" / "result").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"cut/checkpoint_last.pth; name a .* auto resumes"):
        jobs.start_job(run_config(tmp_path, resume_ckpt_path=str(tmp_path / "cut")))
    (tmp_path / "cut" / "result" / "test.partial").touch()
    with pytest.raises(FileNotFoundError, match=r"cut is of an interrupted .* --resume auto --job-id cut"):
        jobs.start_job(run_config(tmp_path, resume_ckpt_path=str(tmp_path / "cut")))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint to resume: .*gone\.pth"):
        jobs.start_job(run_config(tmp_path, resume_ckpt_path=str(tmp_path / "gone.pth")))


def test_jobs_started_in_one_second_do_not_share_a_folder(tmp_path: Path):
    names = [jobs.new_job_id(tmp_path) for _ in range(5)]
    assert len(set(names)) == 5
    assert all((tmp_path / name).is_dir() for name in names)


@pytest.mark.slow
def test_train_then_evaluate_its_checkpoint(project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = f"run.output_dir={tmp_path / 'output'}"
    argv = ["--cfg-path", project, "--options", output, "run.max_iters=2", "run.metrics=[cider]"]
    assert cli.main(parser(), [*argv, "--job-id", "one"]) == 0
    best = tmp_path / "output" / "one" / "checkpoint_best.pth"
    assert best.is_file()
    with pytest.raises(SystemExit) as caught:
        cli.evaluate_main([*argv, "--checkpoint", str(best), "--job-id", "two"])
    assert caught.value.code == 0
    assert '"CIDEr"' in capsys.readouterr().out
    assert not (tmp_path / "output" / "two" / "checkpoint_last.pth").exists()
    with pytest.raises(SystemExit) as caught:
        cli.evaluate_main([*argv, "--checkpoint", str(tmp_path / "gone.pth")])
    assert caught.value.code == 2
    assert "gone.pth" in capsys.readouterr().err


# The command lavis-lite


def lavis_lite_command(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """Run `lavis-lite` in this process; the exit code."""
    monkeypatch.setattr(sys, "argv", ["lavis-lite", *argv])
    with pytest.raises(SystemExit) as end:
        command.main()
    return int(end.value.code or 0)


def test_every_subcommand_has_its_own_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"train": "--resume", "evaluate": "--checkpoint", "sweep": "--only", "table": "--projects"}
    options |= {"capfilt": "--rows", "data": "status", "convert": "to-hf"}
    for name, option in options.items():
        assert lavis_lite_command(monkeypatch, name, "--help") == 0
        assert option in capsys.readouterr().out
    assert command.COMMANDS.keys() == options.keys()


HEAVY = "torch torchvision transformers timm numpy scipy PIL matplotlib gradio pyarrow datasets jinja2 tensorboard peft"
HELPS = [[name] for name in sorted(one.name or "" for one in command.app.registered_commands)]
HELPS += [["data", name] for name in ("list", "status", "check", "download", "preview")]
HELPS += [["convert", "to-hf"], ["convert", "to-lavis"], ["train", "--data", "photos"]]
HELP_DRIVER = """
import sys
sys.argv = ["lavis-lite", *sys.argv[1:], "--help"]
from lavis_lite.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *sorted(set(HEAVY.split()) & sys.modules.keys()))
"""


@pytest.mark.slow
def test_no_help_imports_a_large_package() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(lavis_lite.__file__).parents[1])}
    driver = f"HEAVY = {HEAVY!r}{HELP_DRIVER}"
    for words in HELPS:
        done = subprocess.run([sys.executable, "-c", driver, *words], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, (words, done.stderr)
        assert len(done.stdout.splitlines()) > 3, words
        assert done.stdout.splitlines()[-1] == "imported:", words


def test_the_command_alone_lists_subcommands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lavis_lite_command(monkeypatch) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in (*command.COMMANDS, "caption", "ask", "doctor"))
    assert lavis_lite_command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == f"lavis_lite {lavis_lite.__version__}"


def test_an_unknown_subcommand_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lavis_lite_command(monkeypatch, "trian") == 2
    err = capsys.readouterr().err
    assert all(word in err for word in ("'trian'", "'train'"))


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("/opt/bin/lavis-lite", "lavis-lite"),
        ("/x/cli/__main__.py", "python -m lavis_lite.cli"),
        ("/lavis_lite/__main__.py", "python -m lavis_lite"),
    ],
)
def test_a_stopped_run_prints_a_command_to_type(program: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "evaluate", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    typed = [sys.argv[0], "--cfg-path", "a b.yaml"]
    assert failures._stop_line(Stopped(signal.SIGINT), typed).endswith(f": {name} evaluate --cfg-path 'a b.yaml'")


def test_a_subcommand_passes_its_arguments_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lavis_lite_command(monkeypatch, "train", "--cfg-path", str(tmp_path / "gone.yaml")) == 2
    assert "gone.yaml" in capsys.readouterr().err
