"""Several training sets: who is drawn how often, the same for every rank and after a resume, and what the log says."""

import json
import logging
import signal
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import test_runner
import torch
import warm
from test_runner import Line, ToyTask, last, make, mixed_data, rows

from lavis_lite.common import checkpoint
from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import SettingError
from lavis_lite.runners.loaders import TrainLoader, train_sets
from lavis_lite.runners.sampling import TrainSampler, dataset_shares

LENGTHS = {"a": 100, "b": 400, "c": 900}
SETTINGS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "size": ({}, [1 / 14, 4 / 14, 9 / 14]),
    "sqrt": ({"sampling": "sqrt"}, [1 / 6, 2 / 6, 3 / 6]),
    "uniform": ({"sampling": "uniform"}, [1 / 3, 1 / 3, 1 / 3]),
    "factors": ({"sampling": "sqrt", "factors": {"a": 0.5, "c": 2}}, [0.5 / 8.5, 2 / 8.5, 6 / 8.5]),
    "size_factors": ({"factors": {"a": 4}}, [4 / 17, 4 / 17, 9 / 17]),
    "ratios": ({"ratios": {"c": 2, "a": 5, "b": 3}}, [0.5, 0.3, 0.2]),
}
X_INSTRUCTBLIP = {
    "cc12m": (6_029_862, 0.19438459),
    "coco_caption": (566_747, 0.05959403),
    "capfilt14m": (13_873_136, 0.29484616),
    "vg_caption": (821_774, 0.07176032),
    "sbu": (859_739, 0.07339922),
    "vg_vqa": (1_440_069, 0.09499479),
    "coco_vqa": (658_104, 0.06421780),
    "ocr_vqa": (1_002_146, 0.07924532),
    "ok_vqa": (9_009, 0.00751357),
    "aok_vqa": (17_056, 0.01033824),
    "llava150k": (394_276, 0.04970594),
}
"""The datasets' sizes and the ratios that X-InstructBLIP's published training configuration gives for them."""
CRITICAL = {2: 13.816, 8: 26.124}
"""Chi-square's 99.9th percentile by degrees of freedom."""

mixed = {"train_dataset_sampling": "sqrt", "test_splits": [], "log_freq": 4, "checkpoint_every": 3}


def sampler(shares: Mapping[str, float] | None = None, *, rank: int = 0, world: int = 1) -> TrainSampler:
    shares = shares or dataset_shares(LENGTHS, sampling="sqrt")
    return TrainSampler(LENGTHS, shares, batch_size=3, seed=5, rank=rank, world=world)


def chi_square(counts: Counter[Any], shares: Mapping[Any, float]) -> float:
    """The sum of (found - expected)^2 / expected."""
    total = counts.total()
    return sum((counts[key] - total * share) ** 2 / (total * share) for key, share in shares.items())


def by_dataset(job_dir: Path) -> list[dict[str, Any]]:
    """An epoch's row by dataset, for each epoch; of rows that a resume wrote again, the later one."""
    return list({row["epoch"]: row["datasets"] for row in rows(job_dir) if "datasets" in row}.values())


class LossRecorder(ToyTask):
    """A task that writes down each training batch's dataset (from its samples' ids) and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[tuple[str, float]] = []

    def train_step(self, model: torch.nn.Module, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's losses."""
        losses = super().train_step(model, samples)
        (name,) = {instance.rstrip("0123456789") for instance in samples["instance_id"]}
        self.losses.append((name, losses["loss"].item()))
        return losses

    def account(self, first: int, end: int) -> dict[str, dict[str, Any]]:
        """Number of batches and mean loss of each dataset in steps `first` to `end`."""
        found: dict[str, list[float]] = defaultdict(list)
        for name, loss in self.losses[first:end]:
            found[name].append(loss)
        return {
            name: {"batches": len(each), "loss": pytest.approx(sum(each) / len(each))} for name, each in found.items()
        }


