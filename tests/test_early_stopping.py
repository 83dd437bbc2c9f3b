"""`run.early_stopping`: when training ends, after which checkpoints, resumed and on two ranks."""

from pathlib import Path
from typing import Any

import pytest
import test_runner
import warm
from test_runner import ToyTask, last, make, rows

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import SettingError

METRICS = [0.1, 0.5, 0.4, 0.5, 0.3, 0.9, 0.9]
"""Of seven validations; the best of the first five is the second, and the fourth only equals it."""


def train(folder: Path, metrics: list[float], **changes: Any) -> list[int]:
    """The steps of the validations of a training, and of the tests after it."""
    make(folder, task=ToyTask(metrics=list(metrics)), max_epoch=7, **changes).train()
    return [row["step"] for row in rows(folder) if row.get("split") == "val"]


@pytest.mark.parametrize(("patience", "validations"), [(1, 3), (2, 4), (3, 5), (4, 7), (None, 7)])
def test_training_ends_after_validations_without_a_better_metric(
    patience: int | None, validations: int, tmp_path: Path
) -> None:
    """By hand: the best is the second, and an equal metric is not better: a patience of 1 ends after the third, of 2
    after the fourth; with 4 the sixth is reached, which is better.
    """
    steps = train(tmp_path, METRICS, early_stopping=patience)
    assert steps == [5 * (number + 1) for number in range(validations)]
    best = last(tmp_path)["best"]
    assert best == ({"metric": 0.5, "epoch": 1} if validations < 6 else {"metric": 0.9, "epoch": 5})
    assert [row["step"] for row in rows(tmp_path) if row.get("split") == "test"] == [steps[-1]]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """Stopped after three of seven epochs, then resumed: the count of validations goes on."""
    first = make(tmp_path, task=ToyTask(metrics=METRICS[:3]), max_epoch=3, early_stopping=2)
    first.train()
    steps = train(tmp_path, METRICS[3:], early_stopping=2, resume="auto")
    assert steps == [5, 10, 15, 20]
    assert train(tmp_path, METRICS[4:], early_stopping=2, resume="auto") == steps  # it has ended: nothing more
    assert last(tmp_path)["step"] == 20
    assert train(tmp_path, METRICS[4:], early_stopping=3, resume="auto") == [*steps, 25]
    assert train(tmp_path, METRICS[5:], early_stopping=None, resume="auto") == [*steps, 25, 30, 35]


def test_validations_that_score_nothing_end_nothing(tmp_path: Path) -> None:
    assert len(train(tmp_path, [None] * 7, early_stopping=1)) == 7  # type: ignore[list-item]


@pytest.mark.slow
def test_two_ranks_end_after_the_same_step(tmp_path: Path) -> None:
    options = ["batch_size_train=2", "max_epoch=6", "early_stopping=1", "init_lr=0.0", "warmup_lr=0.0"]
    # nothing is learned, so the second validation equals the first
    assert warm.start(test_runner.__file__, tmp_path / "two", *options, world=2).wait(60) == 0
    assert [row["step"] for row in rows(tmp_path / "two") if row.get("split") == "val"] == [5, 10]


def test_it_needs_validations() -> None:
    with pytest.raises(SettingError, match="early_stopping"):
        RunConfig(task="captioning", early_stopping=3)
    with pytest.raises(ValueError, match="early_stopping"):
        RunConfig(task="captioning", valid_splits=["val"], early_stopping=0)
