"""Description and provenance of a run: model, weights, machine, versions, command line."""

import hashlib
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lavis_lite import __version__
from lavis_lite.common import dist
from lavis_lite.common.config.config import Config
from lavis_lite.common.precision import has_fast_bf16
from lavis_lite.models.base import BaseModel
from lavis_lite.runners.jobs import BEST
from lavis_lite.runners.plan import Plan
from lavis_lite.runners.runner import Runner

PACKAGES = ("torch", "transformers", "timm", "pycocoevalcap", "peft", "bitsandbytes")


def about(cfg: Config, runner: Runner, plan: Plan | None) -> dict[str, Any]:
    """Return what a run is, for its log; `plan` is that of a training."""
    total, trainable = parameters(runner.model)
    found = provenance(cfg, runner) | {"parameters": total, "trainable": trainable, "seed": cfg.run.seed}
    return found if plan is None else {**found, "steps": plan.total, "epochs": plan.num_epochs}


def describe(cfg: Config, runner: Runner, known: dict[str, Any]) -> list[str]:
    """Return the lines that a run begins with; `known` is what `about` returns."""
    share = 100 * known["trainable"] / max(1, known["parameters"])
    processes = f" x {known['processes']} processes" if known["processes"] > 1 else ""
    is_slow = known["precision"] == "float32" and runner.device.type == "cpu" and has_fast_bf16()
    hint = " (this CPU computes bf16 in less time: run.precision=bf16)" if is_slow else ""
    lines = [
        f"{cfg.model['arch']} {cfg.model.get('model_type') or ''}: parameters {known['parameters']:,} in all, "
        f"{known['trainable']:,} trainable ({share:.1f} %); task {cfg.run.task}",
        f"device {known['device']}{processes}, {known['precision']}{hint}; seed {known['seed']}",
    ]
    if "steps" in known and not cfg.run.evaluate:
        lines.append(f"{known['steps']:,} steps in {known['epochs']:,} epochs, validated on {_valid(cfg)}")
    return [*lines, f"folder {runner.job_dir}"]


def _valid(cfg: Config) -> str:
    return ", ".join(cfg.run.valid_splits) or "no split"


def next_commands(cfg: Config, runner: Runner) -> list[str]:
    """Return the commands that evaluate what a training left, and that show a run."""
    job = runner.job_dir
    report = f"report: {shlex.join(['lavis-lite', 'report', str(job)])}"
    evaluate = ["lavis-lite", "evaluate", "--cfg-path", str(job / "config.yaml"), "--checkpoint", str(job / BEST)]
    can_evaluate = not cfg.run.evaluate and (cfg.run.valid_splits or cfg.run.test_splits)
    return [f"evaluate: {shlex.join(evaluate)}", report] if can_evaluate else [report]


def parameters(model: BaseModel) -> tuple[int, int]:
    """Return the numbers of all parameters, and of those that are trained."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)


def provenance(cfg: Config, runner: Runner) -> dict[str, Any]:
    """Return what is needed to know where numbers are from, but for a digest of the weights."""
    section = cfg.model
    named = cfg.run.resume_ckpt_path or section.get("checkpoint")
    packaged = [section.get(key) for key in ("finetuned", "pretrained") if section.get(f"load_{key}")]
    return {
        "recipe": cfg.source,
        "command": sys.argv,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": f"{section['arch']}/{section.get('model_type')}",
        "weights": named or next((path for path in packaged if path), None),
        "config_sha256": hashlib.sha256(cfg.to_yaml().encode("utf-8", "surrogatepass")).hexdigest(),
        "versions": {"lavis_lite": __version__, "python": platform.python_version()} | _versions(),
        "device": torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else str(runner.device),
        "precision": str(runner.dtype).removeprefix("torch."),
        "processes": dist.world_size(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
