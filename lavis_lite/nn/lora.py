"""Adapters in a language model (LoRA, Hu et al. 2021), by peft: training, merging, and peft's own folders.

Note: `modules_to_save` and `bias` of peft's LoraConfig train whole parts of the language model. All trained tensors are
float32, so that such a model must be float32 itself.
"""

import copy
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lavis_lite.common import checkpoint
from lavis_lite.common.bounds import MAX_WIDTH, check_number, check_numbers
from lavis_lite.common.errors import (
    AdapterError,
    InputError,
    MissingFileError,
    MissingPackageError,
)
from lavis_lite.common.sources import download, weights

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
"""Key of `llm_lora` beside those of LoraConfig: the folder that the adapters' weights come from."""
CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
BIASES = ("none", "all", "lora_only")
WHOLE_PARTS = ("modules_to_save", "trainable_token_indices")
"""Keys of LoraConfig that train parts of the language model itself."""
NUMBERS = {"r": (1, MAX_WIDTH), "lora_alpha": (0.0, 1e6), "lora_dropout": (0.0, 1.0)}
"""Bounds of numbers in LoraConfig."""
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
"""Keys of LoraConfig that hold a number by the names of layers, and the number that it replaces."""
PEFT_PREFIX = "base_model.model."
WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.default|token_adapter)(?=\.)")
"""Between a layer that peft has wrapped and its weights."""
MOST_ADDED = 64
"""Rows that a vocabulary may have more than the adapters' own: Hugging Face's image token, rounded up."""
NOT_COUNTED = ("base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "auto_mapping")
"""Keys of a peft folder's configuration that say nothing about the adapters."""


def lora_settings(value: Mapping[str, Any] | str | None) -> dict[str, Any] | None:
    """Return `llm_lora` as a mapping; that of a folder which peft wrote is its configuration and its place, under
    `adapter`.

    Raises:
        FileNotFoundError: the folder is missing, or has no adapter_config.json.
        ValueError: the folder holds other adapters than LoRA's.
    """
    if not isinstance(value, str | Path):
        return None if value is None else dict(value)
    path = download.fetch_folder(value) / CONFIG_FILE
    if not path.is_file():
        raise MissingFileError(f"llm_lora: {value} holds no {CONFIG_FILE}: name a folder that peft wrote")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kind = stored["peft_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"llm_lora: {path} is not a configuration of peft ({type(error).__name__}: {error})"
        ) from error
    if kind != "LORA":
        raise InputError(f"llm_lora: {path} is of {kind} adapters; only LORA can be loaded")
    kept = {key: setting for key, setting in stored.items() if setting is not None and key not in NOT_COUNTED}
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"] = sorted(kept["target_modules"])  # peft saves a set
    return {**_without_defaults(kept), ADAPTER: str(value)}


def _without_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from LoraConfig's own; those of another version of peft are left out."""
    usual = lora_config({}).to_dict()
    unknown = sorted(settings.keys() - usual.keys())
    if unknown:
        logger.warning(f"llm_lora: the installed peft does not know {', '.join(unknown)}, which are left out")
    return {key: value for key, value in settings.items() if key in usual and usual[key] != value}


def lora_config(lora: Mapping[str, Any]) -> Any:
    """peft's LoraConfig. ValueError for an unknown key or value, ImportError without peft."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingPackageError("llm_lora needs peft: `pip install peft`, or leave the setting out") from error
    settings = {key: value for key, value in lora.items() if key != ADAPTER}
    check_types(settings)
    try:
        config = LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"model.llm_lora: {error}; its keys are those of peft's LoraConfig") from error
    if config.bias not in BIASES:
        raise InputError(f"model.llm_lora.bias: {config.bias!r} is not one of {', '.join(BIASES)}")
    return config


def check_types(settings: Mapping[str, Any]) -> None:
    """Raise InputError, which begins with `model.llm_lora.<key>`, for a value that peft would stumble over, or take for
    something else.
    """
    section = "model.llm_lora"
    check_numbers(section, settings, **NUMBERS)
    for key, number in PATTERNS.items():
        pattern = settings.get(key)
        if pattern is not None and not isinstance(pattern, Mapping):
            raise InputError(f"{section}.{key}: must be a mapping from layers to numbers, got {pattern!r}")
        for layer, value in (pattern or {}).items():
            check_number(f"{section}.{key}.{layer}", value, *NUMBERS[number])
    for what, (fits, keys) in TYPES.items():
        for key in keys:
            if settings.get(key) is not None and not fits(settings[key]):
                raise InputError(f"{section}.{key}: must be {what}, got {settings[key]!r}")


def _is_list(value: Any, kind: type) -> bool:
    """Whether it is a list, or another collection that peft takes, of such values."""
    return isinstance(value, list | tuple | set) and all(type(one) is kind for one in value)


def _is_rows(value: Any) -> bool:
    """Whether it is a list of tokens' ids, or a mapping from embeddings to such lists."""
    lists = value.values() if isinstance(value, Mapping) else [value]
    return all(_is_list(one, int) and all(row >= 0 for row in one) for one in lists)


TYPES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "true or false": (
        lambda value: isinstance(value, bool),
        ("use_dora", "use_rslora", "use_qalora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"),
    ),
    "a text or a list of texts": (
        lambda value: isinstance(value, str) or _is_list(value, str),
        ("target_modules", "exclude_modules", "layers_pattern"),
    ),
    "a list of texts": (lambda value: _is_list(value, str), ("modules_to_save", "target_parameters")),
    "a whole number or a list of whole numbers": (
        lambda value: type(value) is int or _is_list(value, int),
        ("layers_to_transform",),
    ),
    "a list of tokens' ids, or a mapping from embeddings to such lists": (_is_rows, ("trainable_token_indices",)),
}
"""What keys of LoraConfig hold, in words, and whether a value is of that kind; peft checks the other keys."""