def test_square_roots_are_the_published_ones() -> None:
    shares = dataset_shares({name: size for name, (size, _) in X_INSTRUCTBLIP.items()}, sampling="sqrt")
    assert shares == pytest.approx({name: ratio for name, (_, ratio) in X_INSTRUCTBLIP.items()}, rel=0, abs=1e-8)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.slow
def test_shares_are_these_and_draws_follow_them(name: str) -> None:
    """Draws by themselves, and in pairs of neighbours, which must be independent."""
    setting, expected = SETTINGS[name]
    shares = dataset_shares(LENGTHS, **setting)
    assert shares == pytest.approx(dict(zip("abc", expected, strict=True)), rel=1e-12)
    drawn = [sampler(shares).dataset_at(step) for step in range(20_000)]
    assert chi_square(Counter(drawn), shares) < CRITICAL[2]
    pairs = Counter(zip(drawn[::2], drawn[1::2], strict=True))
    assert chi_square(pairs, {(x, y): shares[x] * shares[y] for x in "abc" for y in "abc"}) < CRITICAL[8]
    for other, (_, wrong) in SETTINGS.items():
        if other != name:  # the test can tell these settings apart
            assert chi_square(Counter(drawn), dict(zip("abc", wrong, strict=True))) > CRITICAL[2]


def test_batches_come_from_the_dataset_that_is_drawn_on_every_rank() -> None:
    ranks = [sampler(rank=rank, world=3) for rank in range(3)]
    for step, batches in enumerate(islice(zip(*ranks, strict=True), 200)):
        assert {key.dataset for batch in batches for key in batch} == {sampler().dataset_at(step)}


def test_starting_later_is_the_tail() -> None:
    straight = list(islice(sampler(), 300))
    for start in (1, 137, 299):
        late = sampler()
        late.start_step = start
        assert list(islice(late, 300 - start)) == straight[start:]


def test_shares_are_of_the_training_splits() -> None:
    data = {
        "a": {"train": Line("train", 9), "extra": Line("train", 7), "val": Line("val", 500)},
        "b": {"train": Line("train", 36)},
        "c": {"val": Line("val", 100)},
    }
    run = RunConfig(task="toy", batch_size_train=4, train_dataset_sampling="sqrt", train_splits=["train", "extra"])
    assert TrainLoader(train_sets(data, run.train_splits), run).sampler.shares == {"a": 0.4, "b": 0.6}


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"factors": {"ab": 2}}, r"run\.train_dataset_factors: .*'ab'.*'abc'"),
        ({"factors": {"abc": 0}}, r"run\.train_dataset_factors: .*\{'abc': 0\}"),
        ({"factors": {"abc": -1}}, r"run\.train_dataset_factors: .*\{'abc': -1\}"),
        ({"ratios": {"ab": 1}}, r"run\.train_dataset_ratios: .*\['ab'\].*\['abc'\]"),
        ({"ratios": {"abc": 0}}, r"run\.train_dataset_ratios: .*\{'abc': 0\}"),
    ],
)
def test_impossible_shares(setting: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataset_shares({"abc": 10}, **setting)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"train_dataset_sampling": "sqrt"}, "train_dataset_ratios: contradicts train_dataset_sampling: sqrt.*null"),
        ({"train_dataset_factors": {"a": 2.0}}, r"contradicts .*factors \{'a': 2\.0\}; leave it out"),
        ({"train_dataset_ratios": {"a": -1.0}}, r"run\.train_dataset_ratios\.a: "),
        ({"train_dataset_ratios": {"a": 1e308}}, r"run\.train_dataset_ratios\.a: "),
        ({"train_dataset_mixing": "concat"}, r"concat contradicts train_dataset_ratios: \{'a': 1\.0\}; .*per_step"),
        (
            {"train_dataset_ratios": None, "train_dataset_factors": {"a": float("nan")}},
            r"train_dataset_factors\.a: .*nan",
        ),
    ],
)
def test_contradictory_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        RunConfig(**{"task": "toy", "train_dataset_ratios": {"a": 1.0}, **changes})


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, "concat"),
        ({"train_dataset_mixing": "per_step"}, "per_step"),
        ({"train_dataset_sampling": "sqrt"}, "per_step"),
        ({"train_dataset_factors": {"a": 2.0}}, "per_step"),
        ({"train_dataset_ratios": {"a": 2.0}}, "per_step"),
    ],
)
def test_settings_of_shares_need_mixing_per_step(setting: dict[str, Any], expected: str) -> None:
    assert RunConfig(task="toy", **setting).mixing == expected


