"""Division of a global batch into the batches of the processes, also where a run resumes on another number."""

import dataclasses
import logging

from lavis_lite.common import checkpoint, dist
from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import InputError
from lavis_lite.runners.jobs import checkpoint_to_resume

logger = logging.getLogger(__name__)


def divide(run: RunConfig, *, resumes: bool = True) -> RunConfig:
    """Return the run with the batch size and the number of accumulated batches by which its processes make up the
    global batch: `run.global_batch`, or if it `resumes` that of a checkpoint of another number of processes.

    Must be entered by every rank.

    Raises:
        InputError: the processes cannot have equal shares of the global batch.
    """
    if run.evaluate:
        return run
    world = dist.world_size()
    size = run.global_batch
    if size is None and resumes:
        size = dist.on_main(lambda: _kept_global_batch(run, world))
    if size is None:
        return run
    batch_size, accumulate = shares(size, world=world, most=run.batch_size_train)
    text = f"{batch_size} samples x {world} processes x {accumulate} accumulated batches"
    logger.info(f"a global batch of {size}: {text}")
    return dataclasses.replace(run, global_batch=size, batch_size_train=batch_size, accum_grad_iters=accumulate)


def shares(size: int, *, world: int, most: int) -> tuple[int, int]:
    """Return samples per batch and batches per step of each of `world` processes, for a global batch of `size` in as
    few batches of at most `most` samples as are equally large.

    Raises:
        InputError: the global batch cannot be divided among the processes.
    """
    share, rest = divmod(size, world)
    if rest:
        fitting = [number for number in range(1, size + 1) if size % number == 0]
        near = {max(number for number in fitting if number < world), *[n for n in fitting if n > world][:1]}
        raise InputError(
            f"run.global_batch: {size} samples cannot be divided among {world} processes: start "
            f"{' or '.join(map(str, sorted(near)))} processes, or another number that divides it"
        )
    batch_size = next(number for number in range(min(most, share), 0, -1) if share % number == 0)
    return batch_size, share // batch_size


def _kept_global_batch(run: RunConfig, world: int) -> int | None:
    """Return the global batch of the checkpoint that the run resumes, if this run's would differ because of another
    number of processes; else None.
    """
    path = checkpoint_to_resume(run)
    saved = {} if path is None else checkpoint.load(path, verify=False)
    if not {"plan", "ranks", "config"} <= saved.keys():  # the resume itself says what is missing
        return None
    was_kept = saved["config"]["run"].get("global_batch") is not None
    size: int = saved["plan"]["global_batch"]
    own = run.batch_size_train * world * run.accum_grad_iters
    if own == size or not (was_kept or len(saved["ranks"]) != world):
        return None
    why = "run.global_batch" if was_kept else f"{len(saved['ranks'])} processes, this run has {world}"
    logger.info(f"{path}: its global batch of {size} samples ({why}) is kept; this run's own would be {own}")
    return size