def trains_whole_parts(lora: Mapping[str, Any] | None) -> bool:
    """Return whether parts of the language model itself are trained beside the adapters."""
    return lora is not None and (lora.get("bias", "none") != "none" or any(lora.get(key) for key in WHOLE_PARTS))


def add_lora(model: nn.Module, lora: Mapping[str, Any]) -> None:
    """Put adapters into the model's layers; only what peft trains is then trained, in float32.

    Raises AdapterError for `target_modules` or `modules_to_save` that the model does not have.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    config = lora_config(lora)
    known = {key: _names(model, leaves=key == "target_modules") for key in ("target_modules", "modules_to_save")}
    try:
        inject_adapter_in_model(config, model)
    except (ValueError, TypeError, IndexError) as error:  # the last for a token that the vocabulary does not have
        is_name = "target" in str(error).lower()
        advice = f": set target_modules to some of {', '.join(known['target_modules'])}" if is_name else ""
        raise AdapterError(f"model.llm_lora: {str(error).rstrip('.')}{advice}") from error
    wrapped = {"target_modules": BaseTunerLayer, "modules_to_save": AuxiliaryTrainingWrapper}
    for key, kind in wrapped.items():
        found = [name for name, module in model.named_modules() if isinstance(module, kind)]
        _check_found(lora.get(key), found, key=key, known=known[key])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _names(model: nn.Module, *, leaves: bool) -> list[str]:
    """Return the last parts of the names of a model's modules, with `leaves` of those that can have adapters."""
    layers = (nn.Linear, nn.Embedding, Conv1D)
    found = (name for name, module in model.named_modules() if not leaves or isinstance(module, layers))
    return sorted({last for last in (name.rpartition(".")[2] for name in found) if last and not last.isdigit()})


def _check_found(wanted: Any, found: list[str], *, key: str, known: list[str]) -> None:
    """Raise AdapterError for a name of no wrapped module; a text is a pattern, which peft checks."""
    if wanted is None or isinstance(wanted, str):
        return
    for name in wanted:
        if not any(other == name or other.endswith(f".{name}") for other in found):
            raise AdapterError(f"model.llm_lora.{key}: the language model has no {name}; it has {', '.join(known)}")


