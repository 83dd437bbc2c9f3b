"""Processes and collectives; the only file that knows whether there is a process group.

Ranks come from torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE). A world of one has no process group and every
collective is then the identity, so callers never branch. All collectives must be entered by every rank; except in
`gather_rows`, tensors must have the same shape on all ranks (unchecked, for speed: run with
`TORCH_DISTRIBUTED_DEBUG=DETAIL` to have torch check). Where ranks take different numbers of steps,
`single_process()` makes each of them a world of one.
"""

import contextlib
import contextvars
import datetime
import gc
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as torch_dist

# Imported before there is a group: its functions take the group that exists then as default arguments. DDP imports it
# late, and the group would outlive `shutdown`, with threads that abort a Python which ends while they free a tensor.
import torch.distributed.nn.functional
from torch import nn
from torch.torch_version import TorchVersion

from lavis_lite.common.errors import InputError, RankZeroFailed

TIMEOUT = datetime.timedelta(hours=2)  # rank 0 may download a dataset or score a whole test set while others wait
_LOST = ("Connection closed by peer", "Connection reset by peer", "pair closure", "Broken pipe", "remote process exit")

_is_alone = contextvars.ContextVar("is_alone", default=False)
_is_on_main = contextvars.ContextVar("is_on_main", default=False)


def init(device: str = "auto") -> torch.device:
    """Join torchrun's process group (nccl on CUDA, gloo on CPU) and return this rank's device.

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`. Nothing is initialised in a world of one or when called again.

    Raises:
        InputError: CUDA is requested but absent, or has fewer devices than this node has ranks.
    """
    target = resolve_device(device)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _active():
        backend = "nccl" if target.type == "cuda" else "gloo"
        torch_dist.init_process_group(backend, timeout=TIMEOUT, **_meeting_place())
    return target


def _meeting_place() -> dict[str, Any]:
    """Return where ranks find each other, if it is not torch's own choice.

    Without `--rdzv-backend` torchrun keeps its store when it restarts workers, with the addresses of those that ended;
    the new ones would wait for them. On one node all ranks know how often they were restarted.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE"):
        return {}
    store, rank, world_size = next(torch_dist.rendezvous("env://", timeout=TIMEOUT))
    own = torch_dist.PrefixStore(f"restart_{restarts}", store)
    return {"store": own, "rank": rank, "world_size": world_size}


def resolve_device(device: str = "auto") -> torch.device:
    """Return the device for a setting `auto`, `cpu`, `cuda` or `cuda:N`; under torchrun, `cuda` is LOCAL_RANK's."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise InputError(f"run.device={device!r} is unknown: use auto, cpu, cuda or cuda:N") from None
    if target.type != "cuda":
        return target
    index = target.index if target.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        there = f"needs CUDA device {index}, but this machine has {torch.cuda.device_count()}"
        raise InputError(f"run.device={device!r} {there}: start fewer processes per node or set run.device=cpu")
    return torch.device("cuda", index)


def shutdown() -> None:
    """Leave the process group, if there is one, and wait for its threads; no model may be in use in DDP."""
    if _active():
        torch_dist.destroy_process_group()
        gc.collect()  # a model in DDP refers to its group and is often part of a cycle


def rank() -> int:
    """Return this process's number in the world, 0 without a process group."""
    return torch_dist.get_rank() if _active() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return torch_dist.get_world_size() if _active() else 1


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Make this rank a world of one in the body: nothing is exchanged, so no rank waits.

    For computations in which ranks take different numbers of steps, as in evaluation, where one may have more batches.
    Only for computing without gradients: `is_main()` is true on every rank there.
    """
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def is_main() -> bool:
    """Return whether this is rank 0, the one that writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if _active():
        on_gpu = torch_dist.get_backend() == "nccl"
        torch_dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)


def new_group() -> Any:
    """Return a group of all ranks for exchanges on the CPU beside those of training, also in another thread; None in a
    world of one. Every rank must call it at the same time.
    """
    return torch_dist.new_group(backend="gloo", timeout=TIMEOUT) if _active() else None


