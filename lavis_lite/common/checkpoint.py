"""Checkpoint files: atomic writing, reading without running code, and loading with a report of every difference.

`atomic_write` is the one way in which this package replaces a file: a unique temporary name in the same folder, fsync,
rename. Torch's zip and legacy formats (`weights_only`) and safetensors can be read, and their checksums are verified.
"""

import errno
import functools
import io
import logging
import os
import pickle
import pickletools
import re
import secrets
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import nn

from lavis_lite.common import checkpoint_parts, integrity, sharding
from lavis_lite.common.disk import why_unwritable
from lavis_lite.common.errors import AdapterError, InputError, WriteError
from lavis_lite.common.sources import download

logger = logging.getLogger(__name__)

ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save|base_layer|original_module|token_adapter)(\.|$)")
"""Matches the names that peft gives to adapters and to the layers that have them."""
COMPUTED = re.compile(r"position_ids$|\.inv_freq$")
"""Matches the names of buffers that the model computes from its sizes; Hugging Face's files do not hold them."""


class LoadReport(NamedTuple):
    """Keys that the file lacks, and keys that the model lacks."""

    missing: list[str]
    unexpected: list[str]


class _ErrorRecorder(io.RawIOBase):
    """Write to a file and keep its first OSError, because torch.save's zip writer may mask it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> Path:
    """Replace `path` by the bytes that `write(file)` writes; on any failure the old file stays and no temporary is
    left.

    Raises:
        OSError: the disk is full or unwritable; the message has the path and the free space.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    recorder: _ErrorRecorder | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb", buffering=0) as file:
            recorder = _ErrorRecorder(file)
            with io.BufferedWriter(recorder) as buffered:
                write(buffered)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = (recorder and recorder.error) or error
        if not isinstance(cause, OSError):
            raise
        advice = "Free some space, or write to another disk (a run: run.output_dir; --resume auto continues it)"
        if path.is_dir():
            advice = "Move this folder elsewhere"
        raise WriteError(
            cause.errno,
            f"cannot write {path}: {why_unwritable(path, cause)}; nothing was replaced. {advice}",
        ) from error
    return path


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_text(path: str | Path, text: str) -> Path:
    """Write a text as UTF-8 with `atomic_write`."""
    return atomic_write(path, lambda file: file.write(text.encode()))


def link_or_copy(source: Path, target: Path) -> Path:
    """Make `target` a hard link to the file `source`, atomically; a copy where the file system has no hard links."""
    temporary = _temporary_name(target)
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        with source.open("rb") as file:
            atomic_write(target, functools.partial(shutil.copyfileobj, file))
    return target


def sweep_temporaries(folder: Path) -> list[Path]:
    """Delete and return the temporary files of killed `atomic_write`s, in a folder that no other process writes to."""
    left = [path for path in folder.glob(".*.tmp") if path.is_file()]
    for path in left:
        path.unlink(missing_ok=True)
    return left


def save(obj: Any, path: str | Path) -> Path:
    """Write `obj` (nested containers of tensors and plain values) with torch.save, atomically."""
    return atomic_write(path, lambda file: torch.save(obj, file))


class Safetensors(Mapping[str, torch.Tensor]):
    """The tensors of a .safetensors file, each read on access, memory-mapped on a CPU."""

    def __init__(self, path: Path, map_location: str | torch.device = "cpu") -> None:
        from safetensors import safe_open

        self._file = safe_open(path, framework="pt", device=str(map_location))
        self._names = {name: name for name in self._file.keys()}  # noqa: SIM118  (it is not a dictionary)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(self._names[name])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def verify(path: Path, *, as_zip: bool = False) -> None:
    """Compare a file with its checksums as `integrity.verify` does, and the parts of a sharded checkpoint with theirs.

    Raises:
        DamagedFileError: the file or a part is damaged, or a part is missing.
    """
    integrity.verify(path, as_zip=as_zip)
    checkpoint_parts.verify(path, load(path, verify=False))


