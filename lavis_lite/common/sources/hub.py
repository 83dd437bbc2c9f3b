"""`from_pretrained` of transformers, and timm's published models, for untrusted folders and hub ids.

No code of theirs is run, and LAVIS_LITE_OFFLINE is obeyed. Note: without `trust_remote_code=False` transformers asks on
the terminal whether to run the code of a folder.
"""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from lavis_lite.common import checkpoint
from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.registry import did_you_mean
from lavis_lite.common.sources import download, folders, reach

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

COPY_CACHE = "copy the hub's cache (HF_HOME) of a machine that has it"
"""Advice for a hub id of which something is not on this machine, while the hub cannot be asked."""


def from_hub(load: Callable[..., Any], source: str | Path, **settings: Any) -> Any:
    """Return the result of `load`, a `from_pretrained` of transformers, for a folder or hub id: from this machine if it
    is there, else from the hub.

    Raises:
        FileNotFoundError: it cannot be loaded, or it is not on this machine and the hub does not answer or
            LAVIS_LITE_OFFLINE is set.
        ValueError: it needs code of its own, or its weights hold pickled code or compressed entries.
    """
    is_local = Path(source).is_dir()
    if is_local:
        _check_folder(Path(source))
    reason: Exception | None = None
    problem: str | None = None
    for local_only in (True,) if is_local else (True, False):
        if not local_only and (problem := reach.hub_problem()):
            break
        try:
            with hub_offline(download.is_offline()), _refusing_code(source):
                return load(str(source), local_files_only=local_only, trust_remote_code=False, **settings)
        except InputError:
            raise
        except (OSError, ValueError, ImportError) as error:
            reason = error
    text = next(iter(str(reason).strip().splitlines()), type(reason).__name__).rstrip(".:")
    if problem:
        text = "it is not in the hub's cache, or not whole" if isinstance(reason, OSError) else text
        text = f"{text}; {problem}: {COPY_CACHE}, or give a local folder"
    raise MissingFileError(text) from reason


def timm_model(name: str, *, pretrained: bool = True) -> nn.Module:
    """Return a timm model with its published weights (downloaded, or from the caches), or with random ones.

    Raises:
        FileNotFoundError: the weights are not on this machine, and the hub does not answer or LAVIS_LITE_OFFLINE is
            set.
        ValueError: timm has no model of this name, or no weights of it.
    """
    import timm

    settings: dict[str, Any] = {}
    is_of_hub = ":" in name  # hf_hub:owner/name is timm's name of a repository
    if not is_of_hub:
        config = timm_config(name)
        if pretrained and not config.has_weights:
            raise InputError(f"timm has no published weights of {name}: give a file of weights instead")
        is_of_hub = bool(config.hf_hub_id)
    problem = reach.hub_problem() if (is_of_hub and pretrained) or download.is_offline() else None
    if problem and pretrained and ":" not in name:
        if (file := cached_timm_weights(config)) is None:
            raise MissingFileError(
                f"the weights of timm's {name} are not on this machine; {problem}: {COPY_CACHE}, or give a file of "
                "weights instead of the name"
            )
        settings["pretrained_cfg_overlay"] = {"file": str(file)}
    try:
        with hub_offline(problem is not None), _refusing_code(name):
            return timm.create_model(name, pretrained=pretrained, **settings)
    except LocalEntryNotFoundError as error:
        raise MissingFileError(f"timm's {name} is not in the hub's cache; {problem or error}: {COPY_CACHE}") from error


def timm_config(name: str) -> "PretrainedCfg":
    """Return timm's record of a model and its published weights. ValueError for an unknown name or tag."""
    import timm
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise InputError(f"unknown timm model {name}: {error} {did_you_mean(name, timm.list_pretrained())}") from error
    assert config is not None, f"timm returned no record of {name}"  # it does so only if unregistered names are allowed
    return config


def cached_timm_weights(config: "PretrainedCfg") -> Path | None:
    """Return the file of a timm model's weights in the hub's cache or torch's; None if neither has it."""
    repository, _, revision = (config.hf_hub_id or "").partition("@")
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for file in names if repository else []:
        found = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(str(config.url)).path).name
    return path if isinstance(config.url, str) and path.is_file() else None


@contextlib.contextmanager
def hub_offline(is_offline: bool) -> Iterator[None]:
    """Keep the hub's library off the network inside if `is_offline`.

    Note: `local_files_only` is not enough. transformers still requests adapters and the services of the hub.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or is_offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _check_folder(folder: Path) -> None:
    """Raise ValueError for weight files that transformers would read without a check: those with compressed entries,
    and those outside the folder, which an index may name.
    """
    for path in folder.glob("pytorch_model*.bin"):
        checkpoint.refuse_compressed(path)
    for index in folder.glob("*.index.json"):
        folders.shards(index)


@contextlib.contextmanager
def _refusing_code(source: str | Path) -> Iterator[None]:
    """Replace an error of transformers, timm or torch about code in `source` by one that does not advise to run it."""
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
