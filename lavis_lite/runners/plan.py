"""What is decided before the first step: how long the run is, and in which precision."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lavis_lite.common.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a run is, in iterations of `global_batch` samples: `inner` between two validations, `total` in all.

    `mixture` has the training sets, each with its number of samples and its share of the iterations in words.
    """

    inner: int
    total: int
    global_batch: int
    mixture: dict[str, str]

    @property
    def num_epochs(self) -> int:
        """Number of (inner) epochs; the last may be shorter."""
        return math.ceil(self.total / self.inner)

    def bounds(self, epoch: int) -> tuple[int, int]:
        """First iteration of (inner) epoch `epoch`, and the one after its last."""
        return epoch * self.inner, min((epoch + 1) * self.inner, self.total)

    def window(self, step: int, *, accumulate: int) -> tuple[int, bool]:
        """Size of the accumulation window that iteration `step` is in, and whether `step` closes it.

        Windows start anew with each (inner) epoch; its last one may be shorter, so no gradient crosses an epoch's end.
        """
        first, end = self.bounds(step // self.inner)
        start = step - (step - first) % accumulate
        size = min(accumulate, end - start)
        return size, step == start + size - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return asdict(self)


def resolve_precision(run: Any, device: torch.device) -> torch.dtype:
    """The autocast type of `run`. `auto`: fp32 on CPU; on a GPU bf16 where it has it, else fp16. `amp: False` is fp32.

    Raises:
        ValueError: an unknown name, or fp16 on CPU.
    """
    name = "fp32" if run.amp is False else run.precision
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        name = "fp32"
    if name not in DTYPES:
        raise InputError(f"run.precision={name!r} is unknown: use auto, {', '.join(DTYPES)}")
    if name == "fp16" and device.type == "cpu":
        raise InputError("run.precision=fp16 needs a GPU: use bf16 or fp32 (or auto) on CPU")
    return DTYPES[name]