def load(path: str | Path, *, map_location: str | torch.device = "cpu", verify: bool = True) -> Mapping[str, Any]:
    """Read a `.pth` file (memory-mapped where possible) or a `.safetensors` file; never run code from it.

    Tensors of a sharded checkpoint have no values; `checkpoint_parts.read` reads them. `verify=False` skips the
    checksums (`verify`), for a file that was verified already.

    Raises:
        FileNotFoundError: no such file; the message lists similar names.
        ValueError: the file is damaged, truncated, is not a checkpoint, or holds pickled code or compressed entries.
    """
    path = Path(path)
    if not path.is_file():
        raise download.missing_file(path)
    refuse_compressed(path)
    if verify:
        integrity.verify(path)
    try:
        if path.suffix == ".safetensors":
            return Safetensors(path, map_location)
        saved = torch.load(path, map_location=map_location, weights_only=True, mmap=is_mappable(path) or None)
    except Exception as error:
        names: list[str] = []
        if isinstance(error, pickle.UnpicklingError):
            names = re.findall(r"GLOBAL ([\w.]+)", str(error)) or _imported_names(path)
        if names:
            raise InputError(
                f"checkpoint {path} holds pickled code or objects, which reading would run: {', '.join(set(names))}. "
                "If you trust its author, convert it on a machine that may run it: "
                "torch.save(torch.load(old, weights_only=False)['model'], new), keeping tensors and plain containers"
            ) from error
        is_cut_short = isinstance(error, OSError) and error.errno == errno.EINVAL  # torch seeks to before the start
        if isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)) and not is_cut_short:
            raise
        raise _corrupt_error(path, error) from error
    if verify:
        checkpoint_parts.verify(path, saved)
    loaded: Mapping[str, Any] = saved
    return loaded


