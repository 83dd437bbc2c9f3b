"""Sharded training (FSDP2): each rank holds a part of every parameter, its gradient and its optimizer state.

Blocks are gathered one after another, in the forward and again in the backward pass; all other parameters as one, for
the whole step. A parameter is then a `DTensor` with the shape of the whole. Checkpoints hold whole tensors, so their
files do not tell how a run was parallel. Parameters that stay whole for an evaluation, where ranks take different
numbers of steps, are gathered before it (`gathered`).
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from lavis_lite.common import dist
from lavis_lite.common.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

WHERE = "run.parallel: fsdp"


class ShardUnit(NamedTuple):
    """A block that is gathered as one."""

    module: nn.Module
    in_autocast: bool = True
    """Whether it computes under autocast, so that float32 parameters can be gathered in the precision of the run."""


def check_shardable(model: nn.Module, *, dtype: torch.dtype) -> None:
    """Raise InputError if the parameters cannot be sharded, or the precision `dtype` needs a gradient scaler."""
    if dtype == torch.float16:
        raise InputError(f"{WHERE}: fp16 needs a gradient scaler, which does not know shards; set run.precision: bf16")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            problem = f"{name} is a single number, the temperature of a contrast, which has no shards"
            raise InputError(f"{WHERE}: {problem}; set run.parallel: ddp")
        if not parameter.is_floating_point():
            raise InputError(f"{WHERE}: {name} is quantized; leave model.llm_quantization out, or set ddp")
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if len(dtypes) > 1:
        raise InputError(f"{WHERE}: trained parameters have several precisions, {sorted(map(str, dtypes))}; set ddp")


def shard(model: nn.Module, units: Sequence[ShardUnit], *, device: torch.device, dtype: torch.dtype) -> None:
    """Shard the parameters in place over all ranks, and move them to `device`, one unit after another; every rank
    starts from rank 0's parameters and buffers.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for tensor in (*model.parameters(), *model.buffers()):
        start = tensor.detach().to(device)
        torch_dist.broadcast(start, src=0)
        tensor.detach().copy_(start)
    mesh = torch_dist.init_device_mesh(device.type, (dist.world_size(),))
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    own = MixedPrecisionPolicy(cast_forward_inputs=False)
    for unit in units:
        is_full = all(parameter.dtype == torch.float32 for parameter in unit.module.parameters())
        is_lowered = unit.in_autocast and is_full and dtype != torch.float32
        if is_lowered and (norms := _norms(unit.module)):
            fully_shard(norms, mesh=mesh, mp_policy=own)
        fully_shard(unit.module, mesh=mesh, mp_policy=low if is_lowered else own)
    fully_shard(model, mesh=mesh, mp_policy=own)


def _norms(block: nn.Module) -> list[nn.Module]:
    """Return the modules in a block that autocast leaves in float32: those whose own parameters are vectors."""
    modules = [module for module in block.modules() if module is not block]
    shapes = {module: [parameter.ndim for parameter in module.parameters(recurse=False)] for module in modules}
    return [module for module, dims in shapes.items() if dims and max(dims) < 2]


def no_sync(model: nn.Module) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return the context in which the gradients of a sharded model stay on their rank, whole."""

    @contextlib.contextmanager
    def local_gradients() -> Iterator[None]:
        (root,) = _fsdp_modules([model])
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    return local_gradients


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold whole parameters on every rank in the body, so that ranks need not compute in step; only for evaluation.

    Must be entered by every rank. Does nothing to a model that is not sharded.
    """
    modules = _fsdp_modules(model.modules())
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def is_shard(tensor: Any) -> TypeGuard["DTensor"]:
    """Return whether a tensor is one of which each rank has a part."""
    module = sys.modules.get("torch.distributed.tensor")  # a program without shards does not load it
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory."""
    return tensor.to_local() if is_shard(tensor) else tensor


def mapped(tree: Any, change: Callable[[str, Tensor], Any], name: str = "") -> Any:
    """Return nested containers with each tensor in them replaced by `change(its dotted name, tensor)`."""
    if isinstance(tree, Tensor):
        return change(name, tree)
    if isinstance(tree, Mapping):
        return {key: mapped(value, change, f"{name}.{key}" if name else str(key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(value, change, f"{name}.{i}") for i, value in enumerate(tree))
    return tree


def whole(tree: Any) -> Any:
    """Return nested containers with the shards in them gathered, on the CPU of rank 0; on other ranks these are empty.

    Must be entered by every rank.
    """

    def gathered_tensor(name: str, tensor: Tensor) -> Tensor:
        if not is_shard(tensor):
            return tensor
        full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return full.cpu() if dist.is_main() else full.new_empty(0)

    return mapped(tree, gathered_tensor)


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what is equal for the names of one tied tensor only: where this rank's part is, and how it is laid out."""
    part = local(tensor)
    place = (part.untyped_storage().data_ptr(), part.storage_offset(), part.shape, part.stride(), part.dtype)
    return (*place, tensor.shape)  # parts without elements have no place


def on_host(tree: Any) -> Any:
    """Return a copy of nested containers with this rank's part of all tensors in the host's memory; tied ones stay
    tied.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copied(name: str, tensor: Tensor) -> Tensor:
        key = memory_of(tensor)
        if key not in copies:
            copies[key] = _staged(tensor) if is_shard(tensor) else tensor.detach().to("cpu", copy=True)
        return copies[key]

    return mapped(tree, copied)


def _staged(shard: Tensor) -> Tensor:
    """Return a copy of a shard, of a mesh of GPUs too, in the host's memory."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    copy: Tensor = DefaultStager(StagingOptions(False, False, False, False)).stage({"": shard.detach()})[""]  # type: ignore[index]
    return copy


def like(target: Tensor, source: Tensor) -> Tensor:
    """Return the whole tensor `source`, which every rank has, divided as `target` is; one that is divided already, as
    it is.
    """
    if not is_shard(target) or is_shard(source):
        return source
    from torch.distributed.tensor import distribute_tensor

    placed = source.to(device=target.device, dtype=target.dtype)
    return distribute_tensor(placed, target.device_mesh, target.placements, src_data_rank=None)


def clip_grad_norm(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Scale the gradients so that the norm of all together is at most `limit`; return the norm before."""
    norm: Any = nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if is_shard(norm) else norm


def _fsdp_modules(modules: Iterable[nn.Module]) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in modules if isinstance(module, fsdp.FSDPModule)]
