"""Resuming: the checkpoint, whether this run can continue it exactly, and what differs from the run that wrote it."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lavis_lite.common import checkpoint, dist, integrity
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import DamagedFileError, InputError
from lavis_lite.common.optim import build_optimizer
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.digests import annotation_digest
from lavis_lite.datasets.protocols import SampleDataset
from lavis_lite.datasets.streams import StreamDataset
from lavis_lite.models.base import BaseModel
from lavis_lite.runners import jobs
from lavis_lite.runners.loaders import Datasets, JoinedSplits, train_sets
from lavis_lite.runners.plan import Plan
from lavis_lite.runners.streaming import check_division
from lavis_lite.runners.train_state import TrainState

logger = logging.getLogger(__name__)

TRAINING_STATE = ("model", "optimizer", "scaler", "step", "epoch", "best", "plan", "metrics", "ranks")
MUST_STAY = {"inner": "steps per (inner) epoch", "global_batch": "samples per step", "mixture": "as training sets"}
"""Fields of the plan that a resumed run must not change, with their unit."""
PLACES = ("run.output_dir", "run.job_id", "run.resume", "run.resume_ckpt_path", "run.evaluate", "run.device")
"""Settings of the place that a run is in, which change nothing that it computes."""
WEIGHTS = ("pretrained", "finetuned", "load_pretrained", "load_finetuned", "checkpoint", "init_vit", "init_text")
NOT_SET = "not set"


def resume(
    state: TrainState,
    run: RunConfig,
    plan: Plan,
    *,
    job_dir: Path,
    data: Mapping[str, str | None],
    config: Mapping[str, Any],
) -> None:
    """Restore the state from the run's checkpoint, if there is one to resume; must be entered by every rank.

    `data` are the digests of the training sets' annotations, `config` is the run's configuration.

    Raises:
        DamagedFileError: the file named by `run.resume_ckpt_path` fails its checksums.
        InputError: `run.resume=auto` and the job's checkpoints are all damaged, or this run cannot continue the
            checkpoint exactly.
    """
    path = dist.on_main(lambda: _verified_checkpoint(run, job_dir))
    if path is None:
        return
    saved = checkpoint.load(path, verify=False)
    dist.on_main(lambda: _check_resumable(saved, config, path, plan=plan, optimizer=state.optimizer, data=data))
    state.restore(saved, seed=run.seed, source=path)
    _carry_over_best(state, path.with_name(jobs.BEST), job_dir / jobs.BEST)
    logger.info(f"resumed {path} at step {state.step} of {plan.total}")
    if state.epoch >= plan.num_epochs:
        done = f"{state.epoch} of {plan.num_epochs} epochs are done at step {state.step} of {plan.total}"
        logger.warning(
            f"nothing is left to train: {done}. To train more, raise run.max_iters or run.max_epoch by an epoch"
        )


def load_verified(path: Path) -> Mapping[str, Any]:
    """Load a checkpoint on every rank, of which one verifies the file.

    Raises:
        DamagedFileError: the file fails its checksums (on rank 0; RankZeroFailed on the others).
    """
    dist.on_main(lambda: _verify(path))
    return checkpoint.load(path, verify=False)


def resume_line(cfg: Config, model: BaseModel, datasets: Datasets, plan: Plan) -> str:
    """Return where the training would resume, for a dry run; `model` may be on the meta device and is left as it is.

    Must be entered by every rank.

    Raises:
        DamagedFileError, InputError: the checkpoint cannot be read, or this run cannot continue it.
    """
    path = dist.on_main(lambda: jobs.checkpoint_to_resume(cfg.run))
    if path is None:
        return f"resume      nothing to resume below {cfg.run.output_dir}: the run starts from the beginning"
    data = annotation_digests(train_sets(datasets, cfg.run.train_splits))

    def position() -> tuple[int, int]:
        saved = checkpoint.load(path)
        optimizer = build_optimizer(model.optimizer_groups(cfg.run.weight_decay, cfg.run.lr_layer_decay), cfg.run)
        _check_resumable(saved, cfg.to_dict(), path, plan=plan, optimizer=optimizer, data=data)
        checkpoint.load_into(model, checkpoint.find_state_dict(saved, source=str(path)), source=path)
        return saved["step"], saved["epoch"]

    step, epoch = dist.on_main(position)
    return f"resume      {path}: step {step:,} of {plan.total:,}, {epoch} of {plan.num_epochs} epochs done"


def annotation_digests(sets: Mapping[str, SampleDataset]) -> dict[str, str | None]:
    """Return a digest of each training set's annotation files, on every rank; None for a set that has no files. Of a
    stream, whose shards are not read for it, a digest of their names.

    Rank 0 reads the files, about a second per gigabyte.
    """
    return dist.on_main(lambda: {name: _digest(dataset) for name, dataset in sets.items()})


def _verified_checkpoint(run: RunConfig, job_dir: Path) -> Path | None:
    """Return the checkpoint to resume: `run.resume_ckpt_path`, or with `run.resume=auto` the job's newest whole one."""
    if run.resume_ckpt_path:
        return _verify(Path(run.resume_ckpt_path))
    return jobs.newest_checkpoint(job_dir.parent, job_id=job_dir.name) if run.resume == "auto" else None


