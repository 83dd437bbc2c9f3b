"""Every task from its YAML through train.py and evaluate.py, on tiny `shapes`: what is left, and that both agree."""

import json
import math
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import yaml

from lavis_lite.common import checkpoint

pytestmark = pytest.mark.usefixtures("shapes_data")

OWN_FILES = {
    ".lock",
    "evaluation.json",
    "config.yaml",
    "console.txt",
    "log.txt",
    "checkpoint_last.pth",
    "checkpoint_best.pth",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", cli_helpers.RECIPES)
def test_train_then_evaluate(name: str, tmp_path: Path) -> None:
    path = cli_helpers.project(tmp_path, name)
    assert cli_helpers.train(path, "run.tensorboard=true") == 0
    job = tmp_path / "output" / "job"
    check_training_log(job, total=6)
    check_files(job, name)
    best = job / "checkpoint_best.pth"
    assert cli_helpers.evaluate(path, weights=best) == 0
    evaluation = job.with_name("evaluation")
    assert cli_helpers.metrics(evaluation, "test") == cli_helpers.metrics(job, "test")
    assert not list(evaluation.glob("*.pth"))
    for file in cli_helpers.RESULT_FILES[name]:
        test_file = file.format("test")
        assert (evaluation / "result" / test_file).read_bytes() == (job / "result" / test_file).read_bytes()


def check_training_log(job: Path, *, total: int) -> None:
    """One line a step, losses finite and moving, a learning rate, a rate of samples; validation and test metrics."""
    rows = cli_helpers.steps(job)
    assert [row["step"] for row in rows] == list(range(1, total + 1))
    assert all(math.isfinite(value) for row in rows for key, value in row.items() if key.startswith("loss"))
    assert len({row["loss"] for row in rows}) == total
    assert all(row["lr"] > 0 and row["samples_per_s"] > 0 for row in rows)
    for split in ("val", "test"):
        assert math.isfinite(cli_helpers.metrics(job, split)["agg_metrics"])


def check_files(job: Path, name: str) -> None:
    """The files of contracts 7 and 8, whole and readable, and no others."""
    files = {str(file.relative_to(job)) for file in job.rglob("*") if file.is_file()}
    events = {file for file in files if file.startswith("tensorboard/")}
    results = {f"result/{file.format(split)}" for file in cli_helpers.RESULT_FILES[name] for split in ("val", "test")}
    assert len(events) == 1
    evaluated = [(row["split"], row["step"]) for row in cli_helpers.log(job) if "split" in row]
    kept = {f"predictions/{split}_step{step}.jsonl" for split, step in evaluated if results}  # of every validation
    assert files - events == OWN_FILES | results | kept
    config = yaml.safe_load((job / "config.yaml").read_text())
    assert config["model"]["arch"] == cli_helpers.RECIPES[name]["model"]["arch"]
    last = checkpoint.load(job / "checkpoint_last.pth")
    assert last["step"] == 6
    assert {"optimizer", "scaler", "ranks", "best", "plan"} <= last.keys()
    assert not {"optimizer", "ranks"} & checkpoint.load(job / "checkpoint_best.pth").keys()
    for file in results:
        assert json.loads((job / file).read_text())


@pytest.mark.slow
def test_written_config_is_a_recipe(tmp_path: Path) -> None:
    """config.yaml of a job, run again, does the same again."""
    path = cli_helpers.project(tmp_path, "caption", {"run": {"max_iters": 2, "test_splits": []}})
    assert cli_helpers.train(path, job="first") == 0
    first = tmp_path / "output" / "first"
    assert cli_helpers.train(first / "config.yaml", job="second") == 0
    assert [row["loss"] for row in cli_helpers.steps(first.with_name("second"))] == [
        r["loss"] for r in cli_helpers.steps(first)
    ]


@pytest.mark.parametrize("name", cli_helpers.RECIPES)
def test_dry_run_says_what_there_is_and_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cli_helpers.project(tmp_path, name)
    assert cli_helpers.train(path, flags=["--dry-run"]) == 0
    out = capsys.readouterr().out
    model = cli_helpers.build(name)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{total:,} in all, {trainable:,} trainable" in out
    for split in ("train", "val", "test"):
        assert f"/{split}: " in out
    assert "6 in all (4 samples per step)" in out
    assert yaml.safe_load(out.split("# dry run")[0])["run"]["batch_size_train"] == 4
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_runner_iter_mixes_datasets_by_ratio(tmp_path: Path) -> None:
    changes = {
        "datasets": {"shapes_caption": cli_helpers.SHAPES},
        "run": {
            "runner": "runner_iter",
            "max_iters": 9,
            "iters_per_inner_epoch": 4,
            "train_dataset_ratios": {"shapes_pairs": 1.0, "shapes_caption": 0.0},
            "valid_splits": [],
            "test_splits": [],
            "keep_checkpoints": 2,
        },
    }
    path = cli_helpers.project(tmp_path, "pretrain", changes)
    assert cli_helpers.train(path, job="pairs") == 0
    mixed = "run.train_dataset_ratios={shapes_pairs: 1.0, shapes_caption: 3.0}"
    assert cli_helpers.train(path, mixed, job="mixed") == 0
    alone = cli_helpers.project(tmp_path, "pretrain", {"run": changes["run"] | {"train_dataset_ratios": None}})
    assert cli_helpers.train(alone, job="alone") == 0
    pairs, mix, only = (
        [row["loss"] for row in cli_helpers.steps(tmp_path / "output" / job)] for job in ("pairs", "mixed", "alone")
    )
    assert pairs == only  # a ratio of 0 takes nothing
    assert mix != only
    job = tmp_path / "output" / "mixed"
    assert [row["epoch"] for row in cli_helpers.steps(job)] == [0] * 4 + [1] * 4 + [2]
    assert {file.name for file in job.glob("*.pth")} == {
        *("checkpoint_last.pth", "checkpoint_best.pth", "checkpoint_8.pth", "checkpoint_9.pth")
    }


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    """NLVR's loss is a mean over samples, so four batches of 2 are one of 8, up to rounding; with the schedule."""
    run = {"warmup_lr": 1e-5, "warmup_steps": 2, "max_iters": 3, "valid_splits": [], "test_splits": []}
    path = cli_helpers.project(tmp_path, "nlvr", cli_helpers.NO_DROPOUT, {"run": run})
    assert cli_helpers.train(path, "run.batch_size_train=2", "run.accum_grad_iters=4", job="accumulated") == 0
    assert cli_helpers.train(path, "run.batch_size_train=8", job="large") == 0
    output = tmp_path / "output"
    pair = [cli_helpers.weights(output / job / "checkpoint_last.pth") for job in ("accumulated", "large")]
    for key in pair[0]:
        if key.endswith(
            ".key.bias"
        ):  # attention does not depend on it: AdamW scales up the rounding of its gradient, 0
            continue
        torch.testing.assert_close(
            pair[0][key], pair[1][key], rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    accumulated, large = (cli_helpers.steps(output / job) for job in ("accumulated", "large"))
    assert [(row["step"], row["lr"]) for row in accumulated] == [(row["step"], row["lr"]) for row in large]
    assert [row["loss"] for row in accumulated] == pytest.approx([row["loss"] for row in large], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", cli_helpers.RECIPES)
def test_bf16_on_cpu_stays_near_fp32(name: str, tmp_path: Path) -> None:
    path = cli_helpers.project(tmp_path, name, cli_helpers.NO_DROPOUT, {"run": {"max_iters": 2, "valid_splits": []}})
    for precision in ("fp32", "bf16"):
        assert cli_helpers.train(path, f"run.precision={precision}", job=precision) == 0
    rows = [cli_helpers.steps(tmp_path / "output" / precision)[0] for precision in ("fp32", "bf16")]
    fp32, bf16 = ({k: v for k, v in row.items() if k.startswith("loss")} for row in rows)
    if name in ("pretrain", "retrieval"):  # which negatives are drawn may change with the rounding
        fp32, bf16 = {"loss_itc": fp32["loss_itc"]}, {"loss_itc": bf16["loss_itc"]}
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.03)
    state = cli_helpers.weights(tmp_path / "output" / "bf16" / "checkpoint_last.pth")
    assert not any(tensor.dtype == torch.bfloat16 for tensor in state.values())


IMAGES = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))
SAMPLES: dict[str, Any] = {
    "image": IMAGES,
    "image0": IMAGES,
    "image1": IMAGES.flip(0),
    "text_input": ["a red circle", "a blue square", "a green circle left of a red square", "a star"],
    "image_id": torch.arange(4),
    "answer": ["red", "yes", "two", "no"],
    "weight": torch.ones(4),
    "n_answers": torch.ones(4, dtype=torch.long),
    "label": torch.tensor([0, 1, 1, 0]),
}


