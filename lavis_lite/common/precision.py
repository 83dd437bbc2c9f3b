"""Precisions by name, and the autocast that a run computes in."""

import contextlib
import functools
import logging

import torch

from lavis_lite.common.errors import InputError

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the autocast type that `run.precision` names. `auto`: fp32 on a CPU; on a GPU bf16 where it has it, else
    fp16.

    Raises:
        InputError: an unknown name, or fp16 on a CPU.
    """
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "fp32" if device.type != "cuda" else "bf16" if has_bf16 else "fp16"
    if name not in PRECISIONS:
        raise InputError(f"run.precision: {name!r} is unknown; use auto, {', '.join(PRECISIONS)}")
    if name == "fp16" and device.type == "cpu":
        raise InputError("run.precision: fp16 needs a GPU; use bf16 or fp32 (or auto) on a CPU")
    if name == "bf16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        warn_of_emulation()
    return PRECISIONS[name]


@functools.cache
def warn_of_emulation() -> None:
    """Say once that this CPU computes bf16 without instructions for it."""
    logger.warning(
        "run.precision: this CPU has no AVX-512, so bf16 is many times slower here than fp32; use run.precision=fp32"
    )


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which a forward pass computes in `dtype`; that of float32 does nothing."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if enabled else torch.bfloat16, enabled=enabled)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast; a device such as `meta` has none."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else contextlib.nullcontext()
