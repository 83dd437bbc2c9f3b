"""Facts about the machine: the peak rate of GPUs, cores, memory."""

import os
import re
import sys
from dataclasses import dataclass

from lavis_lite.common.errors import InputError, did_you_mean

GIB = 2.0**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by the vendor's data sheet."""

    name: str
    """A part of what the driver calls it."""
    tflops: float
    """Dense rate of matrix products in 16 bits, added up in 32."""
    gib: float
    """Memory that a process can use."""
    has_bf16: bool = True


GPUS = (
    Gpu("B200", 2250.0, 178.0),
    Gpu("H200", 989.0, 139.0),
    Gpu("H100", 989.0, 79.0),
    Gpu("A100-SXM4-40GB", 312.0, 39.0),
    Gpu("A100", 312.0, 79.0),
    Gpu("A6000", 155.0, 47.0),
    Gpu("L40S", 362.0, 44.0),
    Gpu("L4", 121.0, 22.0),
    Gpu("RTX 4090", 165.0, 23.5),
    Gpu("RTX 3090", 71.0, 23.5),
    Gpu("T4", 65.0, 14.5, has_bf16=False),
    Gpu("V100", 125.0, 31.7, has_bf16=False),
    Gpu("MI300X", 1307.0, 191.0),
)
"""In this order: the first whose name is a part of the driver's is it."""


def known_peak(name: str) -> float | None:
    """Return the dense TFLOP/s in 16 bits of a GPU by the driver's name; None if it is not in the table.

    An L40 is not an L4, nor an RTX A1000 an A100: no digit follows.
    """
    return next((gpu.tflops for gpu in GPUS if re.search(rf"{re.escape(gpu.name)}(?!\d)", name)), None)


def named_gpu(name: str) -> Gpu:
    """Return a GPU of the table by its name, whatever its case; a part such as `4090` is enough.

    Raises:
        InputError: none has the name, or the part is of several.
    """
    known = {gpu.name: gpu for gpu in GPUS}
    exact = [gpu for gpu in GPUS if gpu.name.casefold() == name.casefold()]
    found = exact or [gpu for gpu in GPUS if name.strip() and name.casefold() in gpu.name.casefold()]
    if not found:
        raise InputError(f"--gpu: {name!r} is not in the table. {did_you_mean(name, known, limit=len(known))}")
    if len(found) > 1:
        raise InputError(
            f"--gpu: {name!r} is a part of several names: {', '.join(gpu.name for gpu in found)}; name one"
        )
    return found[0]


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def process_peak_gib() -> float:
    """Return the peak resident memory of this process so far."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
