"""Schedules against LAVIS's recorded tables and hand arithmetic; parameter groups against its recorded groups."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.optim import build_optimizer, build_schedule, parameter_groups, set_lr
from lavis_lite.common.registry import registry

TABLES = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference")) / "tables"


def recorded_schedules() -> list[Any]:
    tables = json.loads((TABLES / "lr_schedules.json").read_text())
    return [
        pytest.param(name, table, id=f"{name}-{number}")
        for name, cases in tables.items()
        if not name.startswith("_")
        for number, table in enumerate(cases)
    ]


LAVIS = {"warmup_start_lr": "warmup_lr", "decay_rate": "lr_decay_rate", "per_epoch": "lr_sched_per_epoch"}


def schedule(name: str, *, iters_per_epoch: int, total_steps: int, max_epoch: int = 1, **settings: Any) -> Any:
    """The schedule of a run with these settings, some of which have LAVIS's names; a negative start is none."""
    settings = {LAVIS.get(key, key): value for key, value in settings.items() if key != "warmup_start_lr" or value >= 0}
    run = RunConfig(task="", lr_sched=name, **settings)
    schedule_class = registry.get_lr_scheduler_class(name)
    return schedule_class(run=run, max_epoch=max_epoch, iters_per_epoch=iters_per_epoch, total_steps=total_steps)


@pytest.mark.parametrize(("name", "table"), recorded_schedules())
def test_per_epoch_variant_equals_lavis(name: str, table: dict[str, Any]) -> None:
    iters = table["iters_per_epoch"]
    rows = table["rows_epoch_step_lr0_lr1"]
    built = schedule(name, per_epoch=True, iters_per_epoch=iters, total_steps=len(rows), **table["kwargs"])
    for epoch, step, lr, _ in rows:
        assert built.lr_at(epoch * iters + step) == pytest.approx(lr, rel=1e-14), (epoch, step)


def test_cosine_moves_every_step() -> None:
    built = schedule(
        "linear_warmup_cosine_lr",
        init_lr=1.0,
        min_lr=0.2,
        warmup_start_lr=0.0,
        warmup_steps=4,
        iters_per_epoch=3,
        max_epoch=4,
        total_steps=12,
    )
    assert [built.lr_at(step) for step in range(4)] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    expected = [0.2 + 0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert [built.lr_at(step) for step in range(4, 12)] == pytest.approx(expected)
    assert built.lr_at(12) == pytest.approx(0.2)
    assert built.lr_at(1000) == pytest.approx(0.2)


def test_step_decay_per_step_and_floor() -> None:
    built = schedule(
        "linear_warmup_step_lr", init_lr=1.0, min_lr=0.1, decay_rate=0.25, iters_per_epoch=2, max_epoch=3, total_steps=6
    )
    assert [built.lr_at(step) for step in range(6)] == pytest.approx([1.0, 0.5, 0.25, 0.125, 0.1, 0.1])


def test_step_decay_needs_a_rate() -> None:
    with pytest.raises(ValueError, match="lr_decay_rate"):
        schedule("linear_warmup_step_lr", init_lr=1.0, iters_per_epoch=1, total_steps=1)


def test_warmup_without_start_is_said(caplog: pytest.LogCaptureFixture) -> None:
    run = run_config(warmup_steps=10, warmup_lr=None)
    built = build_schedule(run, max_epoch=1, iters_per_epoch=20, total_steps=20)
    assert built.lr_at(0) == run.init_lr
    assert "warmup_lr" in caplog.text


def test_unknown_schedule_suggests() -> None:
    with pytest.raises(KeyError, match="linear_warmup_cosine_lr"):
        build_schedule(run_config(lr_sched="linear_warmup_cosin_lr"), max_epoch=1, iters_per_epoch=1, total_steps=1)


def run_config(**changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = {
        "init_lr": 1e-2,
        "min_lr": 0.0,
        "warmup_lr": None,
        "warmup_steps": 0,
        "lr_decay_rate": None,
        "lr_sched": "linear_warmup_cosine_lr",
        "lr_sched_per_epoch": False,
        "beta1": 0.8,
        "beta2": 0.9,
    }
    return SimpleNamespace(**{**fields, **changes})


class Named(nn.Module):
    """Parameters of given names (dots become submodules), matrices or vectors."""

    def __init__(self, ndims: dict[str, int]) -> None:
        super().__init__()
        for name, ndim in ndims.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, nn.Parameter(torch.zeros([2] * ndim)))


def test_groups_equal_lavis_base_model() -> None:
    table = json.loads((TABLES / "optimizer_groups.json").read_text())
    decayed, plain = table["blip_retrieval (BaseModel.get_optimizer_params wd=0.05 lr_scale=0.9)"]
    ndims = {"temp": 0} | dict.fromkeys(decayed["params"], 2) | dict.fromkeys(plain["params"][1:], 1)
    model = Named(ndims)
    model.register_parameter("frozen", nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    groups = parameter_groups(model, 0.05, lambda name: 0.9)
    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [(0.05, 0.9), (0.0, 0.9)]
    assert [sorted(g["names"]) for g in groups] == [sorted(decayed["params"]), sorted(plain["params"])]
    by_name = dict(model.named_parameters())
    assert all(p is by_name[n] for g in groups for p, n in zip(g["params"], g["names"], strict=True))


def test_groups_by_layer_scale() -> None:
    model = Named({"head.weight": 2, "blocks.0.weight": 2, "blocks.0.bias": 1, "blocks.1.weight": 2, "table_bias": 2})
    scales = {"blocks.0": 0.25, "blocks.1": 0.5}
    groups = parameter_groups(model, 0.1, lambda name: scales.get(name[:8], 1.0))
    found = [(g["names"], g["weight_decay"], g["lr_scale"]) for g in groups]
    assert found == [
        (["head.weight"], 0.1, 1.0),
        (["table_bias"], 0.0, 1.0),
        (["blocks.0.weight"], 0.1, 0.25),
        (["blocks.0.bias"], 0.0, 0.25),
        (["blocks.1.weight"], 0.1, 0.5),
    ]


@pytest.mark.slow
def test_layer_scale_applies_to_the_update() -> None:
    """With AdamW's first step of size lr (no decay), the two weights must move by lr and lr/4."""
    model = Named({"head.weight": 1, "low.weight": 1})
    optimizer = build_optimizer(
        parameter_groups(model, 0.0, lambda name: 0.25 if name.startswith("low") else 1.0), run_config()
    )
    set_lr(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert model.head.weight[0].item() == pytest.approx(-0.1, rel=1e-5)
    assert model.low.weight[0].item() == pytest.approx(-0.025, rel=1e-5)
    assert optimizer.defaults["betas"] == (0.8, 0.9)


def test_nothing_trainable_is_an_error() -> None:
    model = Named({"weight": 2}).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(parameter_groups(model, 0.05), run_config())
