"""Job folders: the one that a run writes to, its checkpoints, and the lock that keeps other runs out."""

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import DamagedFileError, InputError, MissingFileError
from lavis_lite.common.locks import LOCK_FILE, FolderLock

logger = logging.getLogger(__name__)

LAST, BEST = "checkpoint_last.pth", "checkpoint_best.pth"
STARTED = {"console.txt", "config.yaml", "config_evaluate.yaml", "tensorboard", LOCK_FILE}
"""Files that a run makes in its folder before its first step."""


def start_job(run: RunConfig, config: Mapping[str, Any] | None = None) -> tuple[RunConfig, Path]:
    """Return the run with its job and checkpoint chosen (by rank 0, for all ranks), and the job's folder.

    `config` is the whole configuration, by which an evaluation finds an interrupted one of the same settings.
    """
    from lavis_lite.common import dist

    changes = dist.on_main(lambda: _choose_job(run, config or {}))
    run = dataclasses.replace(run, **changes)
    return run, Path(run.output_dir) / str(run.job_id)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs out of a job's folder, and delete files that a killed run left incomplete there.

    Must be entered by every rank; rank 0 holds the lock.

    Raises:
        FolderInUseError: another run writes to the folder.
    """
    from lavis_lite.common import checkpoint, dist

    lock = FolderLock(folder)

    def take() -> None:
        lock.take()
        left = [path for part in (folder, folder / "result") for path in checkpoint.sweep_temporaries(part)]
        if left:
            logger.info("deleted %d files that a killed run left incomplete in %s", len(left), folder)

    dist.on_main(take)
    try:
        yield
    finally:
        lock.release()


def new_job_id(output: Path) -> str:
    """Return a name made of the time, and make its folder, so that runs started in the same second do not share it."""
    stamp, number = datetime.now().strftime("%Y%m%d_%H%M%S"), 1
    while True:
        name = stamp if number == 1 else f"{stamp}_{number}"
        try:
            (output / name).mkdir(parents=True)
            return name
        except FileExistsError:
            number += 1


def newest_checkpoint(output: Path, *, job_id: str | None = None) -> Path | None:
    """Return the checkpoint to resume of the newest job below `output` that has a whole one (of `job_id`, if given).

    None if no job has any checkpoint.

    Raises:
        InputError: there are checkpoints, and none of them is whole.
    """
    folders = [output / job_id] if job_id is not None else output.iterdir() if output.is_dir() else []
    jobs = {folder: paths for folder in folders if (paths := _checkpoints(folder))}
    ages = {folder: max(path.stat().st_mtime for path in paths) for folder, paths in jobs.items()}
    for folder in sorted(jobs, key=ages.__getitem__, reverse=True):
        if (found := whole_checkpoint(folder)) is not None:
            return found
    if jobs:
        raise InputError(
            f"--resume auto: none of the checkpoints can be resumed: {[str(path) for path in chain(*jobs.values())]}. "
            f"Restore an intact {LAST}, start anew from weights with model.pretrained, or begin with another --job-id"
        )
    return None


def checkpoint_to_resume(run: RunConfig) -> Path | None:
    """Return the checkpoint that a training would resume: what `run.resume=auto` finds, else that of
    `run.resume_ckpt_path`, which may be a job's folder. None if it starts from the beginning.

    Raises:
        MissingFileError: `run.resume_ckpt_path` names no file, or a folder without a checkpoint.
        InputError: `run.resume=auto`, and none of the checkpoints is whole.
    """
    is_auto = run.resume == "auto" and not run.evaluate
    if is_auto and (found := newest_checkpoint(Path(run.output_dir), job_id=run.job_id)) is not None:
        return found
    if run.resume_ckpt_path is None:
        return None
    path = Path(run.resume_ckpt_path)
    if path.is_dir() and unfinished_files(path) and not (path / LAST).is_file():
        advice = f"--resume auto --job-id {path.name} continues it"
        raise MissingFileError(f"no checkpoint to resume: {path} is of an interrupted evaluation; {advice}")
    path = path / LAST if path.is_dir() else path
    if not path.is_file():
        advice = f"name a {LAST} or the folder of a training; auto resumes the newest job"
        raise MissingFileError(f"no checkpoint to resume: {path}; {advice}")
    return path


def whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint of a job: checkpoint_last.pth, or else that of the most steps."""
    from lavis_lite.common import checkpoint

    for path in (path for path in _checkpoints(folder) if path.name != BEST):
        try:
            checkpoint.verify(path, as_zip=True)
        except DamagedFileError as error:
            logger.warning("%s", error)
            continue
        if path.name != LAST:
            logger.warning("%s cannot be resumed: resuming %s instead", folder / LAST, path)
        return path
    return None