class Lockstep:
    """While entered, a collective waits at most `timeout` seconds for the other ranks, not hours.

    Every rank must construct it at the same time. `largest` exchanges numbers on the CPU, so that no rank waits for its
    GPU.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = datetime.timedelta(seconds=timeout)
        self.groups: list[Any] = []
        if _active():
            on_gpu = torch_dist.get_backend() == "nccl"
            own = new_group() if on_gpu else torch_dist.group.WORLD
            self.groups = [own, torch_dist.group.WORLD] if on_gpu else [own]

    def __enter__(self) -> None:
        self._wait()  # a rank may still be writing a file
        self._set(self.timeout)

    def __exit__(self, *error: object) -> None:
        self._set(TIMEOUT)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within a step: let ranks wait for hours in the body, as for rank 0 writing a file."""
        self.__exit__()
        yield
        self.__enter__()

    def largest(self, number: int) -> int:
        """Return the largest of all ranks' numbers."""
        if not self.groups:
            return number
        tensor = torch.tensor(number)
        torch_dist.all_reduce(tensor, torch_dist.ReduceOp.MAX, group=self.groups[0])
        return int(tensor)

    def _wait(self) -> None:
        if self.groups:
            torch_dist.barrier(group=self.groups[0])

    def _set(self, timeout: datetime.timedelta) -> None:
        for group in self.groups:
            # torch 2.15 has made the private name public
            change = getattr(torch_dist, "set_timeout", None) or torch_dist.distributed_c10d._set_pg_timeout
            change(timeout, group)


