"""Train a tiny model for many steps, with validations and checkpoints, and check that memory, open files and threads
of the process and its loader workers do not grow. Linux only.

`python benchmarks/long_run.py --steps 10000` prints a row per `--every` steps, and ends with 1 if anything grew.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 0.05
MIB = 2**20
TOLERANCE = {"mib": 16.0, "files": 4, "threads": 2, "processes": 0}
"""What a maximum may differ by between the second quarter of a run and the rest: allocators round, log lines open
files.
"""
TINY = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 16}
TEXT = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64}
SHAPES = {"num_train": 64, "num_val": 8, "num_test": 8, "colors": 4, "shapes": 3, "max_objects": 2}


class Sample(NamedTuple):
    """What a process and its children hold at a step."""

    step: int
    mib: float
    files: int
    threads: int
    processes: int


def recipe(steps: int, every: int, output: Path) -> dict[str, Any]:
    """Return the YAML of the training."""
    model = {"arch": "blip_caption", "model_type": "tiny", "vit": TINY, "med": TEXT}
    run = {"task": "captioning", "metrics": ["bleu"], "runner": "runner_iter", "max_iters": steps, "log_freq": every}
    run |= {"iters_per_inner_epoch": validated_every(steps), "valid_splits": ["val"]}
    run |= {"checkpoint_every": max(every, 10), "device": "cpu"}
    run |= {"batch_size_train": 4, "batch_size_eval": 4, "num_workers": 2, "max_len": 8, "output_dir": str(output)}
    return {"model": model, "datasets": {"shapes_caption": SHAPES}, "run": run}


def validated_every(steps: int) -> int:
    """Return the steps between two validations."""
    return max(steps // 8, 1)


def sample(pid: int, step: int) -> Sample:
    """Return what the process and its children hold now."""
    pids = [pid, *children(pid)]
    status = [Path(f"/proc/{one}/status").read_text() for one in pids]
    fields = [dict(line.split(":", 1) for line in text.splitlines() if ":" in line) for text in status]
    memory = sum(int(own["VmRSS"].split()[0]) for own in fields) * 1024 / MIB
    files = sum(len(os.listdir(f"/proc/{one}/fd")) for one in pids)
    return Sample(step, round(memory, 1), files, sum(int(own["Threads"]) for own in fields), len(pids))


def children(pid: int) -> list[int]:
    """Return the processes that a process started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def steps_of(log: Path) -> list[int]:
    """Return the steps that a run has logged."""
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.is_file() else []
    return [row["step"] for row in rows if "loss" in row]


def watch(process: "subprocess.Popen[str]", log: Path, *, validated: int) -> Iterator[Sample]:
    """Yield a sample for each row of the log, soon after it is written, but where a validation follows."""
    seen = 0
    while process.poll() is None:
        steps = steps_of(log)
        if len(steps) > seen:
            seen = len(steps)
            if steps[-1] % validated:
                yield sample(process.pid, steps[-1])
        time.sleep(POLL_SECONDS)


def growth(samples: Sequence[Sample]) -> list[str]:
    """Return what grew, in words: the maximum of the second half against that of the second quarter.

    The first quarter is left out: allocators, workers and caches are new there.
    """
    begin, middle = len(samples) // 4, len(samples) // 2
    found = []
    for name, tolerance in TOLERANCE.items():
        before, after = (max(getattr(one, name) for one in part) for part in (samples[begin:middle], samples[middle:]))
        if after > before + tolerance:
            found.append(f"{name}: {before:,} before step {samples[middle].step:,}, {after:,} after it")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return 1 if anything grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between two samples")
    arguments = parser.parse_args(argv)
    if arguments.steps < 4 * arguments.every:
        parser.error("--steps must be at least 4 times --every")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "long_run.yaml").write_text(yaml.safe_dump(recipe(arguments.steps, arguments.every, folder)))
        command = [sys.executable, str(ROOT / "train.py"), "--cfg-path", str(folder / "long_run.yaml")]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "LAVIS_LITE_DATA": str(folder / "data")}
        with (folder / "said.txt").open("w+") as said:
            process = subprocess.Popen(
                [*command, "--job-id", "job"], env=environment, text=True, stdout=said, stderr=subprocess.STDOUT
            )
            print(f"{'step':>8}{'MiB':>10}{'files':>8}{'threads':>9}{'processes':>11}")
            samples = []
            for one in watch(process, folder / "job" / "log.txt", validated=validated_every(arguments.steps)):
                samples.append(one)
                print(f"{one.step:>8,}{one.mib:>10,.1f}{one.files:>8}{one.threads:>9}{one.processes:>11}", flush=True)
            if process.wait():
                said.seek(0)
                raise RuntimeError(f"the training failed:\n{said.read()[-3000:]}")
    found = growth(samples)
    print("\n".join(found) or f"nothing grew in {arguments.steps:,} steps")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