def refuse_compressed(path: Path) -> None:
    """Raise ValueError for a zip file with compressed entries: torch writes none, and a small file could inflate to
    more than the memory.
    """
    if path.suffix == ".safetensors" or not is_mappable(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise _corrupt_error(path, error) from error
    if compressed:
        size = sum(entry.file_size for entry in compressed)
        problem = f"{len(compressed)} entries are compressed, inflated {size:,} bytes"
        raise InputError(f"checkpoint {path} is refused: {problem}: ask for the file as torch.save wrote it")


def is_mappable(path: Path) -> bool:
    """Return whether the file can be memory-mapped: a .safetensors file, or torch's zip format."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def find_state_dict(obj: Mapping[str, Any], *, source: str = "checkpoint") -> Mapping[str, torch.Tensor]:
    """Return the weights of a loaded checkpoint: LAVIS's `{"model": ...}`, `{"state_dict": ...}` or a bare state dict.

    A `module.` prefix that all keys share (saved from DDP) is removed.
    """
    if isinstance(obj, Safetensors) and obj and not all(key.startswith("module.") for key in obj):
        return obj
    nested = [obj.get(key) for key in ("model", "state_dict")] if isinstance(obj, Mapping) else []
    state = next((value for value in nested if isinstance(value, Mapping)), obj)
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        found = sorted(map(str, obj))[:10] if isinstance(obj, Mapping) else type(obj).__name__
        raise InputError(f"{source} holds no weights: expected a state dict or {{'model': state dict}}, found {found}")
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def load_into(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    source: str | Path,
    allow_missing: Callable[[str], bool] = lambda key: False,
    loaded_separately: Callable[[str], bool] = lambda key: False,
    take: bool = False,
) -> LoadReport:
    """Copy `state` into `model`, tensor by tensor in the model's precision, and log every difference; the model is
    unchanged if this raises.

    With `take` nothing else uses the tensors of `state`. Those of the model's own precision are then not copied:
    parameters use the pages of the mapped file, which are read when they are first needed, and copied when written to.

    The file may lack the trainable keys of `allow_missing`; the keys of `loaded_separately` come from another source.
    A missing alias of a tied parameter counts as present if another of its names is given.

    Raises:
        ValueError: no key fits (another architecture) or no trainable one does, shapes differ, a trainable key is
            missing, or the file holds adapters (LoRA) that the model lacks.
    """
    own = model.state_dict(keep_vars=True)
    given = {id(own[key]) for key in state if key in own}
    report = LoadReport(
        missing=[key for key, value in own.items() if key not in state and id(value) not in given],
        unexpected=[key for key in state if key not in own],
    )
    lost = [key for key in report.missing if own[key].requires_grad and not allow_missing(key)]
    _check_fit(type(model).__name__, own, state, lost, source)
    missing = [key for key in report.missing if not COMPUTED.search(key)]
    separate = [key for key in missing if loaded_separately(key)]
    random = [key for key in missing if own[key].requires_grad and key not in separate]
    frozen = [key for key in missing if not own[key].requires_grad and key not in separate]
    for level, keys, what in (
        (logging.WARNING, random, "trainable keys missing in the file"),
        (logging.INFO, frozen, "frozen keys or buffers missing in the file (unchanged)"),
        (logging.INFO, separate, "keys not in the file, which are loaded from their own source"),
        (logging.INFO, report.unexpected, "keys unknown to the model (ignored)"),
    ):
        if keys:
            logger.log(level, f"{source}: {len(keys)} {what}: {_listed(keys, limit=10)}")
    taken: set[int] | None = set() if take else None
    with torch.no_grad():
        for key in state:
            if key in own:
                _fill(own[key], sharding.like(own[key], state[key]), taken)
    return report


def _fill(target: torch.Tensor, tensor: torch.Tensor, taken: set[int] | None) -> None:
    """Give a parameter or buffer the values of a tensor: the tensor itself, of which `taken` then has the address, if
    that may be taken and is alike; else a copy, as for the second name of one tensor.
    """
    is_plain = type(target) in (torch.Tensor, nn.Parameter) and type(tensor) is torch.Tensor
    same_kind = (target.dtype, target.device) == (tensor.dtype, tensor.device)
    is_alike = is_plain and same_kind and target.is_contiguous() and tensor.is_contiguous()
    if taken is not None and is_alike and tensor.data_ptr() not in taken:
        taken.add(tensor.data_ptr())
        target.data = tensor
        torch.autograd.graph.increment_version(target)
    else:
        target.copy_(tensor)


def _check_fit(
    name: str, own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], lost: list[str], source: str | Path
) -> None:
    """Raise ValueError if the file has none of the model's keys or none of its trainable ones, adapters that the model
    lacks, or other shapes, or if trainable keys are `lost`.
    """
    given = {id(own[key]): key for key in state if key in own}
    if own and not given:
        keys = f"{name} has none of its {len(state)} keys: {_listed(state)}; the model has {_listed(own)}"
        raise InputError(f"{source} is a checkpoint of another architecture: {keys}")
    trainable = {id(value): key for key, value in own.items() if value.requires_grad and not ADAPTER.search(key)}
    if trainable and not given.keys() & trainable.keys():
        keys = f"only {_listed(given.values())}. Its trainable ones are {_listed(trainable.values())}"
        raise InputError(f"{source} holds no trainable key of {name}, {keys}")
    adapters = [key for key in state if key not in own and ADAPTER.search(key)]
    if adapters:
        found = f"{len(adapters)} tensors of adapters (LoRA) that have no place in the model: {_listed(adapters)}"
        advice = "Set model.llm_lora as it was in training, or qformer_lora, of BLIP vit_lora and text_lora"
        raise AdapterError(f"{source} holds {found}. {advice}")
    shapes = [
        f"{key} {tuple(state[key].shape)} (model: {tuple(own[key].shape)})"  # read anew: shards are open one at a time
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]
    if shapes:
        sizes = f"{len(shapes)} shapes differ from the model's: {_listed(shapes)}"
        raise InputError(f"{source}: {sizes}; set the model's sizes as they were in training")
    if lost:
        keys = f"{len(lost)} trainable keys of the model, which would keep random values: {_listed(lost)}"
        raise InputError(f"{source} lacks {keys}; name a checkpoint that has them")


def _listed(keys: Iterable[str], *, limit: int = 4) -> str:
    keys = list(keys)
    return ", ".join(keys[:limit]) + (f", ... ({len(keys)} in all)" if len(keys) > limit else "")


def _corrupt_error(path: Path, error: Exception) -> InputError:
    reason = next(iter(str(error).splitlines()), "unexpected end")
    if isinstance(error, pickle.UnpicklingError):  # torch's message advises to run the file's code
        reason = "its content is neither torch's nor safetensors' format"
    what = f"checkpoint {path} ({path.stat().st_size:,} bytes) is truncated or not a checkpoint ({reason})"
    return InputError(f"{what}: name another file, or download or copy it again")


def _imported_names(path: Path) -> list[str]:
    """Return the names that a pickle of protocol 4 or 5 imports, without unpickling it. torch names those of older
    protocols in its error; nothing is returned if the file is not a pickle.
    """
    strings: list[str] = []
    names: list[str] = []
    try:
        data = path.read_bytes()
        if is_mappable(path):
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except (ValueError, StopIteration, zipfile.BadZipFile) as error:
        logger.debug(f"{path} is not a pickle: {error}")
    return names
