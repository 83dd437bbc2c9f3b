"""Adapters (LoRA, Hu et al. 2021) in a language model or Q-Former, by peft: training, merging, peft's own folders.

Note: `modules_to_save` and `bias` of peft's LoraConfig train whole parts of the language model. All trained tensors are
float32, so that such a model must be float32 itself.
"""

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lavis_lite.common import checkpoint
from lavis_lite.common.config.adapters import lora_config
from lavis_lite.common.errors import AdapterError, InputError, MissingFileError
from lavis_lite.common.sources import download, weights
from lavis_lite.common.sources.weights import LazyState, Reader

logger = logging.getLogger(__name__)

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE_PARTS = ("modules_to_save", "trainable_token_indices")
"""Keys of LoraConfig that train parts of the language model itself."""
PEFT_PREFIX = "base_model.model."
WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.default|token_adapter)(?=\.)")
"""Between a layer that peft has wrapped and its weights."""
MOST_ADDED = 64
"""Rows that a vocabulary may have more than the adapters' own: Hugging Face's image token, rounded up."""


def trains_whole_parts(lora: Mapping[str, Any] | None) -> bool:
    """Return whether parts of the language model itself are trained beside the adapters."""
    return lora is not None and (lora.get("bias", "none") != "none" or any(lora.get(key) for key in WHOLE_PARTS))


def add_lora(model: nn.Module, lora: Mapping[str, Any], *, section: str = "model.llm_lora") -> None:
    """Put adapters into the model's layers; only what peft trains is then trained, in float32. `section` is the key of
    the settings, for messages.

    Raises AdapterError for `target_modules` or `modules_to_save` that the model does not have.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    config = lora_config(lora, section=section)
    known = {
        "target_modules": _names(model, nn.Linear, nn.Embedding, Conv1D),
        "modules_to_save": _names(model, nn.Module),
    }
    try:
        inject_adapter_in_model(config, model)
    except (ValueError, TypeError, IndexError) as error:  # the last for a token that the vocabulary does not have
        is_name = "target" in str(error).lower()
        advice = f": set target_modules to some of {', '.join(known['target_modules'])}" if is_name else ""
        raise AdapterError(f"{section}: {str(error).rstrip('.')}{advice}") from error
    for key, kind in (("target_modules", BaseTunerLayer), ("modules_to_save", AuxiliaryTrainingWrapper)):
        found = [f".{name}" for name, module in model.named_modules() if isinstance(module, kind)]
        wanted = lora.get(key) or ()
        for name in () if isinstance(wanted, str) else wanted:  # a text is a pattern, which peft checks
            if not any(other.endswith(f".{name}") for other in found):
                has = ", ".join(known[key])
                raise AdapterError(f"{section}.{key}: the model has no {name}; it has {has}")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _names(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Return the last parts of the names of a model's modules of some kinds."""
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds)}
    return sorted(name for name in found if name and not name.isdigit())


def into_wrapped(state: LazyState, own: Mapping[str, Tensor]) -> LazyState:
    """Return the state of a model without adapters under the names of its tensors in `own`, a model with them."""
    wrapped: dict[str, list[str]] = {}
    for name in own:
        plain = WRAPPED.sub("", name)
        if plain != name:
            wrapped.setdefault(plain, []).append(name)
    readers: dict[str, Reader] = {}
    for name, read in state.readers.items():
        names = [name] if name in own else wrapped.get(name, [name])
        readers |= {inner: read for inner in names if inner == name or inner not in state}
    return LazyState(readers)


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
def plain_state_dict(model: nn.Module, *, merge: bool = True, keep: str | None = None) -> dict[str, Tensor]:
    """Return the model's tensors under the names of a model without adapters, these merged or left out; those of the
    layers whose names begin with `keep` are left out.

    The model is not changed; only what is merged is copied.
    """
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    if not has_adapters(model):
        return state
    for prefix, layer in _wrapped(model):
        merges = merge and not (keep and prefix.startswith(keep))
        plain = plain_state_dict(_merged(layer) if merges else _without(layer), merge=merges)
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
    children = dict(layer.named_children())
    if "original_module" in children:
        return children["original_module"]
    return children.get("token_adapter", layer).get_base_layer()


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
