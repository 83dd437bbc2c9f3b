"""Kills and stops real trainings at random moments until it is done, and compares it with a run that nobody disturbed.

`python tests/chaos.py [--kills 40] [--terms 20] [--processes 1 2] [--seed 0] [--stream]` prints what it tried and each
difference; `test_chaos.py` runs a few rounds of it. With `--stream` the run trains on a stream of shards, too.
"""

import argparse
import collections
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import cli_helpers
import shard_helpers
import torch
from ports import free_port

from lavis_lite.cli import main as cli
from lavis_lite.common import checkpoint
from lavis_lite.common.registry import registry
from lavis_lite.runners.speed import UNITS

STEPS = 20
RUN = {
    "max_iters": STEPS,
    "max_epoch": 100,
    "num_workers": 2,
    "checkpoint_every": 3,
    "accum_grad_iters": 2,
    "keep_checkpoints": 2,
    "batch_size_train": 2,
}


class Ranks:
    """The command as one process or several ranks, forked from this process, which has imported everything already.

    Each is a session of its own, as torchrun makes it, so that its loader workers get its SIGTERM too.
    """

    def __init__(self, argv: list[str], *, world: int, data: Path, output: Path) -> None:
        port = free_port()
        self.output, self.codes = output, {}
        self.pids = [self._fork(argv, rank, world=world, port=port, data=data) for rank in range(world)]

    def _fork(self, argv: list[str], rank: int, *, world: int, port: int, data: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        os.setsid()
        file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update({"LAVIS_LITE_DATA": str(data), "LAVIS_LITE_CACHE": str(data), "LAVIS_LITE_OFFLINE": "1"})
        if world > 1:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        code = 1
        try:
            cli.train_main(argv)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def send(self, signum: int, pids: list[int]) -> None:
        """Send a signal to the groups of some processes, SIGKILL to the processes alone."""
        for pid in pids:
            (os.kill if signum == signal.SIGKILL else os.killpg)(pid, signum)  # nobody has waited for it yet

    def wait(self, seconds: float) -> list[int] | None:
        """The exit codes in order, negative after a signal; None if a process has not ended in time."""
        deadline = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            for pid in set(self.pids) - self.codes.keys():
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)
        return [self.codes[pid] for pid in self.pids]


class Round:
    """One run of STEPS steps in `folder`, started again with `--resume auto` after each signal until it is done."""

    def __init__(self, folder: Path, *, world: int, data: Path, stream: bool = False) -> None:
        folder.mkdir(parents=True)
        (dataset,) = cli_helpers.RECIPES["caption"]["datasets"]
        crops = {"vis_processor": {"train": {"name": "blip_image_train", "image_size": 48}}}
        datasets, run = {dataset: crops}, RUN
        if stream:
            datasets["web"] = shard_helpers.stream_section(data, world=world)
            run = RUN | {"train_dataset_ratios": {dataset: 1, "web": 2}}
        self.path = cli_helpers.project(folder, "caption", {"datasets": datasets, "run": run})
        self.job, self.world, self.data = folder / "output" / "job", world, data
        self.output = folder / "output.txt"

    def start(self) -> Ranks:
        """The command, which goes on where it was."""
        self.output.write_text("")
        argv = ["--cfg-path", str(self.path), "--job-id", "job", "--resume", "auto"]
        return Ranks(argv, world=self.world, data=self.data, output=self.output)

    def finish(self) -> float:
        """Run to the end; returns the seconds it took."""
        began = time.monotonic()
        codes = self.start().wait(300)
        if codes != [0] * self.world:
            raise AssertionError(f"exit codes {codes}:\n{self.output.read_text()}")
        return time.monotonic() - began

    def disturb(self, signum: int, *, after: float, rng: random.Random) -> str | None:
        """Start the command and send the signal `after` seconds; returns how it ended, None if it was done before."""
        ranks = self.start()
        if ranks.wait(after) is None and set(ranks.codes.values()) == {0}:  # one rank has just finished
            ranks.wait(60)
        if list(ranks.codes.values()) == [0] * self.world:
            return None
        if ranks.codes:
            raise AssertionError(f"ended by itself with {ranks.codes}:\n{self.output.read_text()}")
        chosen = rng.choice([ranks.pids, ranks.pids[:1], ranks.pids[-1:]])
        ranks.send(signum, ranks.pids if signum != signal.SIGKILL else chosen)
        codes, told = ranks.wait(15), ""
        if codes is None and signum == signal.SIGKILL:  # as torchrun does when a rank has ended
            ranks.send(signal.SIGTERM, [pid for pid in ranks.pids if pid not in ranks.codes])
            told = "the other ended by SIGTERM, "
        codes = ranks.wait(60)
        if codes is None:
            raise AssertionError(f"a process lives 60 seconds after {signum}:\n{self.output.read_text()}")
        text = self.output.read_text()
        told += "saved" if "stopped at step" in text else "nothing to save" if "nothing was saved" in text else ""
        told += ", with a traceback" if "Traceback" in text else ""
        return f"exit codes {codes} {told}".strip(" ,")

    def outcome(self) -> dict[str, Any]:
        """What must be the same however often a run was interrupted."""
        files = {name: checkpoint.load(self.job / f"checkpoint_{name}.pth") for name in ("last", "best")}
        found: dict[str, Any] = {f"{name}.{key}": value for name, file in files.items() for key, value in file.items()}
        found = {key: value for key, value in found.items() if not key.endswith(".config")}
        for row in readable_rows(self.job / "log.txt"):  # of a step that was repeated, the later row counts
            if {"run", "speed", "result"} & row.keys():  # dates and times
                continue
            row = {key: value for key, value in row.items() if key not in UNITS}
            found[f"log {row.get('split', 'train')} {row.get('step')}"] = row
        for path in sorted((self.job / "result").iterdir()):
            found[f"result {path.name}"] = path.read_text(encoding="utf-8")
        found["leftovers"] = [path.name for path in self.job.rglob(".*.tmp")]
        return found