@pytest.mark.parametrize("name", [name for name in cli_helpers.RECIPES if name != "vqa_generate"])
def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    results = []
    for checkpointed in (False, True):
        model = cli_helpers.build(
            name, **cli_helpers.NO_DROPOUT["model"], vit_grad_ckpt=checkpointed, vit_ckpt_layer=2 if checkpointed else 0
        ).train()
        calls = count_calls(model.visual_encoder.blocks[0].mlp.fc1)
        torch.manual_seed(2)
        loss = model(SAMPLES)["loss"]
        loss.backward()
        assert len(calls) == (2 if checkpointed else 1)  # the second forward pass did happen
        results.append((loss.detach(), {key: p.grad for key, p in model.named_parameters()}, model.state_dict()))
    (loss, gradients, state), (other_loss, other_gradients, other_state) = results
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    assert sum(gradient is not None for gradient in gradients.values()) > 10
    for key, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[key], gradient, rtol=0, atol=1e-6)
    cli_helpers.assert_same_state(dict(state), dict(other_state))  # momentum twins and queues moved alike


def count_calls(module: torch.nn.Module) -> list[int]:
    """A list that gets an entry at every call of the module."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", ["pretrain", "retrieval", "classification"])
def test_momentum_twins_of_checkpointed_models_are_their_own(name: str) -> None:
    """A copied block whose wrapper went on calling the original would follow the online weights at once."""
    model = cli_helpers.build(name, vit_grad_ckpt=True, vit_ckpt_layer=2).eval()
    with torch.no_grad():
        before = model.visual_encoder_m(IMAGES)
        assert torch.equal(before, model.visual_encoder(IMAGES))
        for parameter in (p for block in model.visual_encoder.blocks for p in block.parameters()):
            parameter.add_(torch.randn_like(parameter))
        assert torch.equal(model.visual_encoder_m(IMAGES), before)
        assert not torch.equal(model.visual_encoder(IMAGES), before)
    assert not {id(p) for p in model.visual_encoder.parameters()} & {id(p) for p in model.visual_encoder_m.parameters()}