@pytest.mark.slow
def test_the_log_tells_what_was_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    task = LossRecorder()
    runner = make(tmp_path, task=task, data=mixed_data(), **mixed)
    scalars: dict[int, dict[str, float]] = {}
    runner.progress.events.write = lambda values, *, step: scalars.setdefault(step, {}).update(values)
    runner.train()
    few, many = 8**0.5, 24**0.5
    found = rows(tmp_path)
    assert found[0] == {
        "mixture": {
            "few": {"samples": 8, "share": pytest.approx(few / (few + many))},
            "many": {"samples": 24, "share": pytest.approx(many / (few + many))},
        }
    }
    assert [(row["step"], row["epoch"]) for row in found if "datasets" in row] == [(8, 0), (16, 1)]
    first, second = by_dataset(tmp_path)
    assert first == task.account(0, 8)
    assert second == task.account(8, 16)
    assert {tag: value for tag, value in scalars[16].items() if tag.startswith("datasets_")} == {
        f"datasets_{key}/{name}": row[key] for name, row in second.items() for key in ("batches", "loss")
    }
    assert caplog.text.count("\ndataset  samples  share\nfew            8  0.366\nmany          24  0.634\n") == 1
    assert caplog.text.count("epoch 1 by dataset:\ndataset  batches   loss\nfew ") == 1


def test_a_dataset_without_batches_has_no_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    task = LossRecorder()
    make(tmp_path, task=task, data=mixed_data(), train_dataset_factors={"few": 0}, test_splits=[], max_epoch=1).train()
    assert by_dataset(tmp_path) == [{"few": {"batches": 0, "loss": None}, **task.account(0, 8)}]
    assert caplog.text.count("\nfew            0     -\n") == 1


def test_one_dataset_is_no_mixture(tmp_path: Path) -> None:
    make(tmp_path, max_epoch=1).train()
    assert not any("mixture" in row or "datasets" in row for row in rows(tmp_path))


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_account(tmp_path: Path) -> None:
    """Killed in the second epoch, two steps after a checkpoint that stands between two rows of the log."""
    options = [f"{key}={json.dumps(value)}" for key, value in mixed.items()]
    killed = warm.start(test_runner.__file__, tmp_path / "killed", "mixed=true", *options, "die_at=14")
    task = LossRecorder()
    make(tmp_path / "straight", task=task, data=mixed_data(), **mixed).train()
    assert killed.wait(300) == -signal.SIGKILL
    assert last(tmp_path / "killed")["step"] == 12
    again = make(tmp_path / "killed", data=mixed_data(), resume="auto", **mixed)
    again.train()
    assert [seen[1] for seen in again.model.seen] == [4, 5, 6, 7]
    assert by_dataset(tmp_path / "killed") == by_dataset(tmp_path / "straight")
    assert [sum(row["batches"] for row in epoch.values()) for epoch in by_dataset(tmp_path / "killed")] == [8, 8]
    assert by_dataset(tmp_path / "straight")[1] == task.account(8, 16)


def test_another_mixture_does_not_go_on(tmp_path: Path) -> None:
    make(tmp_path, data=mixed_data(), max_epoch=1, test_splits=[]).train()
    changes = {"max_epoch": 2, "test_splits": [], "resume": "auto", "train_dataset_ratios": {"few": 1, "many": 1}}
    with pytest.raises(ValueError, match=r"'24 samples, concat'.*'24 samples, share 0\.5'.*same data, sampling"):
        make(tmp_path, data=mixed_data(), **changes).train()
    turned = dict(reversed(mixed_data().items()))
    with pytest.raises(ValueError, match=r"\{'few': .*'many'.*\{'many': .*'few'"):
        make(tmp_path, data=turned, **{**changes, "train_dataset_ratios": None}).train()


