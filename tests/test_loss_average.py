"""`run.loss_average: tokens`: gradients are those of the mean over all labels of the global batch, however divided."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import warm
from test_runner import Line, ToyTask, last, make, rows
from torch import nn

from lavis_lite.common import dist
from lavis_lite.models import load_model

LANGUAGE_MODELS = ("blip2_llm", "blip2_opt", "blip2_t5", "blip2_vicuna", "blip2_t5_instruct", "blip2_vicuna_instruct")
CHANGES: dict[str, Any] = {"dropout": 0, "grad_clip_norm": 1e6, "valid_splits": [], "test_splits": []}


class Words(Line):
    """Samples with one to seven labels each."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        counts = torch.arange(7) < 1 + index % 7
        return {**super().__getitem__(index), "counts": counts}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """As Line's, and which labels count."""
        return {**super().collater(samples), "counts": torch.stack([sample["counts"] for sample in samples])}


class WordTask(ToyTask):
    """The mean over labels of errors that differ from label to label."""

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Loss and number of labels."""
        errors = (model(samples)["prediction"] - samples["y"]).square()[:, None] * torch.arange(1.0, 8.0)
        return {"loss": errors[samples["counts"]].mean(), "num_labels": samples["counts"].sum()}


def train(job_dir: Path, **changes: Any) -> None:
    make(job_dir, task=WordTask(), data={"words": {"train": Words("train", 33)}}, **{**CHANGES, **changes}).train()


def norms(job_dir: Path) -> list[float]:
    return [row["grad_norm"] for row in rows(job_dir) if "grad_norm" in row]


def assert_same_training(first: Path, second: Path) -> None:
    assert norms(first) == pytest.approx(norms(second), rel=1e-5)
    expected = last(second)["model"]
    for key, value in last(first)["model"].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)


def test_accumulated_batches_equal_one_batch(tmp_path: Path) -> None:
    train(tmp_path / "large", batch_size_train=8)
    division = {"batch_size_train": 2, "accum_grad_iters": 4}
    train(tmp_path / "tokens", loss_average="tokens", **division)
    train(tmp_path / "batches", **division)
    assert_same_training(tmp_path / "tokens", tmp_path / "large")
    assert norms(tmp_path / "batches") != pytest.approx(norms(tmp_path / "large"), rel=1e-3)


def test_one_batch_alone_needs_no_average(tmp_path: Path) -> None:
    for average in ("batches", "tokens"):
        train(tmp_path / average, loss_average=average)
    assert_same_training(tmp_path / "tokens", tmp_path / "batches")


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    train(tmp_path / "large", batch_size_train=8)
    options = {"batch_size_train": 2, "accum_grad_iters": 2, "loss_average": "tokens"}
    ranks = warm.start(__file__, tmp_path / "two", json.dumps(options), world=2)
    assert ranks.wait(300) == 0
    assert_same_training(tmp_path / "two", tmp_path / "large")


def test_a_model_that_reports_no_labels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(tmp_path, "nlvr")
    for flags in ([], ["--dry-run"]):
        assert cli_helpers.train(path, "run.loss_average=tokens", flags=flags) == 2
        assert "run.loss_average: tokens" in capsys.readouterr().err


@pytest.mark.usefixtures("shapes_data")
def test_captioning_trains_with_it(tmp_path: Path) -> None:
    run = {"run": {"max_iters": 2, "valid_splits": [], "test_splits": [], "grad_clip_norm": 1e6}}
    path = cli_helpers.project(tmp_path, "caption", cli_helpers.NO_DROPOUT, run)
    assert cli_helpers.train(path, "run.batch_size_train=8", job="large") == 0
    division = ("run.batch_size_train=2", "run.accum_grad_iters=4")
    for average in ("tokens", "batches"):
        assert cli_helpers.train(path, f"run.loss_average={average}", *division, job=average) == 0
    (large, tokens, batches) = (
        cli_helpers.steps(tmp_path / "output" / job)[0]["grad_norm"] for job in ("large", "tokens", "batches")
    )
    assert tokens == pytest.approx(large, rel=1e-4)
    assert batches != pytest.approx(large, rel=1e-4)


@pytest.mark.parametrize("arch", ["blip_caption", *LANGUAGE_MODELS])
def test_models_report_the_labels_that_their_loss_is_the_mean_over(arch: str) -> None:
    """The loss of a batch is that of its samples, weighted by their labels."""
    torch.manual_seed(0)
    model = load_model(arch, "tiny", is_eval=True)
    assert model.reports_num_labels
    size = model.visual_encoder.image_size
    texts = ["a picture of a red circle", "a picture of a blue square above a green star", "a picture of a cross"]
    samples = {"image": torch.randn(3, 3, size, size), "text_input": texts}
    if arch != "blip_caption":
        samples["text_output"] = ["red", "a blue square above a star", "a cross"]
    with torch.no_grad():
        whole = model(samples)
        parts = [model({key: value[i : i + 1] for key, value in samples.items()}) for i in range(3)]
    counts = torch.stack([part["num_labels"] for part in parts])
    assert whole["num_labels"] == counts.sum()
    assert len(set(counts.tolist())) > 1
    losses = torch.stack([part["loss"] for part in parts])
    torch.testing.assert_close(whole["loss"], (losses * counts).sum() / counts.sum(), rtol=1e-4, atol=1e-5)


def script_main(job_dir: str, options: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    dist.init("cpu")
    train(Path(job_dir), **json.loads(options))
    dist.shutdown()


if __name__ == "__main__":
    script_main(*sys.argv[1:])