def readable_rows(log: Path) -> list[dict[str, Any]]:
    """The log's rows without those that a kill cut short."""
    rows = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def compare(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    wrong = sorted(expected.keys() ^ found.keys())
    for key in expected.keys() & found.keys():
        try:
            cli_helpers.assert_same_state(expected[key], found[key])
        except AssertionError as error:
            wrong.append(f"{key}{error}")
    return wrong


def chaos(
    folder: Path, *, world: int, signals: list[int], seed: int, data: Path, stream: bool = False
) -> tuple[collections.Counter[str], list[str]]:
    """Send all signals, over as many rounds as it takes; returns how the processes ended, and every difference."""
    rng, signals = random.Random(seed), list(signals)
    rng.shuffle(signals)
    whole = Round(folder / "whole", world=world, data=data, stream=stream)
    whole.finish()  # builds the data
    duration = Round(folder / "timed", world=world, data=data, stream=stream).finish()
    expected, wrong, endings, number = whole.outcome(), [], collections.Counter(), 0
    while signals:
        number += 1
        disturbed = Round(folder / f"round{number}", world=world, data=data, stream=stream)
        while signals:
            name = signal.Signals(signals[-1]).name
            ending = disturbed.disturb(signals[-1], after=rng.uniform(0.0, 1.0) * duration, rng=rng)
            if ending is None:
                break
            signals.pop()
            endings[f"{name}: {ending}"] += 1
        disturbed.finish()
        wrong += [f"round {number}: {text}" for text in compare(expected, disturbed.outcome())]
    endings["rounds"] = number
    return endings, wrong


def import_everything() -> None:
    """Import what a run needs, without starting a thread, so that forked processes start at once."""
    torch.set_num_threads(1)
    importlib.import_module("torch.distributed.nn.functional")
    for kind in ("model", "task", "builder", "runner", "processor"):
        getattr(registry, f"list_{kind}s")()


def main() -> None:
    """The command."""
    import_everything()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=40, help="SIGKILLs for each number of processes")
    p.add_argument("--terms", type=int, default=20, help="SIGTERMs for each number of processes")
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stream", action="store_true", help="a stream of shards among the training sets")
    arguments = p.parse_args()
    signals = [signal.SIGKILL] * arguments.kills + [signal.SIGTERM] * arguments.terms
    failed = False
    for world in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            options = {"signals": signals, "seed": arguments.seed, "stream": arguments.stream}
            endings, wrong = chaos(root, world=world, data=root / "data", **options)
        print(f"{world} processes: {dict(endings)}; {len(wrong)} differences")
        print("".join(f"  {text}\n" for text in wrong), end="", flush=True)
        failed = failed or bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
