"""Facts about the machine: the peak rate of GPUs, cores, memory."""

import os
import sys

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "A6000": 155.0}
"""Dense bf16, by the vendor's data sheets, by a part of the GPU's name."""
GIB = 2.0**30


def known_peak(name: str) -> float | None:
    """Return the dense bf16 TFLOP/s of a GPU by its name; None if it is not in the table."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def process_peak_gib() -> float:
    """Return the peak resident memory of this process so far."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