def lost_rank(error: RuntimeError) -> str | None:
    """Return in words that another rank hangs or has ended, if an error of a collective says so; else None."""
    text = str(error)
    if "Timed out waiting" in text or ("timed out" in text.lower() and isinstance(error, torch_dist.DistError)):
        return "another rank has not answered in time: it hangs, was suspended, or its node is lost"
    if any(part in text for part in _LOST):
        return "the connection to another rank broke: it ended, as its own message may say"
    return None


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the body on rank 0 first, then on all others; if rank 0 fails, the others fail too instead of waiting."""
    failure = None if is_main() else broadcast_object(None)
    if failure is not None:
        raise RankZeroFailed(f"rank 0 failed before rank {rank()} could start: {failure}")
    try:
        yield
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        if is_main():
            broadcast_object(failure)


def on_main(function: Callable[[], Any]) -> Any:
    """Call `function` on rank 0 and return its value on every rank; if it fails, every rank fails.

    `function` may exchange nothing with other ranks, which are not in it: another `on_main` there is an error.
    """
    value, error = None, None
    if is_main():
        if _is_on_main.get() and world_size() > 1:
            raise RuntimeError("on_main inside on_main: what rank 0 sends would be taken for a later value")
        token = _is_on_main.set(True)
        try:
            value = function()
        except Exception as caught:  # raised again below, once the other ranks know
            error = caught
        finally:
            _is_on_main.reset(token)
    value, failure = broadcast_object((value, error and f"{type(error).__name__}: {error}"))
    if failure is not None:
        raise error or RankZeroFailed(f"rank 0 failed: {failure}")
    return value


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """(B, ...) on each of W ranks -> (W*B, ...) in rank order, detached."""
    return _gather(tensor.detach()) if world_size() > 1 else tensor.detach()


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """(B, ...) on each of W ranks -> (W*B, ...) in rank order, differentiable.

    The backward pass sums over ranks the gradients that reach this rank's rows, so that with DDP's averaging of
    parameter gradients the result is the gradient of the mean of the ranks' losses, as in one process.
    """
    return _GatherWithGrad.apply(tensor) if world_size() > 1 else tensor


def gather_rows(local: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` (M,) of all ranks' `local` (B, ...), counted as if joined in rank order -> (M, ...), differentiable.

    Only these rows are exchanged. B and M may differ between ranks, the rest of the shape may not. As with
    `all_gather_with_grad`, the backward pass sums over ranks the gradients that reach this rank's rows; it exchanges
    nothing if `local` needs no gradient, which must hold on all ranks or on none.

    Raises:
        IndexError: on every rank, if any rank's `index` has a row that does not exist.
    """
    if world_size() == 1:
        return local[index]
    world = world_size()
    sizes = _gather(index.new_tensor([len(local)]))
    ends = sizes.cumsum(0)
    owner = torch.bucketize(index, ends, right=True).masked_fill(index < 0, world)  # no owner: one past the last rank
    counts = (owner[:, None] == torch.arange(world + 1, device=index.device)).sum(0)
    wanted = _gather(counts[None]).tolist()  # waits for the device, to learn how many rows travel
    if any(row[world] for row in wanted):
        raise IndexError(f"rows were asked for that do not exist: the ranks have {int(ends[-1])} together")
    num_out, num_in = [row[rank()] for row in wanted], wanted[rank()][:world]
    order = owner.argsort(stable=True)
    rows_out = _all_to_all((index - (ends - sizes)[owner])[order], num_in, num_out)
    return _Exchange.apply(local[rows_out], num_out, num_in)[order.argsort()]


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean over ranks of a floating-point tensor of any shape, detached; the input is not changed."""
    result = tensor.detach().clone()
    if world_size() > 1:
        torch_dist.all_reduce(result)
        result /= world_size()
    return result


def gather_objects(items: list[Any], group: Any = None) -> list[Any]:
    """Return, on every rank, all ranks' lists of picklable items (perhaps empty), concatenated in rank order.

    `group` is a `new_group`, which another thread must use.
    """
    if world_size() == 1:
        return list(items)
    shards: list[list[Any]] = [[] for _ in range(world_size())]
    torch_dist.all_gather_object(shards, list(items), group=group)
    return [item for shard in shards for item in shard]


def broadcast_object(value: Any) -> Any:
    """Return rank 0's `value` (picklable) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def data_parallel(
    model: nn.Module, *, find_unused_parameters: bool = False
) -> tuple[nn.Module, Callable[[], contextlib.AbstractContextManager[None]]]:
    """Return the model as training calls it (in DDP if ranks are several), and the context that keeps gradients local.

    Every rank starts from rank 0's parameters and buffers. Buffers are not sent again: feature queues are filled with
    gathered features, so they stay equal.
    """
    if world_size() == 1:
        return model, contextlib.nullcontext
    for buffer in model.buffers():
        torch_dist.broadcast(buffer.detach(), src=0)
    is_renamed = TorchVersion(torch.__version__) >= TorchVersion("2.15")  # which deprecates the old name
    options: dict[str, Any] = {"forward_sync_buffers" if is_renamed else "broadcast_buffers": False}
    options |= {"find_unused_parameters": find_unused_parameters, "gradient_as_bucket_view": True}
    parallel = nn.parallel.DistributedDataParallel(model, **options)
    return parallel, parallel.no_sync


def _active() -> bool:
    return not _is_alone.get() and torch_dist.is_available() and torch_dist.is_initialized()


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    gathered = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    torch_dist.all_gather_into_tensor(gathered, tensor)
    return gathered


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _gather(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        own = grad.new_empty((grad.shape[0] // world_size(), *grad.shape[1:]))
        torch_dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


def _all_to_all(rows: torch.Tensor, num_out: list[int], num_in: list[int]) -> torch.Tensor:
    """Exchange rows as bytes, because gloo does not support every type."""
    width = math.prod(rows.shape[1:])
    packed = rows.reshape(len(rows), width).contiguous()
    received = packed.new_empty((sum(num_in), width))
    torch_dist.all_to_all_single(received.view(torch.uint8), packed.view(torch.uint8), num_in, num_out)
    return received.reshape(sum(num_in), *rows.shape[1:])


class _Exchange(torch.autograd.Function):
    """Rows of this rank, ordered by receiver -> rows from all ranks, ordered by sender."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, num_out: list[int], num_in: list[int]) -> torch.Tensor:
        ctx.num_out, ctx.num_in = num_out, num_in
        return _all_to_all(rows, num_out, num_in)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_to_all(grad, ctx.num_in, ctx.num_out), None, None
