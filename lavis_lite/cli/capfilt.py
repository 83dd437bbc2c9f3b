"""`lavis-lite capfilt`: run a chain of trainings and evaluations, from the captioner to the pretraining on its texts.

Each step is a process of its own, of `lavis-lite train` or `lavis-lite evaluate`. Under torchrun every process starts
its own part of each step; the steps' processes then meet at the ports after torchrun's own.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lite.cli.capfilt_chain import ROWS, Chain, Job, check_rows, jobs, read_chain
from lavis_lite.cli.capfilt_table import table
from lavis_lite.cli.failures import exit_code, is_first_process
from lavis_lite.cli.published import EVALUATION
from lavis_lite.common.config.recipes import find_recipe
from lavis_lite.common.errors import InputError
from lavis_lite.runners.stopping import Stopped, StopSignals

HELP = """Run CapFilt as a chain of steps: finetune a captioner and a filter, write the captions of a web set, keep the
texts that fit, and pretrain on them. A step that was interrupted is resumed, one that is done is left out.

examples:
  lavis-lite capfilt --cfg-path projects/blip/capfilt/_chain.yaml
  lavis-lite capfilt --cfg-path projects/blip/capfilt/_chain.yaml --rows none captioner filter both
  torchrun --nproc_per_node=8 -m lavis_lite.cli capfilt --cfg-path projects/blip/capfilt/_chain.yaml"""
DONE = "done.json"
"""The file in a job's folder that says that its step is done, and with which arguments."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `lavis-lite capfilt`; ends the process."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="lavis-lite capfilt", description=HELP, formatter_class=raw)
    p.add_argument("--cfg-path", required=True, type=find_recipe, metavar="YAML", help="the chain: a file, or its name")
    p.add_argument("--rows", nargs="+", default=["both"], metavar="ROW", help=f"{', '.join(ROWS)} (both)")
    p.add_argument("--seeds", nargs="+", type=int, default=[42], metavar="N", help="seeds of each row's steps (42)")
    p.add_argument("--only", nargs="+", metavar="STEP", help="only these steps")
    text = "settings that override every recipe's, e.g. run.num_workers=0"
    p.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=text)
    p.add_argument("--dry-run", action="store_true", help="print the commands of all steps, and run none")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = p.parse_args(argv)
    sys.exit(exit_code(lambda: run(args), command=[sys.argv[0], *argv]))


def run(args: argparse.Namespace) -> int:
    """Run the steps that are not done, print the table, and return the exit code: that of a step that failed."""
    check_rows(args.rows)
    chain = read_chain(args.cfg_path)
    wrong = [name for name in args.only or () if name not in chain.steps]
    if wrong:
        raise InputError(f"--only: {args.cfg_path} has no step {wrong[0]!r}; there are {', '.join(chain.steps)}")
    todo = jobs(chain, args.cfg_path, rows=args.rows, seeds=args.seeds, options=args.options)
    todo = [job for job in todo if not args.only or job.step in args.only]
    if args.dry_run:
        print("\n".join(shlex.join(["lavis-lite", *job.arguments()]) for job in todo))
        return 0
    for number, job in enumerate(todo):
        if code := run_job(job, earlier=todo[:number], number=number):
            return code
    if is_first_process() and chain.report:
        report(chain, todo)
    return 0


def run_job(job: Job, *, earlier: Sequence[Job], number: int) -> int:
    """Run one step unless it is done, and return its exit code.

    Raises InputError if it was done with other arguments, or before a step that it may depend on was done again.
    """
    done, said = job.folder / DONE, is_first_process()
    if done.is_file():
        check_done(job, earlier)
        if said:
            print(f"== {job.folder.name}: done already", file=sys.stderr)
        return 0
    if said:
        print(f"== {job.folder.name}: lavis-lite {shlex.join(job.arguments())}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "lavis_lite.cli", *job.arguments()]
    code = wait(subprocess.Popen(command, env=environment(number)))
    if code == 0 and said:
        from lavis_lite.common.checkpoint import write_text

        write_text(done, json.dumps({"arguments": job.arguments()}))
    return code


def check_done(job: Job, earlier: Sequence[Job]) -> None:
    """Raise InputError if a step that is done is not what would be run now."""
    done = job.folder / DONE
    arguments = json.loads(done.read_text(encoding="utf-8"))["arguments"]
    if arguments != job.arguments():
        changed = sorted(set(arguments) ^ set(job.arguments()))
        raise InputError(
            f"{job.folder}: was done with other arguments ({', '.join(changed)}): delete the folder to run it again, "
            "or choose another output_dir"
        )
    for other in earlier:
        is_before = other.row in (None, job.row) and other.seed in (None, job.seed)
        before = other.folder / DONE
        if is_before and not (before.is_file() and before.stat().st_mtime <= done.stat().st_mtime):
            raise InputError(f"{job.folder}: is older than {other.folder}, which it may depend on: delete the former")


def wait(process: "subprocess.Popen[bytes]") -> int:
    """Return the exit code of a step's process, to which stop signals are passed on."""
    try:
        with StopSignals():
            code = process.wait()
    except Stopped as stopped:
        process.send_signal(stopped.signum)
        process.wait()
        raise
    return code if code >= 0 else 128 - code


def environment(number: int) -> Mapping[str, str]:
    """Return the environment of a step's process: under torchrun with a port of its own to meet the others at."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return os.environ
    port = str(int(os.environ["MASTER_PORT"]) + 1 + number)
    return {**os.environ, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}


def report(chain: Chain, todo: Sequence[Job]) -> None:
    """Print the table of the rows, and write its figures to `capfilt.json`."""
    from lavis_lite.common.checkpoint import write_text

    found: dict[str, dict[str, list[float]]] = {}
    for column, place in chain.report.items():
        step, split, metric = place.split(".", 2)
        for job in (job for job in todo if job.step == step and job.row is not None):
            percent: Any = json.loads((job.folder / EVALUATION).read_text(encoding="utf-8"))["percent"]
            if metric not in percent.get(split, {}):
                there = {name: [*values] for name, values in percent.items()}
                raise InputError(f"report.{column}: {job.folder} measured no {split}.{metric}; there are {there}")
            found.setdefault(str(job.row), {}).setdefault(column, []).append(percent[split][metric])
    if found:
        path = write_text(Path(chain.output_dir) / "capfilt.json", json.dumps(found, indent=1))
        print("\n".join([*table(found), f"written to {path}"]))
