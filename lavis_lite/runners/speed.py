"""Speed and memory of a training between two log lines. Nothing here waits for the device."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lavis_lite.common import dist
from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.hardware import GIB, known_peak, process_peak_gib
from lavis_lite.models.protocols import CountsTokens


def peak_tflops(run: RunConfig, device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak rate that MFU is relative to: `run.peak_tflops`, or what is known of a GPU that computes in 16
    bits; None if it is not known.
    """
    if run.peak_tflops is not None or device.type != "cuda" or dtype == torch.float32:
        return run.peak_tflops
    return known_peak(torch.cuda.get_device_name(device))


class Speed:
    """Times the steps since the last log line. `tokens_per_s` is of models that count the tokens that they read;
    `mfu` (model FLOPs utilisation) is there where the device's peak is known.

    The floating-point operations are those of an epoch's first step: matrix products, convolutions and attention, as
    they are executed, which includes recomputed activations.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, peak_tflops: float | None = None) -> None:
        self.device, self.peak_tflops = device, peak_tflops
        self.counter = model if isinstance(model, CountsTokens) else None
        self.step_flops: float | None = None
        """Of this process, per step."""
        self.begin()

    def begin(self) -> None:
        """Start anew: what comes before, such as a validation, does not count."""
        self.started, self.num_steps, self.seconds_waited = time.perf_counter(), 0, 0.0
        self.tokens_before = self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that the model has read so far; 0 if it does not count them."""
        return 0 if self.counter is None else self.counter.num_text_tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in the body as waiting for data."""
        begun = time.perf_counter()
        yield
        self.seconds_waited += time.perf_counter() - begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time in the body out."""
        begun = time.perf_counter()
        yield
        self.started += time.perf_counter() - begun

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the operations of an epoch's first step, if the peak is known."""
        if self.peak_tflops is None or self.step_flops is not None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.step_flops = counter.get_total_flops()

    @property
    def seconds(self) -> float:
        """Time since `begin`."""
        return max(time.perf_counter() - self.started, 1e-9)

    def steps_per_s(self) -> float:
        """Return the rate of steps."""
        return max(self.num_steps, 1) / self.seconds

    def values(self, *, global_batch: int) -> dict[str, float]:
        """Return the columns of a log row."""
        seconds, steps_per_s = self.seconds, self.steps_per_s()
        values = {"samples_per_s": round(steps_per_s * global_batch, 2)}
        if num_tokens := self.num_tokens - self.tokens_before:
            values["tokens_per_s"] = round(num_tokens * dist.world_size() / seconds, 1)
        values["data_wait"] = round(min(self.seconds_waited / seconds, 1.0), 4)
        if self.step_flops is not None and self.peak_tflops is not None:
            values["mfu"] = float(f"{self.step_flops * steps_per_s / (self.peak_tflops * 1e12):.4g}")
        if self.device.type == "cuda":
            values["max_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / GIB
        else:
            values["max_resident_gb"] = process_peak_gib()
        return values


UNITS = {
    "samples_per_s": "{:.4g} samples/s",
    "tokens_per_s": "{:.4g} tokens/s",
    "data_wait": "data wait {:.0%}",
    "mfu": "MFU {:.1%}",
    "max_memory_gb": "{:.3g} GB",
    "max_resident_gb": "{:.3g} GB",
}
"""How the console shows the columns of `Speed.values`."""
