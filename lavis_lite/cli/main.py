"""The commands train and evaluate: run one training, evaluation or dry run from a command line."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_lite.cli import own_data
from lavis_lite.cli.failures import exit_code, is_first_process
from lavis_lite.common.config.config import Config, parser
from lavis_lite.common.errors import RankZeroFailed, UserError
from lavis_lite.common.registry import registry
from lavis_lite.runners.jobs import BEST, LAST, discard_if_unused, held, start_job, unfinished_files
from lavis_lite.runners.stopping import Stopped, StopSignals

if TYPE_CHECKING:
    from lavis_lite.cli.verdict import References, Row
    from lavis_lite.runners.plan import Plan
    from lavis_lite.runners.runner import Runner

logger = logging.getLogger(__name__)

TRAIN_HELP = """Train (and then test) what a YAML describes, in one process or under torchrun.

examples:
  python train.py --cfg-path projects/blip/train/caption_coco_ft.yaml --options run.max_epoch=3 run.batch_size_train=16
  torchrun --nproc_per_node=8 train.py --cfg-path projects/blip/train/caption_coco_ft.yaml --resume auto
  python train.py --cfg-path projects/blip/train/caption_coco_ft.yaml --dry-run
  python train.py --data photos/ --model blip_caption/base_coco --out output/photos    (--data --help: its options)"""
EVALUATE_HELP = """Evaluate a model on a YAML's run.valid_splits and run.test_splits, in one process or under torchrun.

examples:
  python evaluate.py --cfg-path projects/blip/eval/caption_coco.yaml --checkpoint output/caption/job/checkpoint_best.pth
  torchrun --nproc_per_node=8 evaluate.py --cfg-path projects/blip/eval/caption_coco.yaml --resume auto"""


def train_main(argv: Sequence[str] | None = None) -> None:
    """Entry point of train.py and `lavis-lite-train`; ends the process."""
    argv = sys.argv[1:] if argv is None else list(argv)
    given = [sys.argv[0], *argv]
    if own_data.is_wanted(argv):
        sys.exit(exit_code(lambda: train(own_data.arguments(argv), command=given), command=given))
    sys.exit(train(argv, command=given))


def train(argv: Sequence[str], *, command: Sequence[str]) -> int:
    """Train as the arguments of train.py say, and return the exit code; `command` is shown if the run is stopped."""
    return main(parser(description=TRAIN_HELP), argv, command=command)


def evaluate_main(argv: Sequence[str] | None = None) -> None:
    """Entry point of evaluate.py and `lavis-lite-evaluate`; ends the process."""
    sys.exit(evaluate(argv))


def evaluate(argv: Sequence[str] | None = None, *, command: Sequence[str] = ()) -> int:
    """Evaluate as the command line says, and return the exit code.

    `command` is the command line of a caller of its own, to be shown if the run is stopped.
    """
    p = parser(description=EVALUATE_HELP)
    p.add_argument("--checkpoint", metavar="PATH", help="weights to evaluate, instead of those the YAML names")
    p.add_argument("--limit", type=int, metavar="N", help="evaluate the first N samples of each split (run.limit)")
    p.add_argument(
        "--check", action="store_true", help="exit with 1 if a published value differs, 3 if one is not comparable"
    )
    return main(p, argv, evaluates=True, command=command)


def main(
    p: argparse.ArgumentParser, argv: Sequence[str] | None, *, evaluates: bool = False, command: Sequence[str] = ()
) -> int:
    """Parse, run, and return the exit code; see failures.py."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        p.print_help(sys.stderr)
        return 2
    args = p.parse_args(argv)
    if args.gpu is not None and (evaluates or not args.dry_run):
        p.error("--gpu is for the --dry-run of a training; the GPU that a run uses is run.device")

    def execute() -> int:
        with StopSignals() as stop:
            cfg = Config.from_args(args)
            if args.dry_run:
                from lavis_lite.cli.dry_run import dry_run
                from lavis_lite.common.hardware import named_gpu

                dry_run(cfg, gpu=None if args.gpu is None else named_gpu(args.gpu))
                return 0
            rows = run(cfg, stop)
            return check_code(rows) if evaluates and args.check and is_first_process() else 0

    from lavis_lite.common import logger as run_logger

    run_logger.setup()
    if not is_first_process():
        logging.getLogger().setLevel(logging.WARNING)
    return exit_code(execute, command=command or [sys.argv[0], *argv])


def check_code(rows: "Sequence[Row]") -> int:
    """Return the exit code of `--check`, and say in one line why it is not 0."""
    from lavis_lite.cli.verdict import exit_code

    code = exit_code(rows)
    if code:
        reason = "a published value differs" if code == 1 else "not every published value could be compared"
        if all(row.verdict == "by server" for row in rows):
            reason = "only a server prints the published values" if rows else "the recipe expects no value of this run"
        print(f"--check: {reason}", file=sys.stderr)
    return code