def discard_if_unused(folder: Path) -> None:
    """Delete the folder of a run that failed before its first step, unless it holds more than such a run leaves."""
    import shutil

    if folder.is_dir() and {entry.name for entry in folder.iterdir()} <= STARTED:
        shutil.rmtree(folder)


def write_last(saved: Mapping[str, Any], folder: Path, *, step: int, keep: int) -> None:
    """Write checkpoint_last.pth; of checkpoint_<step>.pth, the same file under another name, keep the `keep` newest."""
    from lavis_lite.common import checkpoint, checkpoint_parts

    checkpoint.save(saved, folder / LAST)
    if keep > 0:
        checkpoint.link_or_copy(folder / LAST, folder / f"checkpoint_{step}.pth")
        by_age = sorted(_step_checkpoints(folder), key=lambda path: path.stat().st_mtime_ns)
        for old in by_age[:-keep]:  # by age: a resumed run may count lower
            old.unlink()
    _delete_parts(folder, named=saved.get(checkpoint_parts.PARTS, {}).get("folder"), step=step)


def write_sharded(saved: Mapping[str, Any], folder: Path, *, name: str, group: Any, step: int, keep: int) -> None:
    """Write this rank's part of a checkpoint into the folder's new subfolder `name`, and as rank 0 then the checkpoint
    as `write_last` does; must be entered by every rank.
    """
    from lavis_lite.common import checkpoint_parts, dist

    written = checkpoint_parts.write(saved, folder / name, group)
    if dist.is_main():
        write_last(written, folder, step=step, keep=keep)


def new_parts(step: int) -> str:
    """Return the name of a new folder for the parts of a checkpoint: a step may be saved more than once."""
    return f"checkpoint_{step}_{secrets.token_hex(4)}.parts"


def _delete_parts(folder: Path, *, named: str | None, step: int) -> None:
    """Delete the parts of checkpoints that are not there any more: all but those `named` by the one just written, of
    `step`, and those of the other steps.
    """
    import shutil

    kept = set(_step_checkpoints(folder).values()) - {step}
    for path in folder.glob("checkpoint_*_*.parts"):
        number = path.name.split("_")[1]
        if path.name != named and number.isdecimal() and int(number) not in kept:
            shutil.rmtree(path)


def _step_checkpoints(folder: Path) -> dict[Path, int]:
    """Return the step of each checkpoint_<step>.pth."""
    steps = {path: path.stem.removeprefix("checkpoint_") for path in folder.glob("checkpoint_*.pth")}
    return {path: int(step) for path, step in steps.items() if step.isdecimal()}


def _checkpoints(folder: Path) -> list[Path]:
    """Return a job's checkpoints: the last, then those of steps, the newest first, then the best."""
    steps = _step_checkpoints(folder)
    by_step = sorted(steps, key=lambda path: steps[path], reverse=True)
    return [path for path in (folder / LAST, *by_step, folder / BEST) if path.is_file()]


def unfinished_files(folder: Path) -> list[Path]:
    """Return the files of batches of a job whose evaluation is not complete (eval_batches.py)."""
    return sorted((folder / "result").glob("*.partial*"))


def _choose_job(run: RunConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    output = Path(run.output_dir)
    if run.resume == "auto" and run.evaluate:
        return _choose_evaluation(run, config)
    if run.resume == "auto":
        found = newest_checkpoint(output, job_id=run.job_id)
        if found is not None:
            logger.info("resuming %s", found)
            return {"job_id": found.parent.name, "resume_ckpt_path": str(found), "resume": None}
        logger.info("nothing to resume below %s: starting afresh", output)
    if run.job_id is not None and run.evaluate and unfinished_files(output / run.job_id):
        logger.warning(f"{output / run.job_id}: an evaluation was interrupted, which --resume auto would continue")
    if (path := checkpoint_to_resume(dataclasses.replace(run, resume=None))) is not None:
        return {"job_id": run.job_id or new_job_id(output), "resume_ckpt_path": str(path)}
    if run.job_id is not None and not run.evaluate and _checkpoints(output / run.job_id):
        problem = f"{output / run.job_id} holds checkpoints of an earlier run, which this run will replace"
        logger.warning(f"{problem}; --resume auto would continue it")
    return {"job_id": run.job_id or new_job_id(output), "resume": None}


def _choose_evaluation(run: RunConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    from lavis_lite.runners.eval_batches import newest_unfinished

    output, path = Path(run.output_dir), checkpoint_to_resume(dataclasses.replace(run, resume=None))
    changes = {"resume": None} | ({} if path is None else {"resume_ckpt_path": str(path)})
    found = newest_unfinished(output, config, job_id=run.job_id)
    if found is not None:
        return {**changes, "job_id": found.name, "resume": "auto"}
    logger.info("no evaluation to resume below %s: starting afresh", output)
    return {**changes, "job_id": run.job_id or new_job_id(output)}
