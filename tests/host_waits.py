"""A simulated accelerator: it computes on the CPU and notes each operation for which the host of a GPU would wait.

Tensors of the device `lazy` (torch knows the name, and nothing implements it) wrap CPU tensors. An operation waits if
it reads a value of the device, if the shape of its result depends on values, or if it copies between the device and
memory that is not pinned.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lavis_lite.common import transfer

DEVICE = torch.device("lazy", 0)
PACKAGE = str(Path(transfer.__file__).parents[1])
READS = (
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"),
    *("unique_consecutive", "bincount", "multinomial"),
)
"""Operations whose CUDA kernels wait: they return a value, or one gives the size of the result; `multinomial` checks
its input.
"""


class OnDevice(Tensor):
    """A tensor of the simulated device."""

    host: Tensor
    """Its values."""

    @staticmethod
    def __new__(cls, host: Tensor) -> "OnDevice":
        layout: dict[str, Any] = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        wrapper = Tensor._make_wrapper_subclass(cls, host.size(), dtype=host.dtype, device=DEVICE, **layout)
        wrapper.host = host
        return wrapper

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.host})"

    def record_stream(self, stream: Any) -> None:  # type: ignore[override]
        """Do nothing: no memory is used again while it is read."""

    def tolist(self) -> Any:
        """Read the values, which torch does not for subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called outside of the simulation")


class HostWaits(TorchDispatchMode):
    """The simulation. `found` has the waits so far: the operation and the line of the package that called it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_operations = 0
        """Operations on the device."""
        self.pinned: set[int] = set()
        self.kept: list[Tensor] = []  # so that the ids of pinned tensors are not used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, leaves = func._schema.name.removeprefix("aten::"), tree_leaves((args, kwargs))
        if name in ("is_pinned", "_pin_memory"):
            return self._pin(name, args[0])
        takes = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        target = kwargs.get("device")
        is_there = bool(takes) if target is None else torch.device(target).type == DEVICE.type
        self.num_operations += is_there
        if self._waits(name, args, kwargs, takes=bool(takes), is_there=is_there):
            self._note(name)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("non_blocking", None)
        out = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        known = {id(wrapper.host): wrapper for wrapper in takes}
        return _wrapped(out, known) if is_there else out

    def _pin(self, name: str, tensor: Tensor) -> Any:
        if name == "is_pinned":
            return id(tensor) in self.pinned
        copy = tensor.clone()
        self.pinned.add(id(copy))
        self.kept.append(copy)
        return copy

    def _waits(self, name: str, args: Any, kwargs: dict[str, Any], *, takes: bool, is_there: bool) -> bool:
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            here = [isinstance(source, OnDevice), is_there if name == "_to_copy" else isinstance(args[0], OnDevice)]
            is_async = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            return here[0] != here[1] and not (is_async and (here[0] or id(source) in self.pinned))
        if not takes:
            return False
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        masks = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
        return name in READS or any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in masks)

    def _note(self, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        where = f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}" if frames else "outside"
        self.found.append(f"{name} in {where}")


def _host(value: Any) -> Any:
    return value.host if isinstance(value, OnDevice) else value


def _wrapped(out: Any, known: dict[int, OnDevice]) -> Any:
    """Put results on the device; what an operation changed in place stays the tensor that it was given."""

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else OnDevice(value)

    return tree_map(wrap, out)


class Streams:
    """What `torch.get_device_module` returns for the simulated device: streams that do nothing."""

    class Stream:
        """A stream."""

        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_stream(self, other: Any) -> None:
            """Do nothing: the simulation computes at once."""

    class Event:
        """An event: the simulation has computed all that was asked for."""

        def record(self) -> None:
            """Do nothing."""

        def synchronize(self) -> None:
            """Do nothing: the host waits for one copy here, not for the device."""

    stream = staticmethod(contextlib.nullcontext)

    @classmethod
    def current_stream(cls, device: torch.device) -> "Streams.Stream":
        """Return a stream."""
        return cls.Stream(device)


@contextlib.contextmanager
def simulated(monkeypatch: Any) -> Iterator[HostWaits]:
    """Simulate the device, for which the package pins memory as for CUDA."""
    monkeypatch.setattr(torch, DEVICE.type, Streams, raising=False)
    monkeypatch.setattr(transfer, "WITH_PINNED_MEMORY", (*transfer.WITH_PINNED_MEMORY, DEVICE.type))
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is then a copy to the device
    try:
        with HostWaits() as waits:
            yield waits
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
