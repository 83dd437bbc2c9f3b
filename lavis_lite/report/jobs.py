"""A job folder as a report reads it: configuration, log, evaluation and predictions."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.registry import registry
from lavis_lite.tasks.predictions import FOLDER

CONFIGS = ("config.yaml", "config_evaluate.yaml")
LOG, EVALUATION = "log.txt", "evaluation.json"
NAME = re.compile(r"(?P<split>.+?)(?:_step(?P<step>\d+))?")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metrics of a split, in the task's units, after a step; step 0 of an evaluation job."""

    split: str
    step: int
    epoch: int
    metrics: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of training or evaluation."""

    folder: Path
    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def task(self) -> str:
        return str(self.config["run"]["task"])

    @property
    def model(self) -> str:
        section = self.config["model"]
        return "/".join(str(section[key]) for key in ("arch", "model_type") if section.get(key))

    @property
    def is_evaluation(self) -> bool:
        return bool(self.config["run"].get("evaluate"))

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of training steps; of a step that a resumed run repeated, the later row."""
        others = {"split", "datasets", "result"}
        found = {row["step"]: row for row in self.rows if "step" in row and not others & row.keys()}
        return [found[step] for step in sorted(found)]

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations by split and step, in their order; the later one of two of the same step."""
        found: dict[tuple[str, int], Evaluation] = {}
        for row in self.rows:
            if "split" in row:
                key = (str(row["split"]), int(row.get("step", 0)))
                found.pop(key, None)
                found[key] = Evaluation(
                    split=key[0], step=key[1], epoch=int(row.get("epoch", 0)), metrics=row["metrics"]
                )
        return list(found.values())

    def named(self, key: str) -> dict[str, Any]:
        """Return what the last row with this key says, such as `run`; empty without one."""
        return next((row[key] for row in reversed(self.rows) if key in row), {})

    @property
    def has_ended(self) -> bool:
        """Return whether the job's last run came to its end; true for logs that do not mark where a run begins."""
        marks = [key for row in self.rows for key in ("run", "result") if key in row]
        return not marks or marks[-1] == "result"

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The content of `evaluation.json`: percent, intervals and verdict; empty without it."""
        path = self.folder / EVALUATION
        return read_json(path) if path.is_file() else {}

    @property
    def provenance(self) -> dict[str, Any]:
        """Command, date, versions and device of the run."""
        return self.named("run") | self.evaluation.get("provenance", {})

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an (inner) epoch; None if not a whole one was trained."""
        ends = [row["step"] for row in self.steps if row.get("epoch") == 0]
        return max(ends) if ends and self.steps[-1].get("epoch", 0) > 0 else None

    @cached_property
    def fractions(self) -> frozenset[str]:
        """Metrics of the task that are fractions of 1."""
        known = self.task in registry.list_tasks()
        return registry.get_task_class(self.task).fractions if known else frozenset()

    def percent(self, name: str, value: float) -> float:
        """Return a metric in percent, as papers print it; a loss as it is."""
        return 100 * value if name.split(".")[-1] in self.fractions else value

    def predictions(self) -> dict[str, Path]:
        """Return the newest file of predictions of each split that has one."""
        found: dict[str, tuple[float, Path]] = {}
        for path in (self.folder / FOLDER).glob("*.jsonl"):
            match = NAME.fullmatch(path.stem)
            assert match is not None, path
            step = float(match["step"] or "inf")
            if step >= found.get(match["split"], (-1.0, path))[0]:
                found[match["split"]] = step, path
        return {split: path for split, (_, path) in sorted(found.items())}

    def final(self) -> list[Evaluation]:
        """Return the last evaluation of each split."""
        return list({one.split: one for one in self.evaluations}.values())

    def final_of(self, split: str) -> Evaluation:
        """Return the last evaluation of a split."""
        return next(one for one in reversed(self.evaluations) if one.split == split)

    def best(self, split: str) -> Evaluation | None:
        """Return a split's evaluation with the highest `agg_metrics`; None if none was scored."""
        scored = [one for one in self.evaluations if one.split == split and one.metrics.get("agg_metrics") is not None]
        return max(scored, key=lambda one: one.metrics["agg_metrics"], default=None)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises InputError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error}); run the evaluation again") from None


def is_job(folder: Path) -> bool:
    """Return whether a folder is that of a job that has begun."""
    return (folder / LOG).is_file() and any((folder / name).is_file() for name in CONFIGS)


def read_job(folder: Path, name: str) -> Job:
    """Return the job of a folder. Raises InputError for a file that is damaged."""
    path = next(folder / one for one in CONFIGS if (folder / one).is_file())
    rows = []
    for number, line in enumerate((folder / LOG).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if line.strip() and not is_cut(line):
                raise InputError(
                    f"{folder / LOG}:{number}: not a JSON object: {line[:80]!r}; remove the line"
                ) from None
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not {"run", "model"} <= config.keys():
        raise InputError(f"{path}: not the configuration of a run, which has the sections run and model")
    return Job(folder=folder, name=name, config=config, rows=[row for row in rows if isinstance(row, dict)])


def is_cut(line: str) -> bool:
    """Return whether a line is the beginning of a row, which a killed run leaves."""
    return line.startswith("{") and not line.rstrip().endswith("}")


def find_jobs(folder: Path) -> list[Job]:
    """Return the job of a folder, or the jobs in its sub-folders in the order in which they began.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: it is a file, or has neither a job nor jobs.
    """
    if folder.is_file():
        raise InputError(f"{folder}: a file; name the folder of its job, which has {LOG}")
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such folder; name a job's folder, or one of several jobs")
    if is_job(folder):
        return [read_job(folder, folder.resolve().name)]
    found = sorted(_job_folders(folder), key=lambda path: (started(path), path))
    if not found:
        raise InputError(
            f"{folder}: neither a job (a folder with {LOG} and {CONFIGS[0]}) nor a folder of jobs; jobs are below "
            "run.output_dir"
        )
    return [read_job(path, str(path.relative_to(folder))) for path in found]


def _job_folders(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if is_job(entry):
            yield entry
        elif entry.is_dir() and not entry.is_symlink():
            yield from _job_folders(entry)


def started(folder: Path) -> float:
    """Return when a job's configuration was written."""
    return min((folder / name).stat().st_mtime for name in CONFIGS if (folder / name).is_file())