def test_another_share_does_not_go_on(tmp_path: Path) -> None:
    make(tmp_path, data=mixed_data(), max_epoch=1, test_splits=[], train_dataset_mixing="per_step").train()
    changes = {"max_epoch": 2, "test_splits": [], "resume": "auto", "train_dataset_ratios": {"few": 1, "many": 1}}
    with pytest.raises(ValueError, match=r"'24 samples, share 0\.75'.*'24 samples, share 0\.5'.*same data, sampling"):
        make(tmp_path, data=mixed_data(), **changes).train()


@pytest.mark.slow
def test_two_ranks_give_the_account_of_one_process(tmp_path: Path) -> None:
    """Each rank's losses are of its own half; also when one process goes on where two stopped within the epoch."""
    changes = {**mixed, "max_epoch": 1, "dropout": 0, "keep_checkpoints": 9}
    options = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    ranks = warm.start(test_runner.__file__, tmp_path / "two", "mixed=true", "batch_size_train=2", *options, world=2)
    make(tmp_path / "one", data=mixed_data(), **changes).train()
    assert ranks.wait(300) == 0
    path = str(tmp_path / "two" / "checkpoint_6.pth")
    make(tmp_path / "alone", data=mixed_data(), resume_ckpt_path=path, **changes).train()
    (expected,) = by_dataset(tmp_path / "one")
    for job in ("two", "alone"):
        (found,) = by_dataset(tmp_path / job)
        assert {name: row["batches"] for name, row in found.items()} == {
            n: row["batches"] for n, row in expected.items()
        }
        for name, row in expected.items():
            assert found[name]["loss"] == pytest.approx(row["loss"], rel=1e-5)
    mean = sum(row["batches"] * row["loss"] for row in expected.values()) / 8
    assert mean == pytest.approx(sum(row["loss"] for row in rows(tmp_path / "one") if "loss" in row) / 2)


class Judged(ToyTask):
    """A task whose validation gives these numbers (or nothing to compare by, if None), epoch after epoch."""

    def __init__(self, **metrics: list[float | None]) -> None:
        super().__init__()
        self.judgements = metrics

    def evaluate(self, model: torch.nn.Module, loader: Any, *, split: str, result_dir: Path) -> dict[str, Any]:
        """The next number of `split`."""
        metric = self.judgements[split].pop(0)
        return {"accuracy": 1.0} if metric is None else {"agg_metrics": metric}


@pytest.mark.parametrize(("by", "best"), [("first", (0.9, 0)), ("mean", (0.6, 1))])
def test_best_by_the_first_result_or_their_mean(tmp_path: Path, by: str, best: tuple[float, int]) -> None:
    task = Judged(few_val=[0.9, 0.7, 0.8], many_val=[0.1, 0.5, 0.2])
    runner = make(tmp_path, task=task, data=mixed_data(), best_by=by, max_epoch=3, test_splits=[])
    assert runner.train()["best"] == {"metric": pytest.approx(best[0]), "epoch": best[1]}
    assert checkpoint.load(tmp_path / "checkpoint_best.pth")["step"] == 8 * (best[1] + 1)
    means = [row["metrics"]["agg_metrics"] for row in rows(tmp_path) if row.get("split") == "mean"]
    assert means == ([] if by == "first" else pytest.approx([0.5, 0.6, 0.5]))


def test_the_mean_needs_every_result(tmp_path: Path) -> None:
    changes = {"data": mixed_data(), "max_epoch": 1, "test_splits": []}
    make(tmp_path / "first", task=Judged(few_val=[0.9], many_val=[None]), **changes).train()
    with pytest.raises(ValueError, match="agg_metrics"):
        make(tmp_path / "mean", task=Judged(few_val=[0.9], many_val=[None]), best_by="mean", **changes).train()
