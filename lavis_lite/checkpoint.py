"""Checkpoint files: written whole or not at all, read without running code, loaded with every difference reported.

`atomic_write` is the one way this project replaces a file: a temporary name of its own in the same folder, fsync,
rename. Reading accepts torch's zip and legacy formats (`weights_only`), safetensors, and verifies their checksums.
"""

import errno
import functools
import logging
import os
import pickle
import pickletools
import re
import secrets
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import nn

from lavis_lite import integrity
from lavis_lite.errors import AdapterError, InputError, MissingFileError, WriteError

logger = logging.getLogger(__name__)

ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save|base_layer|original_module|token_adapter)(\.|$)")
"""In the names that peft gives to adapters and to the layers that have them."""
COMPUTED = re.compile(r"position_ids$|\.inv_freq$")
"""In the names of buffers that the model computes from its sizes; Hugging Face's files never hold them."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES)
"""Errors of a file system without hard links."""


class LoadReport(NamedTuple):
    """What `load_into` found: keys the file lacks, keys the model lacks, keys whose shapes differ."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


class _Recorder:
    """A binary file that remembers its first OSError, because torch.save's zip writer may mask it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object], *, num_bytes: int | None = None) -> Path:
    """Replaces `path` by what `write(file)` writes; whatever fails, the old file stays and no temporary is left.

    Raises:
        OSError: the disk is full or unwritable; the message has the path, `num_bytes` (the size needed, if known) and
            the free space.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    recorder: _Recorder | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb", buffering=0) as file:
            recorder = _Recorder(file)
            write(recorder)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = recorder.error if recorder is not None and recorder.error is not None else error
        if not isinstance(cause, OSError):
            raise
        raise _write_error(path, cause, num_bytes=num_bytes) from error
    return path


def write_text(path: str | Path, text: str) -> Path:
    """`atomic_write` of a UTF-8 text."""
    data = text.encode()
    return atomic_write(path, lambda file: file.write(data), num_bytes=len(data))


def link_or_copy(source: Path, target: Path) -> Path:
    """Make `target` another name of the file `source`, atomically; a copy where the file system has no hard links."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in NO_LINKS:
            raise
        with source.open("rb") as file:
            atomic_write(target, functools.partial(shutil.copyfileobj, file), num_bytes=source.stat().st_size)
    return target


def sweep_temporaries(folder: Path) -> list[Path]:
    """Delete what a killed process left of its `atomic_write`s in a folder that no other process writes to."""
    left = [path for path in folder.glob(".*.tmp") if path.is_file()]
    for path in left:
        path.unlink(missing_ok=True)
    return left


def save(obj: Any, path: str | Path) -> Path:
    """Writes `obj` (nested containers of tensors and plain values) with torch.save, atomically."""
    return atomic_write(path, lambda file: torch.save(obj, file), num_bytes=sum(_tensor_bytes(obj).values()))


def load(path: str | Path, *, map_location: str | torch.device = "cpu", verify: bool = True) -> dict[str, Any]:
    """Reads a `.pth` file (memory-mapped where possible) or a `.safetensors` file; never runs code from it.

    `verify=False` skips the checksums (`integrity.verify`), for a file that was verified already.

    Raises:
        FileNotFoundError: no such file; the message lists its nearest neighbours.
        ValueError: the file is damaged, truncated, is not a checkpoint, or holds pickled code or compressed entries.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(_missing_message(path))
    refuse_compressed(path)
    if verify:
        integrity.verify(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path, device=str(map_location))
        return torch.load(path, map_location=map_location, weights_only=True, mmap=is_mappable(path) or None)
    except pickle.UnpicklingError as error:
        raise InputError(_unpickling_message(path, error)) from error
    except Exception as error:
        cut_short = isinstance(error, OSError) and error.errno == errno.EINVAL  # torch seeks to before the start
        if isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)) and not cut_short:
            raise
        raise InputError(_corrupt_message(path, error)) from error


