"""The doors' other side: one training, evaluation or dry run, top to bottom, from a command line.

A user's mistake ends as one line `error: ...` on stderr and exit code 2, a failure of the machine likewise with 1, a
stop signal with 143 or 130; anything else keeps its traceback.
"""

import argparse
import dataclasses
import errno
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lavis_lite.common.config.config import (
    Config,
    ConfigError,
    RunConfig,
    parser,
)
from lavis_lite.common.errors import RankZeroFailed, UserError
from lavis_lite.common.registry import registry
from lavis_lite.runners.jobs import (
    discard_if_unused,
    held,
    new_job_id,
    newest_checkpoint,
    start_job,
)
from lavis_lite.runners.stopping import Stopped, StopSignals

__all__ = ["evaluate_main", "main", "new_job_id", "newest_checkpoint", "run", "start_job", "train_main"]

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
"""Errors of the operating system that a user can correct, and the advice for each."""

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
    """Parse, run, and return the exit code; see `exit_code`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        p.print_help(sys.stderr)
        return 2
    args = p.parse_args(argv)
    _log_to_console()

    def execute() -> None:
        with StopSignals() as stop:
            cfg = Config.from_args(args)
            if evaluate:
                cfg.run = dataclasses.replace(cfg.run, evaluate=True)
            dry_run(cfg) if args.dry_run else run(cfg, stop)

    return exit_code(execute, command=[sys.argv[0], *argv])


def exit_code(execute: Callable[[], None], *, command: Sequence[str] = ()) -> int:
    """Run a command and return its exit code.

    0; 2 after an error that the user can correct (every `UserError`, and what the operating system refuses,
    `SYSTEM_ERRORS`); 1 after a failure of the machine (`failures.explain`); 130 or 143 after a stop signal. Each is
    printed as one line. Any other error is a bug and is raised. `command` is the command line that was given.
    """
    try:
        execute()
    except Stopped as stop:
        if _is_first_process():
            line = stop_line(stop, command)
            print(line, file=sys.stderr)
            _keep(line)
        return stop.exit_code
    except KeyboardInterrupt:  # before the signals are caught
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    except RankZeroFailed as error:
        logger.warning("%s", error)
        return 2
    except Exception as error:
        found = _explained(error)
        if found is None:
            raise
        code, line = found
        if _is_first_process() or not isinstance(error, ConfigError):  # a mistake in a file is the same on every rank
            print(line, file=sys.stderr)
        _keep(line, error)
        return code
    return 0


def _explained(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and the line of an error that is not a bug."""
    from lavis_lite.cli import failures

    if isinstance(error, UserError):
        return 2, f"error: {failures.own_words(error)}"
    if isinstance(error, OSError):
        words = failures.own_words(error)
        number = error.errno or _errno_in(words)
        if number in SYSTEM_ERRORS:
            return 2, f"error: {words}: {SYSTEM_ERRORS[number]}"
    failure = failures.explain(error)
    rank = os.environ.get("RANK")
    return None if failure is None else (1, f"error: {failure}" if rank is None else f"error: rank {rank}: {failure}")


def _errno_in(text: str) -> int | None:
    """The number in the text of an OSError, which torch raises anew without it if a loader worker raised it."""
    found = re.match(r"\[Errno (\d+)\]", text)
    return int(found[1]) if found else None


def _keep(line: str, error: Exception | None = None) -> None:
    if "torch" in sys.modules:  # the logger imports it; a run that has not imported it has no log file
        from lavis_lite.common import logger as run_logger

        run_logger.keep_line(line, error)


def stop_line(stop: Stopped, command: Sequence[str]) -> str:
    """Return what is said at the end of a stopped run: where it stopped, and the command that continues it."""
    if stop.job_id is None:
        return f"stopped by {stop}: nothing was saved; start it again with: {_shell(command)}"
    at = f"stopped at step {stop.step:,}" if stop.step is not None else "stopped"
    kept, flags = [], iter(command)
    for flag in flags:
        if flag in ("--resume", "--job-id"):
            next(flags, None)
        elif not flag.startswith(("--resume=", "--job-id=")):
            kept.append(flag)
    return f"{at} by {stop}; resume with: {_shell([*kept, '--resume', 'auto', '--job-id', stop.job_id])}"


def _shell(command: Sequence[str]) -> str:
    """Return the command line as typed: after `python` for a script, after `torchrun ...` under torchrun."""
    script = [Path(command[0]).name if not command[0].endswith(".py") else command[0], *command[1:]] if command else []
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return f"torchrun ... {shlex.join(script)}"
    return f"python {shlex.join(script)}" if command and command[0].endswith(".py") else shlex.join(script)


def run(cfg: Config, stop: StopSignals) -> None:
    """Train, or evaluate if `cfg.run.evaluate`; prints an evaluation's metrics. Must be entered by every rank.

    Raises:
        Stopped: the process was asked to stop by a signal that `stop` caught.
    """
    from lavis_lite.common import dist

    dist.init(cfg.run.device)
    try:
        metrics = run_job(cfg, stop)
        if metrics and cfg.run.evaluate and dist.is_main():
            print(json.dumps(metrics, indent=2, default=str))
    finally:
        dist.shutdown()