def targets(own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return, by the name that a tensor has in a model without adapters, its names in `own`, a model with them."""
    found: dict[str, list[str]] = {}
    for name in own:
        plain = WRAPPED.sub("", name)
        if plain != name:
            found.setdefault(plain, []).append(name)
    return found


def _wrapped(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the outermost layers that peft has wrapped, with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    prefixes: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not name.startswith(tuple(prefixes)):
            prefixes.append(f"{name}.")
            yield name, module


def has_adapters(model: nn.Module) -> bool:
    """Return whether any layer has an adapter."""
    return any(checkpoint.ADAPTER.search(name) for name, _ in model.named_parameters())


@torch.no_grad()
def plain_state_dict(model: nn.Module, *, merge: bool = True) -> dict[str, Tensor]:
    """Return the model's tensors under the names of a model without adapters, these merged or left out.

    The model is not changed; only what is merged is copied.
    """
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    if not has_adapters(model):
        return state
    for prefix, layer in _wrapped(model):
        plain = plain_state_dict(_merged(layer) if merge else _without(layer), merge=merge)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}.")}
        state |= {f"{prefix}.{name}": tensor for name, tensor in plain.items()}
    return state


def _merged(layer: Any) -> nn.Module:
    """Return a copy of peft's layer without its adapter, which is merged into the weights, in their own precision."""
    dtype = next(layer.parameters()).dtype
    layer = copy.deepcopy(layer).float()
    if hasattr(layer, "unload_and_optionally_merge_module"):
        layer = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        layer.merge()
        layer = layer.get_base_layer()
    return layer.to(dtype)


def _without(layer: Any) -> nn.Module:
    """Return the layer as it was before peft wrapped it."""
    if hasattr(layer, "original_module"):
        return layer.original_module
    return layer.token_adapter.get_base_layer() if hasattr(layer, "token_adapter") else layer.get_base_layer()


def unties(model: nn.Module, plain: Mapping[str, Tensor]) -> bool:
    """Return whether tensors that the model without adapters shares differ in `plain`, where they are merged."""
    names: dict[int, list[str]] = {}
    for name, tensor in plain_state_dict(model, merge=False).items():
        names.setdefault(id(tensor), []).append(name)
    return any(len({id(plain[name]) for name in group}) > 1 for group in names.values())


def load_adapter(model: Any, source: str) -> None:
    """Load the weights of a folder (or hub id) that peft wrote into the model's adapters.

    Raises:
        FileNotFoundError: the folder or its weights are missing.
        InputError: they do not fit the adapters.
    """
    from peft import set_peft_model_state_dict

    folder = download.fetch_folder(source)
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise MissingFileError(f"llm_lora: {source} holds no {' or '.join(WEIGHT_FILES)}")
    state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in weights.open_state(path).items()}
    known = len(embedding_weight(model))
    for name in vocabulary_names(model, state):
        sizes = [known if 0 < size - known <= MOST_ADDED else size for size in state[name].shape]
        state[name] = resized(state[name], sizes)
    try:
        report: Any = set_peft_model_state_dict(model, state)
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"llm_lora: {path} does not fit the language model: {reason}") from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = sorted(trained & set(report.missing_keys))
    for names, what in ((report.unexpected_keys, "has tensors that have no place in"), (missing, "lacks tensors of")):
        if names:
            raise InputError(f"llm_lora: {path} {what} the language model's adapters: {', '.join(names[:3])}")


def write_adapter(model: Any, folder: Path, *, num_tokens: int) -> None:
    """Write the adapters of a model of transformers, and what else was trained, as peft's `PeftModel.from_pretrained`
    reads them, for a vocabulary of `num_tokens` rows.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    config.init_lora_weights = True  # some ways to start change the frozen weights, which are written as they are
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    known = len(embedding_weight(model))
    for name in vocabulary_names(model, state):
        state[name] = resized(state[name], [num_tokens if size == known else size for size in state[name].shape])
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    state = {f"{PEFT_PREFIX}{name}": tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(state, folder / WEIGHT_FILES[0], metadata={"format": "pt"})


def embedding_weight(model: Any) -> Tensor:
    """Return the embeddings (V,E) of a model of transformers."""
    return model.get_input_embeddings().weight


def vocabulary_names(model: Any, state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the embeddings' and the output layer's adapters."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if any(module is end for end in ends))
    return [name for name in state if name.startswith(prefixes)]


def resized(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the tensor cut to sizes, or lengthened by its mean, as a vocabulary's added rows are."""
    for dim, size in enumerate(sizes):
        if tensor.shape[dim] > size:
            tensor = tensor.narrow(dim, 0, size)
        elif tensor.shape[dim] < size:
            shape = [size - tensor.shape[dim] if d == dim else n for d, n in enumerate(tensor.shape)]
            tensor = torch.cat([tensor, tensor.mean(dim=dim, keepdim=True).expand(shape)], dim=dim)
    return tensor
