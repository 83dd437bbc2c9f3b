"""Precisions by name, and the autocast that a run computes in."""

import contextlib
import functools
import logging
import time
from pathlib import Path

import torch

from lavis_lite.common.errors import InputError

logger = logging.getLogger(__name__)

LARGEST_ERROR = 1e-6
"""Of a float32 product (about 3e-7); rounding to bf16 makes it 2e-3."""
CLEAR_GAIN = 1.3
"""In time, beyond what two measurements of the same differ by."""
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
    if name == "bf16" and device.type == "cpu" and bf16_gain() < 1 / CLEAR_GAIN:
        warn_of_slow_bf16()
    return PRECISIONS[name]


@functools.cache
def cpu_description() -> str:
    """Return the system's description of its first CPU; nothing on systems other than Linux."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").partition("\n\n")[0] if path.is_file() else ""


@functools.cache
def bf16_gain() -> float:
    """Return how many times the rate of float32 this CPU multiplies matrices at in bf16, as measured.

    Note: what a CPU says of itself does not tell. With AVX-512's instructions for bf16 but without AMX, some take twice
    the time of float32.
    """
    factors = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    taken = {dtype: [_time_of_product(factor) for _ in range(5)] for dtype, factor in factors.items()}
    return min(taken[torch.float32]) / min(taken[torch.bfloat16])


def _time_of_product(factor: torch.Tensor) -> float:
    start = time.perf_counter()
    factor @ factor
    return time.perf_counter() - start


def has_fast_bf16() -> bool:
    """Return whether matrix products in bf16 clearly take less time than in float32 on this CPU."""
    return bf16_gain() > CLEAR_GAIN


@functools.cache
def use_faster_products() -> bool:
    """Let oneDNN compute float32 matrix products on AMD's CPUs with AVX-512, which MKL does not use there, and return
    whether it does.

    Note: torch offers oneDNN only together with the right to round to bf16. Where it does that, by AMX, this changes
    nothing: the error of a product is measured first.
    """
    if "AuthenticAMD" not in cpu_description() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # mypy does not see it
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    if product_error() < LARGEST_ERROR:
        return True
    settings.fp32_precision = before
    return False


def product_error() -> float:
    """Return the relative error of a float32 matrix product on this CPU, as a root mean square."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())


@functools.cache
def warn_of_slow_bf16() -> None:
    """Say once that this CPU takes longer in bf16 than in float32."""
    logger.warning(
        f"run.precision: matrix products in bf16 take {1 / bf16_gain():.1f} times as long as in fp32 on this CPU; use "
        "run.precision=fp32"
    )


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which a forward pass computes in `dtype`; that of float32 does nothing."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if enabled else torch.bfloat16, enabled=enabled)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast; a device such as `meta` has none."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else contextlib.nullcontext()
