"""The number of loader workers of a process."""

import os
from typing import Any

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.hardware import num_cores

MAX_AUTO = 16


def loader_workers(run: RunConfig) -> int:
    """Return `run.num_workers`; `auto` is this process's share of the cores less the one that it computes on, 1 to 16.

    Under torchrun the cores are divided by the machine's processes.
    """
    if run.num_workers != "auto":
        return run.num_workers
    own = num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(own - 1, 1), MAX_AUTO)


def worker_options(run: RunConfig, *, at_most: int | None = None) -> dict[str, Any]:
    """Return a DataLoader's options of its workers, of which there are `at_most` as many as batches."""
    number = loader_workers(run) if at_most is None else min(loader_workers(run), at_most)
    return {"num_workers": number, "prefetch_factor": run.prefetch_factor if number else None}
