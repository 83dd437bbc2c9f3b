"""The doors' other side: one training, evaluation or dry run, top to bottom, from a command line.

A user's mistake ends as one line `error: ...` on stderr and exit code 2; anything else keeps its traceback.
"""

import argparse
import dataclasses
import errno
import json
import logging
import os
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lavis_lite.config import Config, ConfigError, RunConfig, parser
from lavis_lite.errors import MissingFileError, RankZeroFailed, UserError
from lavis_lite.registry import registry

logger = logging.getLogger(__name__)

SYSTEM_ERRORS = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some space or write to another disk",
    errno.EROFS: "write to another folder",
    errno.EACCES: "check the permissions of the file and its folder",
    errno.EPERM: "check the permissions of the file and its folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "shorten the name",
    errno.EIO: "the disk or network drive failed",
    errno.ESTALE: "the network drive failed",
}
"""What the operating system refuses, and what to do about it."""

TRAIN_HELP = """Train (and then test) what a YAML describes, in one process or under torchrun.

examples:
  python train.py --cfg-path projects/blip/train/caption_coco_ft.yaml --options run.max_epoch=3 run.batch_size_train=16
  torchrun --nproc_per_node=8 train.py --cfg-path projects/blip/train/caption_coco_ft.yaml --resume auto
  python train.py --cfg-path projects/blip/train/caption_coco_ft.yaml --dry-run"""
EVALUATE_HELP = """Evaluate a model on a YAML's run.valid_splits and run.test_splits, in one process or under torchrun.

examples:
  python evaluate.py --cfg-path projects/blip/eval/caption_coco.yaml --checkpoint output/caption/job/checkpoint_best.pth
  torchrun --nproc_per_node=8 evaluate.py --cfg-path projects/blip/eval/caption_coco.yaml"""


def train_main(argv: Sequence[str] | None = None) -> None:
    """Entry point of train.py and `lavis-lite-train`; ends the process."""
    sys.exit(main(parser(description=TRAIN_HELP), argv))


def evaluate_main(argv: Sequence[str] | None = None) -> None:
    """Entry point of evaluate.py and `lavis-lite-evaluate`; ends the process."""
    p = parser(description=EVALUATE_HELP)
    p.add_argument(
        "--checkpoint", metavar="PATH", help="weights to evaluate (a file or URL), instead of those the YAML names"
    )
    sys.exit(main(p, argv, evaluate=True))


def main(p: argparse.ArgumentParser, argv: Sequence[str] | None, *, evaluate: bool = False) -> int:
    """Parse, run, and return the exit code: 0, or 2 after a user's mistake."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        p.print_help(sys.stderr)
        return 2
    args = p.parse_args(argv)
    _log_to_console()

    def execute() -> None:
        cfg = Config.from_args(args)
        if evaluate:
            cfg.run = dataclasses.replace(cfg.run, evaluate=True)
        dry_run(cfg) if args.dry_run else run(cfg)

    return exit_code(execute)


def exit_code(execute: Callable[[], None]) -> int:
    """Run a command and return its exit code: 0, or 2 after an error that the user can correct, told in one line.

    These are every `UserError`, and what the operating system refuses (`SYSTEM_ERRORS`). Any other error is a bug and
    is raised.
    """
    try:
        execute()
    except UserError as error:
        if _is_first_process() or not isinstance(error, ConfigError):  # a mistake in a file is the same on every rank
            print(f"error: {error}", file=sys.stderr)
        return 2
    except RankZeroFailed as error:
        logger.warning("%s", error)
        return 2
    except OSError as error:
        if error.errno not in SYSTEM_ERRORS:
            raise
        print(f"error: {error}: {SYSTEM_ERRORS[error.errno]}", file=sys.stderr)
        return 2
    return 0


def run(cfg: Config) -> None:
    """Train, or evaluate if `cfg.run.evaluate`; prints an evaluation's metrics. Must be entered by every rank."""
    from lavis_lite import dist

    dist.init(cfg.run.device)
    try:
        metrics = run_job(cfg)
        if metrics and cfg.run.evaluate and dist.is_main():
            print(json.dumps(metrics, indent=2, default=str))
    finally:
        dist.shutdown()


def run_job(cfg: Config) -> dict[str, Any]:
    """`run` between joining and leaving the process group; returns what the runner does."""
    from lavis_lite import dist, preflight
    from lavis_lite import logger as run_logger
    from lavis_lite.runners.sampling import seed_everything

    task = registry.get_task_class(cfg.run.task)(**cfg.task)
    preflight.check_task(cfg, task)
    preflight.check_device(cfg)
    cfg.run, job_dir = start_job(cfg.run)
    run_logger.setup(job_dir)
    datasets = task.build_datasets(cfg)
    preflight.check_data(cfg, task, datasets)
    seed_everything(cfg.run.seed)  # the same on every rank: DDP does not even out the models' buffers
    model = task.build_model(cfg)
    runner = registry.get_runner_class(cfg.run.runner)(cfg, task, model, datasets, job_dir)
    if dist.is_main():
        logger.info("%s", preflight.opening(cfg, runner))
    if cfg.run.evaluate:
        return runner.evaluate()
    started = time.perf_counter()
    result = runner.train()
    if dist.is_main():
        logger.info("%s", preflight.closing(result, job_dir, seconds=time.perf_counter() - started))
    return result