def refuse_compressed(path: Path) -> None:
    """Raise ValueError for a zip file with compressed entries: torch stores them plainly, and a small file could
    inflate to more than the memory.
    """
    if path.suffix == ".safetensors" or not is_mappable(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise InputError(_corrupt_message(path, error)) from error
    if compressed:
        size = sum(entry.file_size for entry in compressed)
        raise InputError(
            f"checkpoint {path} is refused: {len(compressed)} of its entries are compressed, to be inflated to "
            f"{size:,} bytes, and torch writes none. Unpack it, or ask for the file as torch.save wrote it"
        )


def is_mappable(path: Path) -> bool:
    """Whether tensors of the file can be read in place: a .safetensors file, or torch's zip format."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def find_state_dict(obj: Mapping[str, Any], *, source: str = "checkpoint") -> dict[str, torch.Tensor]:
    """The weights in what `load` returned: LAVIS's `{"model": ...}`, `{"state_dict": ...}` or a bare state dict.

    A `module.` prefix that all keys share (saved from DDP) is removed.
    """
    state = obj
    for key in ("model", "state_dict"):
        if isinstance(obj, Mapping) and isinstance(obj.get(key), Mapping):
            state = obj[key]
            break
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
    elsewhere: Callable[[str], bool] = lambda key: False,
) -> LoadReport:
    """Copies `state` into `model`, tensor by tensor in the model's precision, and logs every difference; the model is
    untouched if this raises.

    `allow_missing` says which trainable keys the file may lack; what is `elsewhere` is loaded from another source. A
    missing alias of a tied parameter is no difference if its twin is given.

    Raises:
        ValueError: no key fits (another architecture) or no trainable one does, shapes differ, a trainable key is
            missing, or the file holds adapters (LoRA) that the model has not.
    """
    own = model.state_dict(keep_vars=True)
    given = {id(own[key]) for key in state if key in own}
    report = LoadReport(
        missing=[key for key, value in own.items() if key not in state and id(value) not in given],
        unexpected=[key for key in state if key not in own],
        mismatched=[key for key in state if key in own and state[key].shape != own[key].shape],
    )
    if own and not given:
        raise InputError(
            f"{source} is a checkpoint of another architecture: {type(model).__name__} has none of its "
            f"{len(state)} keys. It has {_listed(list(state), limit=4)}; the model has {_listed(list(own), limit=4)}"
        )
    trainable = {id(value): key for key, value in own.items() if value.requires_grad}
    if trainable and not given & trainable.keys():
        raise InputError(
            f"{source} holds no trainable key of {type(model).__name__}, only {len(given)} frozen ones or buffers: "
            f"{_listed([key for key in state if key in own], limit=4)}. Its trainable ones are "
            f"{_listed(list(trainable.values()), limit=4)}"
        )
    adapters = [key for key in report.unexpected if ADAPTER.search(key)]
    if adapters:
        raise AdapterError(
            f"{source} holds {len(adapters)} tensors of adapters (LoRA) that have no place in the model: "
            f"{_listed(adapters, limit=4)}. Set model.llm_lora as it was in training"
        )
    _check_differences(report, own, state, source=source, allow_missing=allow_missing)
    _log_differences(report, own, source=source, elsewhere=elsewhere)
    with torch.no_grad():
        for key in state:
            if key in own:
                own[key].copy_(state[key])
    return report


def _check_differences(
    report: LoadReport,
    own: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    *,
    source: str | Path,
    allow_missing: Callable[[str], bool],
) -> None:
    if report.mismatched:
        shapes = [f"{key} {tuple(state[key].shape)} (model: {tuple(own[key].shape)})" for key in report.mismatched]
        raise InputError(
            f"{source}: {len(shapes)} shapes differ from the model's: {_listed(shapes, limit=4)}; set the "
            "model's sizes as they were in training"
        )
    lost = [key for key in report.missing if own[key].requires_grad and not allow_missing(key)]
    if lost:
        raise InputError(
            f"{source} lacks {len(lost)} trainable keys of the model, which would keep random values: "
            f"{_listed(lost, limit=4)}; name a checkpoint that has them"
        )


def _log_differences(
    report: LoadReport, own: Mapping[str, torch.Tensor], *, source: str | Path, elsewhere: Callable[[str], bool]
) -> None:
    kinds = {
        key: "elsewhere" if elsewhere(key) else "trainable" if own[key].requires_grad else "frozen"
        for key in report.missing
        if not COMPUTED.search(key)
    } | dict.fromkeys(report.unexpected, "unknown")
    for kind, what in (
        ("trainable", "trainable keys missing in the file"),
        ("frozen", "frozen keys or buffers missing in the file (left as they are)"),
        ("elsewhere", "keys not in the file, which come from a source of their own"),
        ("unknown", "keys unknown to the model (ignored)"),
    ):
        keys = [key for key in kinds if kinds[key] == kind]
        if keys:
            level = logging.WARNING if kind == "trainable" else logging.INFO
            logger.log(level, f"{source}: {len(keys)} {what}: {_listed(keys)}")


def _listed(keys: Sequence[str], *, limit: int = 10) -> str:
    return ", ".join(keys[:limit]) + (f", ... ({len(keys)} in all)" if len(keys) > limit else "")


def _tensor_bytes(obj: Any) -> dict[int, int]:
    """Bytes of each distinct storage in nested containers, by its address."""
    if isinstance(obj, torch.Tensor):
        storage = obj.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    children = obj.values() if isinstance(obj, Mapping) else obj if isinstance(obj, (list, tuple)) else ()
    sizes: dict[int, int] = {}
    for child in children:
        sizes.update(_tensor_bytes(child))
    return sizes


def _write_error(path: Path, cause: OSError, *, num_bytes: int | None) -> WriteError:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    needed = "" if num_bytes is None else f"about {num_bytes / 2**20:.1f} MiB needed, "
    free = shutil.disk_usage(folder).free / 2**20
    what = "the disk is full" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else (cause.strerror or str(cause))
    kept = "the previous file is intact" if path.exists() else "no file was left behind"
    return WriteError(
        cause.errno,
        f"cannot write {path}: {what} ({needed}{free:.1f} MiB free in {folder}); {kept}. "
        "Free some space or point run.output_dir at another disk, then continue with --resume auto",
    )


def _missing_message(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f"checkpoint {path} not found: the folder {path.parent} does not exist"
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.3) or names[:5]
    hint = f"did you mean {', '.join(near)}?" if near else "the folder is empty"
    return f"checkpoint {path} not found; {hint}"


def _corrupt_message(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    reason = next(iter(str(error).splitlines()), "unexpected end")
    if isinstance(error, pickle.UnpicklingError):  # torch advises to run what a file says
        reason = "its content is neither torch's nor safetensors' format"
    return (
        f"checkpoint {path} ({size:,} bytes) is truncated or not a checkpoint ({reason}): name another file, or "
        "download or copy it again"
    )


def _unpickling_message(path: Path, error: pickle.UnpicklingError) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    names = [found.group(1)] if found else [name for name in _pickled_globals(path) if not _is_plain(name)]
    if not names:
        return _corrupt_message(path, error)
    return (
        f"checkpoint {path} holds pickled code or objects and is refused, because reading it would run them: "
        f"{', '.join(dict.fromkeys(names))}. If you trust its author, convert it on a machine that may run it: "
        "torch.save(torch.load(old, weights_only=False)['model'], new), keeping tensors and plain containers only"
    )


def _is_plain(name: str) -> bool:
    return name.startswith(("torch._utils.", "torch.storage.", "collections.OrderedDict")) or (
        name.startswith("torch.") and name.endswith("Storage")
    )


def _pickled_globals(path: Path) -> Iterator[str]:
    """Names a pickle would import, found without unpickling; nothing if the file is no pickle."""
    strings: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            data = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                yield ".".join(strings[-2:])
            elif isinstance(argument, str):
                strings.append(argument)
    except (ValueError, StopIteration, IndexError) as error:
        logger.debug(f"{path} is no pickle: {error}")
