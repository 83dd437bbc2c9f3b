"""Resuming: which checkpoint, whether this run can continue it, and what differs from the run that wrote it."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

from lavis_lite.common import checkpoint, dist, integrity
from lavis_lite.common.errors import DamagedFileError, InputError
from lavis_lite.common.optim import build_optimizer
from lavis_lite.common.registry import registry
from lavis_lite.runners import jobs
from lavis_lite.runners.loaders import train_loader, train_sets
from lavis_lite.runners.plan import Plan
from lavis_lite.runners.state import RunState

logger = logging.getLogger(__name__)

TRAINING_STATE = ("model", "optimizer", "scaler", "step", "epoch", "best", "plan", "metrics", "ranks")
_PLACES = ("run.output_dir", "run.job_id", "run.resume", "run.resume_ckpt_path", "run.evaluate", "run.device")
"""Settings that say where a run is, not what it computes."""
_WEIGHTS = ("pretrained", "finetuned", "load_pretrained", "load_finetuned", "checkpoint", "init_vit", "init_text")
_FROM_HERE = {"run.seed": "the order of the data and its augmentation differ from here on"}
_NOT_SET = "not set"


def resume_path(run: Any, job_dir: Path) -> Path | None:
    """The checkpoint to resume, verified: `run.resume_ckpt_path`, or with `run.resume=auto` the job's newest whole one.

    Must be entered by every rank.

    Raises:
        DamagedFileError: the file named by `run.resume_ckpt_path` fails its checksums.
        InputError: `run.resume=auto`, and the job's checkpoints are all damaged.
    """
    return dist.on_main(lambda: _verified(run, job_dir))


def _verified(run: Any, job_dir: Path) -> Path | None:
    if run.resume_ckpt_path:
        return _verify(Path(run.resume_ckpt_path))
    if run.resume != "auto":
        return None
    found = jobs.own_checkpoint(job_dir)
    if found is None:
        logger.info(f"nothing to resume in {job_dir}: starting from the beginning")
    return found


def _verify(path: Path) -> Path:
    if path.is_file():  # else loading it says what is there
        integrity.verify(path)
    return path


def load_verified(path: Path) -> dict[str, Any]:
    """`checkpoint.load` on every rank, of which one verifies the file.

    Raises:
        DamagedFileError: the file fails its checksums (on rank 0; RankZeroFailed on the others).
    """
    dist.on_main(lambda: _verify(path))
    return checkpoint.load(path, verify=False)


def resume_line(cfg: Any, model: nn.Module, datasets: Mapping[str, Mapping[str, Dataset]]) -> str:
    """Return where the training would resume, for a dry run; `model` may be on the meta device and is left as it is.

    Must be entered by every rank.

    Raises:
        DamagedFileError, InputError: the checkpoint cannot be read, or this run cannot continue it.
    """
    path = dist.on_main(lambda: jobs.checkpoint_to_resume(cfg.run))
    if path is None:
        return f"resume      nothing to resume below {cfg.run.output_dir}: the run starts from the beginning"
    sets = train_sets(datasets, cfg.run.train_splits)
    loader, data = train_loader(sets, cfg.run, world=dist.world_size()), annotation_digests(sets)
    plan = registry.get_runner_class(cfg.run.runner).plan_of(cfg.run, loader)
    state = dist.on_main(lambda: _checked_state(cfg, model, path=path, plan=plan, data=data))
    done = f"step {state.step:,} of {plan.total:,}, {state.epoch} of {plan.num_epochs} epochs done"
    return f"resume      {path}: {done}"


def _checked_state(cfg: Any, model: nn.Module, *, path: Path, plan: Plan, data: Mapping[str, str | None]) -> RunState:
    """Return the position of a checkpoint after checking that this run can continue it."""
    saved, config = checkpoint.load(path), cfg.to_dict()
    optimizer = build_optimizer(model.optimizer_groups(cfg.run.weight_decay, cfg.run.lr_layer_decay), cfg.run)
    check_resumable(saved, path=path, plan=plan, optimizer=optimizer, data=data, config=config)
    report_differences(saved, config, path=path)
    checkpoint.load_into(model, checkpoint.find_state_dict(saved, source=str(path)), source=path)
    return RunState.from_dict(saved)


def check_resumable(
    saved: Mapping[str, Any],
    *,
    path: Path,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    data: Mapping[str, str | None],
    config: Mapping[str, Any],
) -> None:
    """Raise InputError, naming each reason and the way out, if this run cannot continue the checkpoint exactly."""
    lost = [key for key in TRAINING_STATE if key not in saved]
    if lost:
        raise InputError(
            f"{path} holds no training state ({', '.join(lost)} missing): resume from a checkpoint_last.pth, "
            "or start anew from these weights with model.pretrained or model.finetuned"
        )
    differs = [*_plan_differences(saved, plan), *_data_differences(saved, data, path=path)]
    if differs:
        raise InputError(
            f"{path} was written with {'; with '.join(differs)}: resume with the same data, sampling and "
            "global batch (processes x run.batch_size_train), or start anew from its weights with model.pretrained"
        )
    reasons = _model_differences(saved["optimizer"], optimizer)
    if reasons:
        changed = [f"{key}: {was} in the checkpoint, {now} now" for key, was, now in differences(saved, config)]
        keys = [text for text in changed if text.startswith(("model.", "run.lr_layer_decay"))]
        hint = f" ({'; '.join(keys)})" if keys else ""
        raise InputError(f"{path}: {'; '.join(reasons)}: resume with the same model{hint}")


def _plan_differences(saved: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    for key, what in (
        ("inner", "iterations per (inner) epoch"),
        ("global_batch", "samples an iteration"),
        ("mixture", "as training sets"),
    ):
        was, now = saved["plan"].get(key), getattr(plan, key)
        if str(was) != str(now):  # as text, in which the order of the training sets counts too
            yield f"{was} {what}, this run has {now}"


def _data_differences(saved: Mapping[str, Any], data: Mapping[str, str | None], *, path: Path) -> Iterator[str]:
    if "data" not in saved:  # written before there were digests
        logger.warning(f"{path} holds no digest of its annotations: whether they have changed is not checked")
        return
    for name, digest in data.items():
        was = saved["data"].get(name)
        if None not in (was, digest) and was != digest:
            yield f"other annotations of {name!r} (digest {was}), this run's have the digest {digest}"


def _model_differences(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> list[str]:
    """Whether the optimizer's states fit the parameters: their names, group by group, and their shapes."""
    before, groups = saved["param_groups"], optimizer.param_groups
    if [group.get("names") for group in before] != [group.get("names") for group in groups]:
        return ["the optimizer's parameter groups differ from this run's"]
    wrong = []
    for was, now in zip(before, groups, strict=True):
        for index, name, parameter in zip(was["params"], now["names"], now["params"], strict=True):
            moment = saved["state"].get(index, {}).get("exp_avg")
            if moment is not None and moment.shape != parameter.shape:
                wrong.append(f"{name} {tuple(moment.shape)} (now {tuple(parameter.shape)})")
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return [f"{len(wrong)} parameters have other shapes: {', '.join(wrong[:3])}{more}"] if wrong else []


