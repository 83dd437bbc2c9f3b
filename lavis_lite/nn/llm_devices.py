"""A language model over several devices, for inference (`model.llm_device_map`).

accelerate adds hooks that move each layer's inputs to the layer's device, and the model's output to that of its inputs.
Keys and values stay on the device of their layer. No layer is divided, and nothing is offloaded.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lavis_lite.common.errors import InputError, MissingPackageError, SettingError, did_you_mean

KEY = "model.llm_device_map"
NOT_MOVED = ["past_key_values", "cache_params"]
"""Arguments and outputs that a hook leaves where they are."""
NOT_COMPUTING = {"cpu", "disk"}
"""Devices from which accelerate would offload weights."""


def spread(model: nn.Module, device_map: str | Mapping[str, Any]) -> None:
    """Move each part of a language model to its device: with `auto` to the GPUs by the free memory, else as a mapping
    from names of modules to devices says.

    Raises:
        MissingPackageError: accelerate is not installed.
        InputError: the weights are quantized or do not fit, or the mapping names unknown modules or devices, leaves
            out weights, or divides a layer or a tied tensor.
    """
    try:
        from accelerate import dispatch_model
        from accelerate.utils import get_balanced_memory
    except ImportError as error:
        raise MissingPackageError(f"{KEY}: {device_map}: `pip install accelerate`") from error
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise SettingError(KEY, "quantized weights stay on one GPU; leave it or llm_quantization out")
    if isinstance(device_map, Mapping):
        places = _checked(model, device_map)
    elif device_map != "auto":
        raise SettingError(KEY, f"must be auto, or a mapping from modules to devices, got {device_map!r}")
    elif not torch.cuda.is_available():
        raise SettingError(KEY, "auto needs a GPU, and this machine has none; leave it out")
    else:
        places = divided(model, get_balanced_memory(model, no_split_module_classes=layer_classes(model)))
    dispatch_model(model, places, main_device=next(iter(places.values())), skip_keys=NOT_MOVED, force_hooks=True)


def divided(model: nn.Module, max_memory: Mapping[int | str, int]) -> dict[str, Any]:
    """Return the device of each part of a model, of any device itself, for the bytes of memory of each device.

    Raises:
        InputError: the weights do not fit.
    """
    from accelerate import infer_auto_device_map

    memory = {device: size for device, size in max_memory.items() if device not in NOT_COMPUTING}
    places: dict[str, Any] = infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=layer_classes(model)
    )
    if NOT_COMPUTING & set(map(str, places.values())):
        size = sum(parameter.nbytes for parameter in model.parameters())
        given = ", ".join(f"{device}: {number / 2**30:,.1f} GiB" for device, number in memory.items())
        raise InputError(f"{KEY}: {size / 2**30:,.1f} GiB of weights do not fit ({given}); use more GPUs")
    return places


def layer_classes(model: nn.Module) -> list[str]:
    """Return the names of the classes of a model's layers."""
    return sorted({type(one).__name__ for one in model.modules() if isinstance(one, GradientCheckpointingLayer)})


def _checked(model: nn.Module, device_map: Mapping[str, Any]) -> dict[str, torch.device]:
    """Return a mapping with devices of torch; InputError as `spread`."""
    modules, gpus = dict(model.named_modules()), range(torch.cuda.device_count())
    known = {"cpu": torch.device("cpu")} | {str(i): torch.device("cuda", i) for i in gpus}
    known |= {f"cuda:{i}": torch.device("cuda", i) for i in gpus}
    layers = [name for name, one in modules.items() if isinstance(one, GradientCheckpointingLayer)]
    for name, value in device_map.items():
        if name not in modules:
            raise SettingError(KEY, f"the language model has no module {name!r}. {did_you_mean(name, modules)}")
        if str(value) not in known:
            raise SettingError(KEY, f"{name!r}: unknown device {value!r}. {did_you_mean(value, known)}")
        if any(name.startswith(f"{layer}.") for layer in layers):
            raise SettingError(KEY, f"{name} is a part of a layer, which must be on one device; name the layer")
    places = {name: known[str(value)] for name, value in device_map.items()}
    if len({device.type for device in places.values()}) > 1:
        raise SettingError(KEY, "names GPUs and the CPU, which would offload weights; name GPUs only")
    for outer, inner in itertools.permutations(places, 2):  # accelerate would give parts of `inner` two devices
        if _covers(outer, inner):
            raise SettingError(KEY, f"{outer!r} contains {inner!r}; name the other modules in {outer!r} one by one")
    owners: dict[nn.Parameter, tuple[str, torch.device]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        device = next((places[place] for place in places if _covers(place, name)), None)
        if device is None:
            raise SettingError(KEY, f"has no device for {name}; name its module")
        first, its_device = owners.setdefault(parameter, (name, device))
        if device != its_device:
            raise SettingError(KEY, f"{first} and {name} are one tensor; give both the same device")
    return places


def _covers(place: str, name: str) -> bool:
    return not place or f"{name}.".startswith(f"{place}.")
