"""Build modules without drawing their initial weights, which loading overwrites."""

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FILLS = {
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.erfinv_,
    Tensor.clamp_,
    Tensor.mul_,
    Tensor.div_,
    Tensor.add_,
    Tensor.zero_,
    Tensor.fill_,
}
"""The functions with which initialisations change a parameter in place, besides those of `torch.nn.init`."""

INITIALISERS = {function for name, function in vars(nn.init).items() if name.endswith("_") and callable(function)}


class Uninitialised(TorchFunctionMode):
    """While this is active, parameters keep what their memory holds, and no random number is drawn for them.

    Note: every parameter must be overwritten afterwards; `are_overwritten` tells whether it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self._skipped: dict[int, tuple[nn.Parameter, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FILLS or func in INITIALISERS:
            target = args[0] if args else kwargs["tensor"]
            if isinstance(target, nn.Parameter):
                self._skipped[id(target)] = target, target._version
                return target
        return func(*args, **(kwargs or {}))

    def are_overwritten(self, module: nn.Module) -> bool:
        """Return whether all parameters of a module that were not initialised have been written to since."""
        kept = (self._skipped.get(id(parameter)) for parameter in module.parameters())
        return all(entry is None or entry[0]._version > entry[1] for entry in kept)
