"""Memory of a training step by part: a count of the model's tensors, without computing.

Weights, also quantized ones, gradients and AdamW's two moments are exact. Activations are what autograd keeps for the
backward pass, counted on the meta device for two samples in the run's precision: attention there keeps its
probabilities, which the fused kernels of GPUs do not, and temporary buffers are not counted.
"""

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lavis_lite.common import dist
from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError
from lavis_lite.common.hardware import Gpu
from lavis_lite.common.precision import PRECISIONS, resolve_precision
from lavis_lite.nn.quantization import saved_by_quantization

GIB = 2**30
SAMPLES = 2
ADVICE = (
    "lower run.batch_size_train (and raise run.accum_grad_iters by the same factor), recompute activations "
    "(model.vit_grad_ckpt or model.use_grad_checkpoint, model.llm_grad_checkpoint), freeze parts (model.freeze_vit), "
    "learn adapters only (model.llm_lora), or load the language model in 4 bits (model.llm_quantization)"
)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a training step on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    """None where they cannot be counted."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)


def training_memory(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    batch_size: int,
    dtype: torch.dtype,
    quantization: str | None = None,
) -> Memory:
    """Return the memory of a step of `batch_size` samples like those of `batch`, which has one; all are on meta."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    try:
        activations = saved_bytes(model, repeated(batch, SAMPLES), dtype=dtype) * batch_size // SAMPLES
    except (RuntimeError, NotImplementedError):  # a value of a tensor is asked for, which the meta device has not
        activations = None
    return Memory(
        weights=weight_bytes(model, quantization),
        gradients=4 * trainable,
        optimizer=8 * trainable,
        activations=activations,
    )


def weight_bytes(model: nn.Module, quantization: str | None = None) -> int:
    """Return the bytes of parameters and buffers, with the language model's layers in `int4` or `int8` if so asked."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    count = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if quantization is None:
        return count
    llms = [module for module in model.children() if isinstance(module, PreTrainedModel)]
    return count - sum(saved_by_quantization(llm, quantization) for llm in llms)


def repeated(batch: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Return a batch of the same samples several times; values that are not of single samples stay."""
    return {
        key: torch.cat([value] * times)
        if isinstance(value, Tensor) and value.dim()
        else value * times
        if isinstance(value, list)
        else value
        for key, value in batch.items()
    }


def saved_bytes(model: nn.Module, batch: Mapping[str, Any], *, dtype: torch.dtype) -> int:
    """Return the bytes that autograd keeps of a forward pass in training, the model's own tensors apart."""
    model = copy.deepcopy(model).to(dtype).train()
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("eager")  # others look whether a mask is all ones
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), UnknownIsFalse():
        model(dict(batch))
    return sum(storage.nbytes() for storage in saved.values())


class UnknownIsFalse(TorchFunctionMode):
    """Take a condition on the meta device as false: T5 asks whether a mask is all ones, and keeps it if it is not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


def memory_lines(cfg: Config, model: nn.Module, batch: Mapping[str, Any], gpu: Gpu | None = None) -> list[str]:
    """Return the dry run's lines about the memory of a training step on a GPU, or on this machine's device where it is
    there.
    """
    dtype, device, capacity = _named(cfg, gpu) if gpu is not None else _present(cfg)
    kind, size = cfg.model.get("llm_quantization"), cfg.run.batch_size_train
    memory = training_memory(model, batch, batch_size=size, dtype=dtype, quantization=kind)
    activations = "activations not counted for this model"
    if memory.activations is not None:
        name = str(dtype).removeprefix("torch.")
        activations = f"activations about {_gib(memory.activations)} ({cfg.run.batch_size_train} samples, {name})"
    parts = f"weights {_gib(memory.weights)}, gradients {_gib(memory.gradients)}, optimizer {_gib(memory.optimizer)}"
    lines = [f"memory      {parts}, {activations}; in all about {_gib(memory.total)} per process"]
    if memory.total > capacity:
        lines.append(f"memory      more than {device} has ({_gib(capacity)}): {ADVICE}")
    elif gpu is not None:
        lines.append(f"memory      {device} has {_gib(capacity)}")
    return lines


def _named(cfg: Config, gpu: Gpu) -> tuple[torch.dtype, str, float]:
    """Return the run's precision on a GPU, the GPU's name and its memory."""
    auto = torch.bfloat16 if gpu.has_bf16 else torch.float16
    return PRECISIONS.get(cfg.run.precision, auto), gpu.name, gpu.gib * GIB


def _present(cfg: Config) -> tuple[torch.dtype, str, float]:
    """Return the run's precision, its device and the device's memory; where this machine lacks the device, the
    precision is that of a current GPU and the memory has no bound.
    """
    try:
        device = dist.resolve_device(cfg.run.device)
        return resolve_precision(cfg.run.precision, device), str(device), _capacity(device)
    except InputError:
        return PRECISIONS.get(cfg.run.precision, torch.bfloat16), cfg.run.device, math.inf


def _capacity(device: torch.device) -> int:
    """Return the memory of a device of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(count: float) -> str:
    return f"{count / GIB:,.2f} GiB"