def run(cfg: Config, stop: StopSignals) -> "list[Row]":
    """Train, or evaluate if `cfg.run.evaluate`; prints an evaluation's metrics. Must be entered by every rank.

    Returns the verdict about the splits that were evaluated; on other ranks than 0 nothing.

    Raises:
        Stopped: a signal that `stop` caught asked the process to stop.
    """
    from lavis_lite.common import dist

    dist.init(cfg.run.device)
    try:
        try:
            return _run_job(cfg, stop)
        finally:
            dist.shutdown()
    except Stopped as stopped:
        if stopped.job_id is None and not cfg.run.evaluate and _has_checkpoint(cfg):  # while leaving the group
            stopped.job_id = cfg.run.job_id
        raise


def _has_checkpoint(cfg: Config) -> bool:
    return cfg.run.job_id is not None and Path(cfg.run.output_dir, cfg.run.job_id, LAST).is_file()


def _run_job(cfg: Config, stop: StopSignals) -> "list[Row]":
    """`run` between joining and leaving the process group."""
    from lavis_lite.cli import preflight
    from lavis_lite.cli.verdict import check_expected
    from lavis_lite.common import dist
    from lavis_lite.common import logger as run_logger
    from lavis_lite.common.rng import seed_everything
    from lavis_lite.runners.division import divide
    from lavis_lite.tasks.base import setup_task

    task = setup_task(cfg)
    preflight.check_task(cfg, task)
    references = check_expected(cfg)
    preflight.check_device(cfg)
    cfg.run, job_dir = start_job(cfg.run, cfg.to_dict())
    with held(job_dir):
        run_logger.setup(job_dir)
        runner: Runner | None = None
        try:
            cfg.run = divide(cfg.run)
            datasets = task.build_datasets(cfg)
            found = preflight.check_data(cfg, task, datasets)
            preflight.fit_features(cfg, found)
            seed_everything(cfg.run.seed)  # the same on every rank: DDP does not even out the models' buffers
            model = task.build_model(cfg)
            preflight.check_model(cfg, task, model, datasets, found)
            runner = registry.get_runner_class(cfg.run.runner)(cfg, task, model, datasets, job_dir)
            runner.stop, runner.keeps_batches = stop, cfg.run.evaluate
            return _execute(cfg, runner, references, found.plan)
        except (UserError, Stopped, RuntimeError) as error:
            is_users = isinstance(error, UserError | RankZeroFailed)
            stopped = error if isinstance(error, Stopped) else None
            if isinstance(error, RuntimeError) and not is_users and stop.signum is not None and dist.lost_rank(error):
                stopped = Stopped(stop.signum)  # another rank got the signal, and ended first
            if (is_users or stopped) and dist.is_main() and not (runner and runner.has_begun):
                run_logger.setup()  # closes console.txt
                discard_if_unused(job_dir)
            if stopped is None:
                raise
            if cfg.run.evaluate and unfinished_files(job_dir):
                stopped.job_id = cfg.run.job_id
            if not cfg.run.evaluate and _has_checkpoint(cfg):
                stopped.job_id, stopped.step = str(cfg.run.job_id), runner.saved_step if runner else None
            raise stopped from None


def _execute(cfg: Config, runner: "Runner", references: "References", plan: "Plan | None") -> "list[Row]":
    """Evaluate or train, with a few lines about the run before and after it; return the verdict on rank 0.

    `references` are the configurations of the values that the recipe expects, `plan` is the training's.
    """
    from lavis_lite.cli.evaluation import conclude
    from lavis_lite.cli.provenance import about, describe
    from lavis_lite.common import dist

    runner.about = about(cfg, runner, None if cfg.run.evaluate else plan)
    if dist.is_main():
        logger.info("\n".join(describe(cfg, runner, runner.about)))
    started = time.perf_counter()
    try:
        result: dict[str, Any] = {"test": runner.evaluate()} if cfg.run.evaluate else runner.train()
    finally:
        runner.progress.close()
    weights = runner.whole_state() if result["test"] else {}
    if not dist.is_main():
        return []
    seconds = time.perf_counter() - started
    step = 0 if cfg.run.evaluate else runner.training.state.step
    runner.progress.report_result({"seconds": round(seconds, 2), "best": result.get("best")}, step=step)
    if cfg.run.evaluate:
        print(json.dumps(result["test"], indent=2, default=str))
    rows = conclude(cfg, runner, result["test"], references, weights=weights) if result["test"] else []
    for path in unfinished_files(runner.job_dir) if cfg.run.evaluate else ():
        path.unlink()
    logger.info("\n".join(_outcome(cfg, runner, result.get("best"), timedelta(seconds=round(seconds)))))
    return rows


def _outcome(cfg: Config, runner: "Runner", best: dict[str, Any] | None, duration: timedelta) -> list[str]:
    """Return the lines that a run ends with: how long it took, its best weights, and what can be done with them."""
    from lavis_lite.cli.provenance import next_commands

    if cfg.run.evaluate:
        return [f"done in {duration}; results in {runner.job_dir}", *next_commands(cfg, runner)]
    chosen = "the last weights: nothing chose better ones"
    if best is not None and best["metric"] is not None:
        chosen = f"agg_metrics {best['metric']:.4g} after epoch {best['epoch'] + 1}"
    return [f"done in {duration}; {runner.job_dir / BEST}: {chosen}", *next_commands(cfg, runner)]
