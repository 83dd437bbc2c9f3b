"""LAVIS's names of the functions of `dist.py`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lavis_lite.common import dist
from lavis_lite.common.sources import download

get_rank, get_world_size, is_main_process = dist.rank, dist.world_size, dist.is_main


def main_process(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function so that only rank 0 calls it; other ranks get None."""

    @functools.wraps(function)
    def on_rank_zero(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if dist.is_main() else None

    return on_rank_zero


def is_dist_avail_and_initialized() -> bool:
    """Return whether there are several processes."""
    return dist.world_size() > 1


def init_distributed_mode(args: Any) -> None:
    """Join the process group of torchrun, if there is one, and set `distributed`, `rank` and `world_size` of `args`, a
    namespace or a section of a configuration, whose `device` is used.
    """
    given = args if isinstance(args, Mapping) else vars(args)
    dist.init(given.get("device") or "auto")
    args.distributed, args.rank, args.world_size = dist.world_size() > 1, dist.rank(), dist.world_size()


def download_cached_file(url: str, check_hash: bool = True, progress: bool = False) -> str:
    """Return the path of a file in the cache, downloaded if need be; LAVIS's other arguments have no effect."""
    return str(download.fetch(url))