def differences(saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Each setting that differs between the checkpoint's configuration and this run's: its key, what it was and is."""
    before, now = dict(_flat(saved.get("config", {}))), dict(_flat(config))
    keys = [*before, *(key for key in now if key not in before)]
    pairs = [(key, before.get(key, _NOT_SET), now.get(key, _NOT_SET)) for key in keys if key not in _PLACES]
    return [(key, was, is_) for key, was, is_ in pairs if was != is_ and {was, is_} != {_NOT_SET, "None"}]


def report_differences(saved: Mapping[str, Any], config: Mapping[str, Any], *, path: Path) -> None:
    """Log each setting that differs from the checkpoint's, one line each, and what becomes of it."""
    found = differences(saved, config)
    if found:
        logger.info(f"settings that differ from those that {path} was written with:")
    for key, was, now in found:
        logger.info(f"{key}: {was} in the checkpoint, {now} now: {_consequence(key)}")


def _consequence(key: str) -> str:
    section, name = key.split(".")[:2] if "." in key else (key, "")
    if section == "model" and name in _WEIGHTS:
        return "no effect, the weights are the checkpoint's"
    if section in ("imports", "expected"):
        return "no effect on the training"
    return f"applied, {_FROM_HERE[key]}" if key in _FROM_HERE else "applied"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and the text of their values, through nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def apply_hyperparameters(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state and keep this run's hyperparameters (betas, weight decay ...) instead of the saved."""
    kept = ("params", "lr")  # the rate is set at each step
    own = [{key: value for key, value in group.items() if key not in kept} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def annotation_digests(sets: Mapping[str, Dataset]) -> dict[str, str | None]:
    """A digest of each training set's annotation files, on every rank; None for a set that has no files.

    Rank 0 reads the files, about a second per gigabyte.
    """
    return dist.on_main(lambda: {name: _digest(dataset) for name, dataset in sets.items()})


def _digest(dataset: Dataset) -> str | None:
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    files = [Path(path) for part in parts for path in getattr(part, "annotation_paths", ())]
    if not files or not all(path.is_file() for path in files):
        return None
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def check_best(state: RunState, source: Path) -> None:
    """Forget the best validation, with a warning, if its weights beside the resumed checkpoint are lost or damaged.

    Must be entered by every rank; `source` is the checkpoint that is resumed.
    """
    if state.best_metric is None:
        return
    best = source.with_name(jobs.BEST)
    reason = dist.on_main(lambda: _why_lost(best))
    if reason is not None:
        logger.warning(
            f"{reason}: the best validation so far ({state.best_metric:.4g}) is forgotten, and the best weights are "
            f"looked for anew from step {state.step} on; without a further validation the last weights are the best"
        )
        state.best_metric = state.best_epoch = None


def _why_lost(path: Path) -> str | None:
    if not path.is_file():
        return f"{path} is gone"
    try:
        integrity.verify(path, as_zip=True)
    except DamagedFileError as error:
        return str(error)
    return None
