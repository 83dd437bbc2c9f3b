"""Weak and strong scaling of training steps over gloo processes, with what each sends; and arithmetic for many GPUs.

    python benchmarks/scaling.py                    # BLIP-2's first stage at tiny size on 1, 2 and 4 processes
    python benchmarks/scaling.py --arithmetic       # full size, 8 to 1,024 GPUs: what bounds a step

Weak: each process has `--batch` samples. Strong: all processes together have them. Bytes are those that one process
sends per step, by formula (`traffic`) and as counted. The processes of a CPU share its cores: only the bytes say
something about GPUs.
"""

import argparse
import functools
import json
import os
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flops
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
from blip import TEXTS
from blip2_jobs import build, build_with_llm
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lavis_lite.common import dist
from lavis_lite.models.blip2.llm import Blip2LLM

GPU_FLOPS = 989e12 * 0.4
"""An H200's dense bf16 rate at 40 percent utilisation."""
NODE, NODE_BYTES, NET_BYTES = 8, 450e9, 50e9
"""GPUs of a node; bytes per second that a GPU sends within it (NVLink 4) and beyond it (one 400 Gb/s port)."""
SETTINGS: dict[str, Any] = {"tiny": True, "depth": None, "image_size": 48, "dtype": "fp32", "device": "cpu"}


class Traffic(NamedTuple):
    """Bytes that one process sends per step, by rings: of an all-reduced tensor 2 (N-1)/N, of its own gathered one N-1
    times its size.
    """

    gradients: float
    """All-reduced, as DDP and FSDP's reduction and gathering do; FSDP gathers blocks once more."""
    features: float = 0.0
    """Gathered for the contrast."""
    negatives: float = 0.0
    """Image tokens of drawn negatives, forward and backward; (N-1)/N of them are another process's."""


def traffic(model: Any, *, batch: int, world: int, token_bytes: int = 4) -> Traffic:
    """Return the traffic of a step of BLIP-2's first or second stage with `batch` samples per process."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    gradients = 2 * (world - 1) / world * 4 * trained
    if isinstance(model, Blip2LLM):
        return Traffic(gradients)
    num_queries, width = model.query_tokens.shape[1], model.vision_proj.out_features
    features = (world - 1) * 4 * batch * (num_queries + 1) * width
    tokens = model.visual_encoder.pos_embed.shape[1] * model.visual_encoder.width
    return Traffic(gradients, features, 2 * (world - 1) / world * batch * tokens * token_bytes)


@contextmanager
def counted(model: nn.Module, found: Counter[str]) -> Iterator[None]:
    """Add to `found` the bytes that this process sends, of floating-point numbers."""
    world, rank = dist.world_size(), dist.rank()
    gather, exchange = torch_dist.all_gather_into_tensor, torch_dist.all_to_all_single

    def gathering(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_floating_point():
            found["features"] += (world - 1) * tensor.nbytes
        return gather(output, tensor, *args, **kwargs)

    def exchanging(output: Tensor, tensor: Tensor, num_in: list[int], num_out: list[int]) -> Any:
        if (row := tensor.nbytes // max(len(tensor), 1)) >= 1 and len(tensor):
            found["exchanged"] += row * sum(number for other, number in enumerate(num_out) if other != rank)
        return exchange(output, tensor, num_in, num_out)

    def reducing(state: Any, bucket: torch_dist.GradBucket) -> torch.futures.Future[Tensor]:
        found["gradients"] += 2 * (world - 1) * bucket.buffer().nbytes // world
        return allreduce_hook(torch_dist.group.WORLD, bucket)

    if world > 1:
        model.register_comm_hook(None, reducing)
    torch_dist.all_gather_into_tensor, torch_dist.all_to_all_single = gathering, exchanging
    try:
        yield
    finally:
        torch_dist.all_gather_into_tensor, torch_dist.all_to_all_single = gather, exchange


def steps(rank: int, world: int, port: int, batch: int, num_steps: int, folder: str) -> None:
    """Take steps on one process, and write seconds per step, formula and count to `<rank>.json`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init("cpu")
    torch.manual_seed(0)
    model = build("blip2", argparse.Namespace(**SETTINGS)).train()
    parallel, _ = dist.data_parallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    samples = {"image": torch.randn(batch, 3, 48, 48), "text_input": [TEXTS[i % 2] for i in range(batch)]}
    seconds, found = [], Counter[str]()
    with counted(parallel, found):
        for _ in range(num_steps + 1):
            started = time.perf_counter()
            parallel(samples)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
    sent = {name: value / (num_steps + 1) for name, value in found.items()}
    formula = traffic(model, batch=batch, world=world)._asdict()
    result = {"seconds": statistics.median(seconds[1:]), "formula": formula, "counted": sent}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.shutdown()


