"""Resuming an evaluation: each rank writes the results of its batches as they are computed, and continues after them.

`result/<split>.partial`, of other ranks `<split>.partial-<rank>`; they are deleted once the evaluation is complete. The
texts and numbers of a resumed evaluation are those of an uninterrupted one: batches are the same, and so are the random
states before each batch.
"""

import base64
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lavis_lite import __version__
from lavis_lite.common import checkpoint, dist
from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError
from lavis_lite.common.partial import PartialFile, differences
from lavis_lite.common.rng import restore_rng_state, rng_state
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.digests import annotation_digest
from lavis_lite.datasets.protocols import EvalDataset
from lavis_lite.runners.jobs import checkpoint_to_resume, unfinished_files
from lavis_lite.tasks.results import BatchResults, Result

logger = logging.getLogger(__name__)

ADVICE = "evaluate without --resume, or with another --job-id, to start anew"
WEIGHTS = ("checkpoint", "pretrained", "finetuned", "load_pretrained", "load_finetuned")
"""Keys of the model that name its weights, which have a digest."""
OTHER = frozenset(
    {"job_id", "resume", "resume_ckpt_path", "output_dir", "valid_splits", "test_splits", "num_workers"}
    | {"batch_size_train", "accum_grad_iters", "global_batch", "prefetch_factor"}
    | {"log_freq", "tensorboard", "tracker", "profile", "peak_tflops", "step_timeout"}
)
"""Settings of the run that do not change the results of a split."""


class SavedBatches(BatchResults):
    """The results of this rank's batches of a split, in a file.

    Must be constructed by every rank. `num_finished` batches were evaluated by an earlier run.

    Raises:
        InputError: with `resume`, if the earlier run had other settings, weights or data.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool, device: torch.device) -> None:
        self.path, self.device, self.is_read, self.has_failed = path, device, False, False
        self.file = PartialFile(path, settings, advice=ADVICE)
        rows, problem = [], None
        try:
            rows = self.file.read() if resume else []
        except InputError as error:
            problem = str(error)
        if problems := [text for text in dist.gather_objects([problem]) if text is not None]:
            raise InputError(problems[0])
        self.num_finished = len(rows)
        self._results: list[Result] = [result for row in rows for result in row["results"]]
        self._state: str | None = None
        states = [row["rng"] for row in rows if "rng" in row]
        self._saved_state: dict[str, Any] | None = states[-1] if states else None
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file.open(anew=not resume)

    def finished(self) -> list[Result]:
        """Return the results of the finished batches, and restore the random states after them."""
        self.is_read = True
        if self._saved_state is not None:
            restore_rng_state(unpacked(self._saved_state), self.device)
        self._state = self._random_state()
        return list(self._results)

    def add(self, results: list[Result]) -> list[Result]:
        """Write a batch's results, with the random states if it has changed them, and return them as read again."""
        if self.has_failed:
            return results
        before, self._state = self._state, self._random_state()
        state = {} if before == self._state else {"rng": json.loads(self._state)}
        try:
            self.file.add({"results": results, **state})
        except TypeError as error:  # values of a task or dataset of the user's own
            logger.warning("%s: %s: this evaluation cannot be resumed", self.path, error)
            self.has_failed = True
            self.file.path.unlink()
            return results
        read: list[Result] = json.loads(json.dumps(results))
        return read

    def close(self) -> None:
        """Close the file. Raises InputError if the finished batches were not taken into account."""
        self.file.close()
        if self.num_finished and not self.is_read:
            problem = f"{self.num_finished} finished batches of {self.path} were left out, as the task's own `evaluate`"
            raise InputError(f"{problem} does not call BaseTask's: set `resumes = False` in the task, and start anew")

    def _random_state(self) -> str:
        return json.dumps(packed(rng_state(self.device)))


def packed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return random states with their tensors as texts."""
    return {
        key: base64.b64encode(value.numpy().tobytes()).decode() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }


def unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `packed` was given."""
    tensors = {
        key: torch.frombuffer(bytearray(base64.b64decode(state[key])), dtype=torch.uint8)
        for key in ("torch", "cuda")
        if state[key] is not None
    }
    return {**state, **tensors}


def partial_path(job_dir: Path, split: str) -> Path:
    """Return the file of this rank's batches of a split."""
    return job_dir / "result" / f"{split}.partial{f'-{dist.rank()}' if dist.rank() else ''}"


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration that results depend on, by name with dots."""
    model = {key: value for key, value in config["model"].items() if key not in WEIGHTS}
    run = {key: value for key, value in config["run"].items() if key not in OTHER}
    others = {key: config.get(key) for key in ("preprocess", "datasets", "imports")}
    tree: dict[str, Any] = json.loads(json.dumps({"model": model, "run": run, **others}, default=str))
    return flat(tree)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by name with dots."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        is_tree = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if is_tree else {f"{prefix}{key}": value}
    return found


def data_digest(dataset: EvalDataset) -> str:
    """Return a digest of a split's annotations."""
    own = annotation_digest(dataset) if isinstance(dataset, BaseDataset) else None
    if own is None:
        own = hashlib.blake2b(json.dumps(list(dataset.annotation), default=str).encode(), digest_size=8).hexdigest()
    return f"{own}, {len(dataset)} samples"


def made_with(
    config: Mapping[str, Any], dataset: EvalDataset, *, weights: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return all that the results of a split depend on; `weights` is a digest of the model's."""
    machine = {"device": device.type, "precision": str(dtype).removeprefix("torch."), "processes": dist.world_size()}
    versions = {"lavis_lite": __version__, "torch": str(torch.__version__)}
    return {"weights": weights, "data": data_digest(dataset), **machine, **versions, **settings_of(config)}


def resume_line(cfg: Config) -> str:
    """Return which interrupted evaluation would continue, or whose weights would be evaluated, for a dry run.

    Must be entered by every rank. Raises as `checkpoint_to_resume`; DamagedFileError for such a checkpoint.
    """
    run, output = cfg.run, Path(cfg.run.output_dir)

    def found() -> str:
        path = checkpoint_to_resume(run)
        weights = "" if path is None else f"; weights of {path}, step {checkpoint.load(path).get('step', 'unknown')}"
        if run.resume != "auto":
            return f"no evaluation{weights}"
        folder = newest_unfinished(output, cfg.to_dict(), job_id=run.job_id)
        if folder is None:
            return f"nothing to resume below {output}: the evaluation starts from the beginning{weights}"
        done = {path.name: max(path.read_bytes().count(b"\n") - 1, 0) for path in unfinished_files(folder)}
        counts = ", ".join(f"{count:,} batches of {name}" for name, count in done.items())
        return f"{folder}: {counts} are done{weights}"

    return f"resume      {dist.on_main(found)}"


def newest_unfinished(output: Path, config: Mapping[str, Any], *, job_id: str | None) -> Path | None:
    """Return the folder of the newest evaluation below `output` that was interrupted (of `job_id`, if given).

    Without a job id it is one of the same settings; of others a line says what differs.
    """
    import yaml

    folders = [output / job_id] if job_id is not None else output.iterdir() if output.is_dir() else []
    found = {
        folder: max(path.stat().st_mtime for path in paths) for folder in folders if (paths := unfinished_files(folder))
    }
    for folder in sorted(found, key=found.__getitem__, reverse=True):
        path = folder / "config_evaluate.yaml"
        saved = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        changed = differences(settings_of(saved), settings_of(config)) if saved else [f"{path} is missing"]
        if job_id is not None or not changed:
            return folder
        logger.info("%s is unfinished, but not of these settings (%s)", folder, ", ".join(changed))
    return None
