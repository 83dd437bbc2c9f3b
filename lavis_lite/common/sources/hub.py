"""transformers' and timm's `from_pretrained` for folders and hub ids that nobody vouches for.

No code of theirs is run, and LAVIS_LITE_OFFLINE is obeyed. Surprising: without `trust_remote_code=False` transformers
asks on the terminal whether to run what a folder brings.
"""

import contextlib
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from lavis_lite.common import checkpoint
from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.sources import download, weights


def from_hub(load: Callable[..., Any], source: str | Path, **settings: Any) -> Any:
    """Return what `load`, a `from_pretrained` of transformers, makes of a folder or hub id: from this machine if it is
    there, else from the hub.

    Raises:
        FileNotFoundError: it cannot be loaded, or it is not on this machine and LAVIS_LITE_OFFLINE is set.
        ValueError: it needs code of its own, or its weights hold pickled code or compressed entries.
    """
    is_local = Path(source).is_dir()
    if is_local:
        check_folder(Path(source))
    reason: Exception | None = None
    for local_only in (True,) if is_local or download.is_offline() else (True, False):
        try:
            with hub_offline(), refusing_code(source):
                return load(str(source), local_files_only=local_only, trust_remote_code=False, **settings)
        except InputError:
            raise
        except (OSError, ValueError, ImportError) as error:
            reason = error
    text = next(iter(str(reason).strip().splitlines()), type(reason).__name__).rstrip(".:")
    raise MissingFileError(text) from reason


def read_json_mapping(path: Path) -> dict[str, Any]:
    """Return a JSON file's content. ValueError if it is not a mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping, found a {type(content).__name__}")
    return content


@contextlib.contextmanager
def hub_offline() -> Iterator[None]:
    """Keep the hub's library off the network inside if LAVIS_LITE_OFFLINE is set.

    Note: `local_files_only` is not enough. transformers still asks for adapters, and which service it may use.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or download.is_offline()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def check_folder(folder: Path) -> None:
    """Raise ValueError for weight files that transformers would read without checking: those with compressed entries,
    and those outside the folder, which an index may name.
    """
    for path in folder.glob("pytorch_model*.bin"):
        checkpoint.refuse_compressed(path)
    for index in folder.glob("*.index.json"):
        weights.shards(index)


@contextlib.contextmanager
def refusing_code(source: str | Path) -> Iterator[None]:
    """Turn an error of transformers, timm or torch about code in `source` into one that does not advise to run it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        for path in Path(source).glob("pytorch_model*.bin"):
            checkpoint.load(path)  # names the file, and what it would import
        raise InputError(
            f"{source}: its weights are damaged, or hold pickled code or objects and are refused, because reading them "
            "would run them: choose a revision with .safetensors files"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InputError(
            f"{source} needs code of its own (auto_map in its configuration), which is never run: choose a model that "
            "the installed transformers has a class for, or register a class of yours (imports: in the YAML)"
        ) from None