def run_job(cfg: Config, stop: StopSignals) -> dict[str, Any]:
    """`run` between joining and leaving the process group; returns what the runner does."""
    from lavis_lite.cli import preflight
    from lavis_lite.common import logger as run_logger

    task = registry.get_task_class(cfg.run.task)(**cfg.task)
    preflight.check_task(cfg, task)
    preflight.check_device(cfg)
    cfg.run, job_dir = start_job(cfg.run)
    with held(job_dir):
        run_logger.setup(job_dir)
        runner = None
        try:
            runner = build_runner(cfg, task, job_dir)
            runner.stop = stop
            return execute(cfg, runner)
        except (UserError, RankZeroFailed):
            _discard_unbegun(job_dir, runner)
            raise
        except (Stopped, RuntimeError) as error:
            stopped = error if isinstance(error, Stopped) else _stopped_too(stop, error)
            if stopped is None:
                raise
            _discard_unbegun(job_dir, runner)
            if not cfg.run.evaluate and (job_dir / "checkpoint_last.pth").is_file():
                stopped.job_id, stopped.step = str(cfg.run.job_id), getattr(runner, "saved_step", None)
            raise stopped from None


def _discard_unbegun(job_dir: Path, runner: Any) -> None:
    """Delete the folder of a run that ends before its first step, if there is nothing else in it."""
    from lavis_lite.common import dist
    from lavis_lite.common import logger as run_logger

    if dist.is_main() and not getattr(runner, "has_begun", False):
        run_logger.setup()  # closes console.txt
        discard_if_unused(job_dir)


def _stopped_too(stop: StopSignals, error: RuntimeError) -> Stopped | None:
    """The stop of a rank that was asked to, and whose collective failed because another rank was faster to end."""
    from lavis_lite.common import dist

    return Stopped(stop.signum) if stop.signum is not None and dist.lost_rank(error) else None


def build_runner(cfg: Config, task: Any, job_dir: Path) -> Any:
    """Build the task's datasets, check them, and build the model and the runner."""
    from lavis_lite.cli import preflight
    from lavis_lite.runners.sampling import seed_everything

    datasets = task.build_datasets(cfg)
    found = preflight.check_data(cfg, task, datasets)
    seed_everything(cfg.run.seed)  # the same on every rank: DDP does not even out the models' buffers
    model = task.build_model(cfg)
    preflight.check_model(cfg, task, model, datasets, found)
    return registry.get_runner_class(cfg.run.runner)(cfg, task, model, datasets, job_dir)


def execute(cfg: Config, runner: Any) -> dict[str, Any]:
    """Evaluate or train, with a few lines about the run before and after it."""
    from lavis_lite.cli import preflight
    from lavis_lite.common import dist

    if dist.is_main():
        logger.info("%s", preflight.opening(cfg, runner))
    if cfg.run.evaluate:
        return runner.evaluate()
    started = time.perf_counter()
    result = runner.train()
    if dist.is_main():
        logger.info("%s", preflight.closing(result, runner.job_dir, seconds=time.perf_counter() - started))
    return result


def dry_run(cfg: Config) -> None:
    """Print the merged configuration, parameter and sample counts, and where the run would resume; the model is built
    on the meta device.
    """
    from lavis_lite.cli import preflight
    from lavis_lite.common import dist
    from lavis_lite.models.base import starting_points
    from lavis_lite.runners.resume import resume_line

    dist.init("cpu")  # nothing is computed, so the run's device need not be in this machine
    try:
        task = registry.get_task_class(cfg.run.task)(**cfg.task)
        preflight.check_task(cfg, task)
        model = build_without_weights(cfg.model)
        if start := starting_points(cfg.model):
            model.check_start(**start)
        datasets = task.build_datasets(cfg)
        found = preflight.check_data(cfg, task, datasets)
        preflight.check_model(cfg, task, model, datasets, found)
        is_there = cfg.run.resume_ckpt_path and "run.resume_ckpt_path" not in dict(preflight.lost_weights(cfg))
        resumes = not cfg.run.evaluate and (cfg.run.resume or is_there)
        lines = [resume_line(cfg, model, datasets)] if resumes else []
        if dist.is_main():
            print(report(cfg, model, datasets, num_processes=dist.world_size()))
            print("\n".join([*lines, *preflight.report(cfg, found, datasets)]))
    finally:
        dist.shutdown()


def build_without_weights(section: dict[str, Any]) -> Any:
    """Return the model of a `model` section on the meta device: shapes and names, no memory, no weight file read."""
    import torch

    from lavis_lite.common.config import trained as trained_config
    from lavis_lite.common.config.sections import MODEL_KEYS

    arguments = {key: value for key, value in section.items() if key not in MODEL_KEYS}
    with torch.device("meta"), trained_config.fitting_adapters(section, section.get("checkpoint")):
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
    from lavis_lite.common.optim import build_schedule

    by_epochs = per_epoch * run.max_epoch
    total = run.max_iters if run.runner == "runner_iter" else min(by_epochs, run.max_iters or by_epochs)
    build_schedule(run, max_epoch=run.max_epoch, iters_per_epoch=per_epoch, total_steps=total)
    batch = f"{run.batch_size_train * num_processes} samples a step"
    accumulation = f", {run.accum_grad_iters} steps an update" if run.accum_grad_iters > 1 else ""
    return f"{per_epoch:,} an epoch, {total:,} in all ({batch}{accumulation})"


def _log_to_console() -> None:
    from lavis_lite.common import logger as run_logger

    run_logger.setup()
    if not _is_first_process():
        logging.getLogger().setLevel(logging.WARNING)  # before dist.init every process takes itself for the first


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
