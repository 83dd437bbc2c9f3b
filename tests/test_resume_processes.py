"""A run that began with one number of gloo processes continues with another: same samples, losses and learning rates.

Two launches of two processes; the rest is this process. Without dropout and with captions of equal length, the loss of
a step is a mean over the samples of the global batch, whoever has them.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

import cli_helpers
import pytest
import test_distributed
import warm
from test_loaders import run_config

from lavis_lite.common import checkpoint
from lavis_lite.common.errors import InputError
from lavis_lite.runners.division import shares
from lavis_lite.runners.sampling import make_sampler

LAST = 6
MIDDLE = 2
"""The step that the other run resumes at: within an epoch of three steps."""


@pytest.mark.parametrize(
    ("size", "world", "most", "expected"),
    [
        (32, 1, 8, (8, 4)),
        (32, 4, 8, (8, 1)),
        (32, 8, 8, (4, 1)),
        (12, 2, 4, (3, 2)),
        (7, 1, 4, (1, 7)),
        (4, 4, 9, (1, 1)),
    ],
)
def test_shares_of_a_global_batch(size: int, world: int, most: int, expected: tuple[int, int]) -> None:
    assert shares(size, world=world, most=most) == expected


@pytest.mark.parametrize(("size", "world", "named"), [(8, 3, "2 or 4"), (8, 5, "4 or 8"), (6, 7, "6")])
def test_a_global_batch_without_equal_shares_is_refused(size: int, world: int, named: str) -> None:
    with pytest.raises(InputError, match=rf"run.global_batch: {size} samples .* {world} processes: start {named} "):
        shares(size, world=world, most=4)


@pytest.mark.parametrize("order", [(1, 2, 4), (4, 1, 2), (2, 4, 1)])
def test_an_epoch_over_three_numbers_of_processes_has_every_sample_once(order: tuple[int, ...]) -> None:
    length, seen = 24, Counter[int]()
    for stage, world in enumerate(order):
        batch_size, accumulate = shares(8, world=world, most=4)
        run = run_config(batch_size_train=batch_size, accum_grad_iters=accumulate)
        for rank in range(world):
            sampler = make_sampler(run, {"own": length}, rank=rank, world=world)
            sampler.start_step = stage
            seen.update(key.position for batch in itertools.islice(sampler, accumulate) for key in batch)
    assert seen == Counter(range(length))


def recipe(folder: Path) -> Path:
    """Six steps of four samples by one process, two epochs, with a warm-up and a checkpoint every second step."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {"batch_size_train": 4, "checkpoint_every": MIDDLE, "keep_checkpoints": 9, "max_iters": LAST}
    run |= {"valid_splits": [], "test_splits": [], "warmup_steps": 4, "warmup_lr": 1e-5}
    captions = {"datasets": {"shapes_caption": None, "caption": test_distributed.equal_captions(folder)}}
    return cli_helpers.project(folder, "caption", cli_helpers.NO_DROPOUT, captions, {"run": run})


def launched(folder: Path, *commands: list[str]) -> None:
    """Run command lines of train.py in one launch of two processes."""
    (folder / "plan.json").write_text(json.dumps([["train", *argv] for argv in commands]))
    process = warm.start(test_distributed.__file__, str(folder / "plan.json"), world=2)
    code, output = test_distributed.ended(process, limit=4 * test_distributed.LIMIT)
    assert code == 0, output
    codes = [json.loads((folder / f"codes{rank}.json").read_text()) for rank in (0, 1)]
    assert codes == [[0] * len(commands)] * 2, output


@pytest.mark.slow
def test_losses_are_those_of_the_run_that_was_not_interrupted(tmp_path: Path, shapes_data: Path) -> None:
    path, output = recipe(tmp_path), tmp_path / "output"
    assert cli_helpers.train(path, job="one") == 0
    middle = {name: output / name / f"checkpoint_{MIDDLE}.pth" for name in ("one", "two", "one_to_two")}
    command = ["--cfg-path", str(path)]
    launched(
        tmp_path,
        [*command, "--job-id", "two", "--options", "run.batch_size_train=2"],
        [*command, "--job-id", "one_to_two", "--resume", str(middle["one"])],
    )
    resumed = ["--resume", str(middle["two"])]
    assert cli_helpers.train(path, "run.batch_size_train=2", flags=resumed, job="two_to_one") == 0
    again = ["--resume", str(output / "one_to_two" / "checkpoint_4.pth")]
    assert cli_helpers.train(path, flags=again, job="one_to_two_to_one") == 0
    expected = {row["step"]: row for row in cli_helpers.steps(output / "one")}
    for job, first in (("two", 1), ("one_to_two", 3), ("two_to_one", 3), ("one_to_two_to_one", 5)):
        rows = cli_helpers.steps(output / job)
        assert [row["step"] for row in rows] == list(range(first, LAST + 1))
        for row in rows:
            assert row["loss"] == pytest.approx(expected[row["step"]]["loss"], rel=1e-5), (job, row["step"])
            assert row["lr"] == expected[row["step"]]["lr"]
    settings = checkpoint.load(output / "one_to_two" / "checkpoint_last.pth")["config"]["run"]
    assert (settings["global_batch"], settings["batch_size_train"], settings["accum_grad_iters"]) == (4, 2, 1)


@pytest.mark.slow
def test_a_run_keeps_its_global_batch_whatever_it_is_divided_into(
    tmp_path: Path, shapes_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run.global_batch` in a recipe; then other settings of the same run, with and without it."""
    path, output = recipe(tmp_path), tmp_path / "output"
    assert cli_helpers.train(path, job="plain") == 0
    assert cli_helpers.train(path, "run.global_batch=4", "run.batch_size_train=3", job="divided") == 0
    losses = [[row["loss"] for row in cli_helpers.steps(output / job)] for job in ("plain", "divided")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    middle = ["--resume", str(output / "divided" / f"checkpoint_{MIDDLE}.pth")]
    assert cli_helpers.train(path, "run.batch_size_train=1", flags=middle, job="kept") == 0
    plain = ["--resume", str(output / "plain" / f"checkpoint_{MIDDLE}.pth")]
    capsys.readouterr()
    assert cli_helpers.train(path, "run.batch_size_train=1", flags=plain, job="refused") == 2
    error = capsys.readouterr().err
    assert "4 samples per step, this run has 1" in error
    assert "run.global_batch" in error
    assert cli_helpers.train(path, "run.batch_size_train=1", "run.global_batch=4", flags=plain, job="given") == 0
    for job in ("kept", "given"):
        assert [row["loss"] for row in cli_helpers.steps(output / job)] == pytest.approx(losses[0][2:], rel=1e-5)
