"""Sharded checkpoints (`run.checkpoint: sharded`): each rank writes its part of the tensors beside the file.

torch.distributed.checkpoint writes and reads the parts, as safetensors files, so that reading them runs no code. The
checkpoint's file is written last. In the place of the tensors of model and optimizer it has tensors on the meta device,
which have a shape and no values; its entry `parts` names the folder, its files with their digests, and tied tensors.
"""

import errno
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lavis_lite.common import dist, integrity, sharding
from lavis_lite.common.disk import is_full, why_unwritable
from lavis_lite.common.errors import DamagedFileError, WriteError

PARTS = "parts"
SECTIONS = ("model", "optimizer")
"""Entries of a checkpoint whose tensors are in the parts."""

# of a world of one, and of reading, in which ranks take no part of each other
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def write(saved: Mapping[str, Any], folder: Path, group: Any) -> dict[str, Any]:
    """Write this rank's part of a checkpoint's tensors into a new folder, and return what its file then holds.

    Must be entered by every rank; `group` is a `dist.new_group`. Of tensors that are not sharded rank 0 writes its own.

    Raises:
        WriteError: a rank cannot write its part, or rank 0 does not see all parts.
    """
    from torch.distributed import checkpoint as dcp

    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}

    def taken(name: str, tensor: Tensor) -> Tensor:
        first = names.setdefault(sharding.memory_of(tensor), name)
        if first == name:
            tensors[name] = tensor.detach().contiguous()
        else:
            tied[name] = first
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    rest = {key: sharding.mapped(value, taken, key) if key in SECTIONS else value for key, value in saved.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    try:
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        if dist.is_main():
            shutil.rmtree(folder, ignore_errors=True)
        rank, (cause, _) = next(iter(error.failures.items()))
        problem = f"rank {rank} cannot write its part of {folder}: {why_unwritable(folder, cause)}"
        if not isinstance(cause, OSError) and not is_full(cause):
            raise RuntimeError(problem) from error
        number = cause.errno if isinstance(cause, OSError) else errno.ENOSPC
        raise WriteError(number, f"{problem}; the checkpoint before it is kept. Free some space") from error
    own = {path.name: integrity.sha256(path) for path in folder.glob(f"shard-{dist.rank() + 1:05}-*")}
    files = {name: digest for part in dist.gather_objects([own], group) for name, digest in part.items()}
    if dist.is_main() and (unseen := [name for name in files if not (folder / name).is_file()]):
        problem = f"{folder}: the parts {', '.join(unseen[:4])} are on other machines only"
        raise WriteError(f"{problem}; set run.output_dir to a folder that all machines share")
    return rest | {PARTS: {"folder": folder.name, "files": files, "tied": tied}}


def is_sharded(saved: Any) -> bool:
    """Return whether a loaded file is that of a sharded checkpoint. DamagedFileError if only half of it looks so."""
    if not isinstance(saved, Mapping) or not isinstance(parts := saved.get(PARTS), Mapping):
        return False
    folder = parts.get("folder")
    is_named = isinstance(folder, str) and Path(folder).name == folder not in ("", "..")
    if not is_named or not all(isinstance(parts.get(key), Mapping) for key in ("files", "tied")):
        raise DamagedFileError(f"a checkpoint's entry {PARTS!r} must have a folder beside it, files and tied tensors")
    return True


def verify(path: Path, saved: Any) -> None:
    """Compare the parts of the checkpoint at `path` with their digests; a checkpoint of one file has none.

    Raises:
        DamagedFileError: a part is missing, or fails its checksum.
    """
    if not is_sharded(saved):
        return
    folder, files = path.with_name(saved[PARTS]["folder"]), saved[PARTS]["files"]
    for name in files:
        if not (folder / name).is_file():
            advice = "copy the folder together with the file, or take an older checkpoint"
            raise DamagedFileError(f"checkpoint {path} is incomplete: its part {folder / name} is missing; {advice}")
    with ThreadPoolExecutor() as pool:
        digests = pool.map(integrity.sha256, (folder / name for name in files))
        for (name, expected), digest in zip(files.items(), digests, strict=True):
            if digest != expected:
                problem = f"checkpoint {path} is damaged: its part {folder / name} fails its checksum"
                raise DamagedFileError(f"{problem}; {integrity.REMEDY}")


def read(
    saved: Mapping[str, Any],
    path: Path,
    *,
    sections: tuple[str, ...] = SECTIONS,
    like: Mapping[str, Tensor] = MappingProxyType({}),
) -> Mapping[str, Any]:
    """Return the checkpoint at `path` with the tensors of `sections`; `saved`, what its file holds, has no values.

    A tensor that `like` has as shards, under its dotted name (`model.x.weight`), is read as shards: this rank's part
    only. All others are read whole. A checkpoint of one file is returned as it is.
    """
    if not is_sharded(saved):
        return saved
    from torch.distributed import checkpoint as dcp

    tensors: dict[str, Tensor] = {}

    def wanted(name: str, tensor: Tensor) -> Tensor:
        target, first = like.get(name), saved[PARTS]["tied"].get(name, name)
        if first not in tensors and sharding.is_shard(target) and target.shape == tensor.shape:
            tensors[first] = torch.empty_like(target, dtype=tensor.dtype, requires_grad=False)
        elif first not in tensors:
            tensors[first] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return tensors[first]

    filled = {key: sharding.mapped(saved[key], wanted, key) for key in sections}
    reader = dcp.HuggingFaceStorageReader(str(path.with_name(saved[PARTS]["folder"])))
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {key: value for key, value in saved.items() if key != PARTS} | filled
