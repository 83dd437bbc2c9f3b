"""The global random generators of Python, NumPy and torch: how they are seeded, and how their states are kept."""

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lavis_lite.common import dist


def hash_seed(*parts: object) -> int:
    """Return 63 bits from the text of `parts`, the same on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed all generators, on the CPU and on CUDA devices."""
    seed_sample(seed)
    torch.manual_seed(seed)


def seed_rank(seed: int, *, step: int = 0) -> None:
    """Seed each rank differently (dropout must differ between ranks), from the run's seed and the step."""
    seed_everything(hash_seed(seed, "rank", dist.rank(), step))


def seed_sample(seed: int) -> None:
    """Seed the CPU generators only: torch.manual_seed would also queue a call for CUDA each time."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def cpu_state() -> tuple[Any, Any, torch.Tensor]:
    """Return the states of the CPU generators: Python's, NumPy's and torch's."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def restore_cpu(python: Any, numpy: Any, cpu: torch.Tensor) -> None:
    """Restore what `cpu_state` returned."""
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the CPU generators after the body, which may seed them as it likes."""
    state = cpu_state()
    try:
        yield
    finally:
        restore_cpu(*state)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the CPU generators and of `device`'s, in types that a `weights_only` load accepts."""
    python, (name, keys, position, has_gauss, gauss), cpu = cpu_state()
    return {
        "python": python,
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": cpu,
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    version, keys, gauss = state["python"]
    name, array, *rest = state["numpy"]
    numpy_state = (name, np.array(array, dtype=np.uint32), *rest)
    restore_cpu((version, tuple(keys), gauss), numpy_state, state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