def measure(world: int, batch: int, num_steps: int) -> dict[str, Any]:
    """Return what rank 0 of `world` processes found; its seconds are the slowest rank's."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(steps, args=(world, port, batch, num_steps, folder), nprocs=world)
        results = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    return {**results[0], "seconds": max(result["seconds"] for result in results)}


def measured_rows(worlds: list[int], batch: int, num_steps: int) -> Iterator[dict[str, Any]]:
    """Yield a row per kind and number of processes."""
    for kind in ("weak", "strong"):
        alone = None
        for world in worlds:
            own = batch if kind == "weak" else batch // world
            result = measure(world, own, num_steps)
            rate = own * world / result["seconds"]
            alone = alone or rate / world
            yield {
                "kind": kind,
                "processes": world,
                "batch": own,
                "per_s": rate,
                "efficiency": rate / world / alone,
            } | {key: result[key] for key in ("formula", "counted")}


class Stage(NamedTuple):
    """A stage of pretraining at full size, on the meta device."""

    model: Any
    flops_per_image: float
    batch: int
    """Samples per GPU."""


@functools.cache
def stages() -> dict[str, Stage]:
    """Return BLIP-2's stages with batches per GPU near the paper's (2,320 and 1,920 on 16 GPUs)."""
    arguments = argparse.Namespace(**SETTINGS | {"tiny": False, "image_size": 224, "dtype": "bf16", "device": "meta"})
    first, second = build("blip2", arguments), build_with_llm("opt", arguments)
    return {
        "stage 1": Stage(first, flops.stage1_step(first, 32), 144),
        "stage 2, OPT-2.7B": Stage(second, flops.stage2_step(second, 32, 32), 120),
    }


def arithmetic(name: str, world: int) -> list[str]:
    """Return the cells of a row: seconds of computing and of sending per step, and the memory of the similarities."""
    stage = stages()[name]
    sent = traffic(stage.model, batch=stage.batch, world=world, token_bytes=2)
    rate = NODE_BYTES if world <= NODE else NET_BYTES
    compute = stage.batch * stage.flops_per_image / GPU_FLOPS
    gathered = (sent.features + sent.negatives) / rate
    num_queries = stage.model.query_tokens.shape[1]
    similarities = 2 * 4 * stage.batch**2 * world * num_queries if sent.features else 0
    cells = [f"{1e3 * seconds:.0f}" for seconds in (compute, sent.gradients / rate, gathered)]
    return [name, f"{world:,}", f"{stage.batch * world:,}", *cells, f"{similarities / 2**30:.1f}"]


def arithmetic_table() -> list[str]:
    """Return the table of docs/scale.md."""
    heads = ["stage", "GPUs", "global batch", "computing, ms", "gradients, ms", "features and negatives, ms"]
    rows = [arithmetic(name, world) for name in stages() for world in (8, 64, 256, 1024)]
    lines = [[*heads, "similarities, GiB"], ["---"] * 7, *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def main(argv: list[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arithmetic", action="store_true")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args(argv)
    if arguments.arithmetic:
        print("\n".join(arithmetic_table()))
        return
    print("kind    processes  batch  samples/s  efficiency  sent per step by formula, counted (MB)")
    for row in measured_rows(arguments.processes, arguments.batch, arguments.steps):
        formula, count = (sum(row[key].values()) / 1e6 for key in ("formula", "counted"))
        head = f"{row['kind']:6} {row['processes']:10} {row['batch']:6} {row['per_s']:10.1f} {row['efficiency']:11.2f}"
        print(f"{head}  {formula:.3f}, {count:.3f}")


if __name__ == "__main__":
    main()