def _verify(path: Path) -> Path:
    if path.is_file():  # otherwise loading reports which files there are
        checkpoint.verify(path)
    return path


def _check_resumable(
    saved: Mapping[str, Any],
    config: Mapping[str, Any],
    path: Path,
    *,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    data: Mapping[str, str | None],
) -> None:
    """Log the settings that differ from the checkpoint's. Raise InputError, naming each reason and what to do, if this
    run cannot continue it exactly.
    """
    missing = [key for key in TRAINING_STATE if key not in saved]
    if missing:
        problem = f"{path} holds no training state ({', '.join(missing)} missing)"
        raise InputError(f"{problem}: resume from a checkpoint_last.pth, or start from it with model.pretrained")
    if "data" not in saved:  # written before there were digests
        logger.warning(f"{path} holds no digest of its annotations: whether they have changed is not checked")
    if differs := list(_data_differences(saved, plan, data)):
        raise InputError(
            f"{path} was written with {'; with '.join(differs)}: resume with the same data, sampling and global batch "
            "(run.batch_size_train x processes x run.accum_grad_iters, or run.global_batch), or start anew with "
            "model.pretrained"
        )
    for name in plan.sampler.streams:
        num_parts = sum(len(rank["streams"][name]["positions"]) for rank in saved["ranks"])
        check_division(num_parts, plan.sampler.division[1], name)
    changed = {key: f"{was} in the checkpoint, {now} now" for key, was, now in _differences(saved, config)}
    if reason := _model_difference(saved["optimizer"], optimizer):
        keys = [key for key in changed if key.startswith(("model.", "run.lr_layer_decay"))]
        settings = "; ".join(f"{key}: {changed[key]}" for key in keys)
        raise InputError(f"{path}: {reason}: resume with the same model ({settings})")
    if changed:
        logger.info(f"settings that differ from those that {path} was written with:")
    for key, text in changed.items():
        logger.info(f"{key}: {text}: {_consequence(key)}")


def _model_difference(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str | None:
    """Return how the optimizer's saved state does not fit the parameters: their names per group, or their shapes."""
    before, groups = saved["param_groups"], optimizer.param_groups
    if [group.get("names") for group in before] != [group.get("names") for group in groups]:
        return "the optimizer's parameter groups differ from this run's"
    for was, now in zip(before, groups, strict=True):
        for index, parameter in zip(was["params"], now["params"], strict=True):
            moment = saved["state"].get(index, {}).get("exp_avg")
            if moment is not None and moment.shape != parameter.shape:
                return "parameters have other shapes"
    return None


def _data_differences(saved: Mapping[str, Any], plan: Plan, data: Mapping[str, str | None]) -> Iterator[str]:
    own = plan.to_dict()
    for key, unit in MUST_STAY.items():
        was = saved["plan"].get(key)
        if str(was) != str(own[key]):  # as text, in which the order of the training sets counts too
            yield f"{was} {unit}, this run has {own[key]}"
    for name, digest in data.items():
        was = saved.get("data", {}).get(name)
        if None not in (was, digest) and was != digest:
            yield f"other annotations of {name!r} (digest {was}), this run's have the digest {digest}"


def _differences(saved: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield each setting that differs: its key, the checkpoint's value, this run's."""
    before, now = dict(_flat(saved.get("config", {}))), dict(_flat(config))
    for key in dict.fromkeys([*before, *now]):
        was, is_ = before.get(key, NOT_SET), now.get(key, NOT_SET)
        if key not in PLACES and was != is_ and {was, is_} != {NOT_SET, "None"}:
            yield key, was, is_


def _consequence(key: str) -> str:
    section, _, rest = key.partition(".")
    if section == "model" and rest.split(".")[0] in WEIGHTS:
        return "no effect, the weights are the checkpoint's"
    if section in ("imports", "expected"):
        return "no effect on the training"
    return "applied, the order of the data and its augmentation differ from here on" if key == "run.seed" else "applied"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys and the text of their values, through nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _digest(dataset: SampleDataset) -> str | None:
    if isinstance(dataset, StreamDataset):
        return hashlib.blake2b("|".join(dataset.names).encode(), digest_size=8).hexdigest()
    parts = dataset.datasets if isinstance(dataset, JoinedSplits) else [dataset]
    return annotation_digest(*(part for part in parts if isinstance(part, BaseDataset)))


def _carry_over_best(state: TrainState, source: Path, target: Path) -> None:
    """Copy the best weights beside the resumed checkpoint into the job's folder, or forget the best validation, with a
    warning, if they are lost or damaged.
    """
    if state.best_metric is None:
        return
    reason = dist.on_main(lambda: _why_lost(source))
    if reason is not None:
        logger.warning(
            f"{reason}: the best validation so far ({state.best_metric:.4g}) is forgotten, and the best weights are "
            f"chosen anew from step {state.step} on"
        )
        state.best_metric = state.best_epoch = None
    elif source.resolve() != target.resolve():
        dist.on_main(lambda: checkpoint.link_or_copy(source, target) and None)


def _why_lost(path: Path) -> str | None:
    try:
        integrity.verify(path, as_zip=True)
    except (DamagedFileError, FileNotFoundError) as error:
        return str(error)
    return None