def dry_run(cfg: Config) -> None:
    """Print the merged configuration, parameter and sample counts; the model is built on the meta device."""
    from lavis_lite import dist, preflight
    from lavis_lite.models.base import starting_points

    dist.init("cpu")  # nothing is computed, so the run's device need not be in this machine
    try:
        task = registry.get_task_class(cfg.run.task)(**cfg.task)
        preflight.check_task(cfg, task)
        model = build_without_weights(cfg.model)
        if start := starting_points(cfg.model):
            model.check_start(**start)
        datasets = task.build_datasets(cfg)
        found = preflight.check_data(cfg, task, datasets)
        if dist.is_main():
            print(report(cfg, model, datasets, num_processes=dist.world_size()))
            print("\n".join(preflight.report(cfg, found, datasets)))
    finally:
        dist.shutdown()


def build_without_weights(section: dict[str, Any]) -> Any:
    """Return the model of a `model` section on the meta device: shapes and names, no memory, no weight file read."""
    import torch

    from lavis_lite.config_sections import MODEL_KEYS

    arguments = {key: value for key, value in section.items() if key not in MODEL_KEYS}
    with torch.device("meta"):
        return registry.get_model_class(section["arch"])(**arguments)


def report(cfg: Config, model: Any, datasets: dict[str, dict[str, Any]], *, num_processes: int) -> str:
    """Return the dry run's text."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    lines = [
        "# the merged configuration",
        cfg.to_yaml().rstrip(),
        "",
        "# dry run: no step was run, no weights were read",
    ]
    lines += [f"model       {cfg.model['arch']} {cfg.model['model_type'] or ''}".rstrip()]
    lines += [f"parameters  {sum(p.numel() for p in parameters):,} in all, {trainable:,} trainable"]
    for name, splits in datasets.items():
        for split, dataset in splits.items():
            lines.append(f"samples     {name}/{split}: {len(dataset):,}")
    if not cfg.run.evaluate:
        lines += training_lines(cfg.run, datasets, num_processes=num_processes)
    return "\n".join(lines)


def training_lines(run: RunConfig, datasets: dict[str, dict[str, Any]], *, num_processes: int) -> list[str]:
    """Return each training set's share, if there are several, and how many steps the run takes.

    Raises what training would: no training set, too small a one ...
    """
    from lavis_lite.runners.loaders import train_loader, train_sets

    loader = train_loader(train_sets(datasets, run.train_splits), run, world=num_processes)
    shares = loader.sampler.shares
    of = "samples" if loader.is_concat else "steps"
    lines = [f"share       {name}: {share:.2%} of the {of}" for name, share in shares.items() if len(shares) > 1]
    lines += [f"left out    {key}, which {', '.join(names)} lacks" for key, names in loader.left_out.items()]
    return [*lines, f"steps       {steps_line(run, loader.steps_per_epoch, num_processes=num_processes)}"]


def steps_line(run: RunConfig, per_epoch: int, *, num_processes: int) -> str:
    """Return in words how many steps the run takes, with `per_epoch` an epoch."""
    from lavis_lite.optim import build_schedule

    by_epochs = per_epoch * run.max_epoch
    total = run.max_iters if run.runner == "runner_iter" else min(by_epochs, run.max_iters or by_epochs)
    build_schedule(run, max_epoch=run.max_epoch, iters_per_epoch=per_epoch, total_steps=total)
    batch = f"{run.batch_size_train * num_processes} samples a step"
    accumulation = f", {run.accum_grad_iters} steps an update" if run.accum_grad_iters > 1 else ""
    return f"{per_epoch:,} an epoch, {total:,} in all ({batch}{accumulation})"


def start_job(run: RunConfig) -> tuple[RunConfig, Path]:
    """Return the run with its job and checkpoint settled (by rank 0, for all ranks), and the job's folder."""
    from lavis_lite import dist

    changes = dist.on_main(lambda: _settle_job(run))
    run = dataclasses.replace(run, **changes)
    return run, Path(run.output_dir) / str(run.job_id)


def _settle_job(run: RunConfig) -> dict[str, Any]:
    output = Path(run.output_dir)
    if run.resume == "auto" and not run.evaluate:
        found = newest_checkpoint(output, job_id=run.job_id)
        if found is not None:
            logger.info("resuming %s", found)
            return {"job_id": found.parent.name, "resume_ckpt_path": str(found), "resume": None}
        logger.info("nothing to resume below %s: starting afresh", output)
    if run.resume_ckpt_path is not None:
        path = Path(run.resume_ckpt_path)
        path = path / "checkpoint_last.pth" if path.is_dir() else path
        if not path.is_file():
            raise MissingFileError(f"no checkpoint to resume: {path}")
        return {"job_id": run.job_id or new_job_id(output), "resume_ckpt_path": str(path)}
    return {"job_id": run.job_id or new_job_id(output), "resume": None}


def new_job_id(output: Path) -> str:
    """Return a name made of the time, and make its folder, so that two runs started in one second don't share it."""
    stamp, number = datetime.now().strftime("%Y%m%d_%H%M%S"), 1
    while True:
        name = stamp if number == 1 else f"{stamp}_{number}"
        try:
            (output / name).mkdir(parents=True)
            return name
        except FileExistsError:
            number += 1


def newest_checkpoint(output: Path, *, job_id: str | None = None) -> Path | None:
    """Return the newest readable checkpoint_last.pth of the jobs below `output` (of `job_id`'s only, if given)."""
    found = sorted(output.glob(f"{job_id or '*'}/checkpoint_last.pth"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in found:
        if zipfile.is_zipfile(path):  # a cut-off file lacks the directory at its end
            return path
        logger.warning("%s is damaged; looking for an older one", path)
    return None


def _log_to_console() -> None:
    from lavis_lite import logger as run_logger

    run_logger.setup()
    if not _is_first_process():
        logging.getLogger().setLevel(logging.WARNING)  # before dist.init every process takes itself for the first


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
