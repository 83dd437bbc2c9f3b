"""Expected rate of a training on a named GPU: the operations of a step, counted on the meta device."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lavis_lite.cli.memory import SAMPLES, UnknownIsFalse, repeated
from lavis_lite.common import dist
from lavis_lite.common.config.config import Config
from lavis_lite.common.hardware import Gpu
from lavis_lite.runners.plan import Plan

ASSUMED_MFU = 0.4
"""Share of a GPU's peak rate that large matrix products of a training reach; small batches and models reach less."""
LAUNCH = 0.02
"""Seconds that the host takes to launch the kernels of a batch, forward and backward; an estimate."""


def sample_flops(model: nn.Module, batch: Mapping[str, Any]) -> float | None:
    """Return the floating-point operations per sample of a training step, forward and backward; both are on meta, and
    the batch has one sample. None for a model that asks for a tensor's value, which the meta device does not have.
    """
    model = copy.deepcopy(model).float().train()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("eager")  # others look whether a mask is all ones
    try:
        with FlopCounterMode(display=False) as counter, UnknownIsFalse():
            model(repeated(batch, SAMPLES))["loss"].backward()
    except (RuntimeError, NotImplementedError):
        return None
    return counter.get_total_flops() / SAMPLES


def throughput_lines(cfg: Config, model: nn.Module, batch: Mapping[str, Any], plan: Plan, gpu: Gpu) -> list[str]:
    """Return the dry run's lines about the rate of a training on as many such GPUs as it has processes."""
    if cfg.run.precision == "fp32":
        return [f"throughput  {gpu.name}: only its rate in 16 bits is known; set run.precision to auto"]
    flops = sample_flops(model, batch)
    if flops is None:
        return ["throughput  operations not counted for this model"]
    peak = cfg.run.peak_tflops or gpu.tflops
    rate = ASSUMED_MFU * peak * 1e12 / flops
    seconds = plan.total * plan.sampler.global_batch / dist.world_size() / rate
    size = f"{flops / 1e12:.3g} TFLOP" if flops >= 1e11 else f"{flops / 1e9:.3g} GFLOP"
    if seconds / plan.total / cfg.run.accum_grad_iters < LAUNCH:
        problem = f"a batch ({size} per sample) takes less time than the {LAUNCH * 1e3:.0f} ms of launching its kernels"
        return [f"throughput  {gpu.name}: {problem}, so its rate does not follow from its operations"]
    return [
        f"throughput  {gpu.name}: about {float(f'{rate:.2g}'):,.7g} samples/s per process ({size} per sample at "
        f"{ASSUMED_MFU:.0%} of {peak:,.4g} TFLOP/s); all {plan.total:,} steps take {duration(seconds)}, longer if data "
        "come slower"
    ]


def duration(seconds: float) -> str:
    """Return a duration to two digits, in the unit that suits it."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):,.7g} {unit}"
    return f"{float(f'{seconds:.2g}'):,.7g} seconds"
