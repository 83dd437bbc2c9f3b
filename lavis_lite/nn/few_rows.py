"""Linear layers of few rows on a CPU, as decoding has them: a token per beam.

For 7 to 15 rows MKL takes up to twice as long as for 16, and as for the product of the weight with as many columns,
which is the same up to rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LEAST_ROWS, MOST_ROWS = 7, 32
"""Numbers of rows for which columns are faster in most measured layers (docs/performance.md): at 17 and 24 rows BERT's
output layer loses 5 percent, others gain."""


class FewRows(TorchFunctionMode):
    """In the body, float32 linear layers of few rows compute columns. Without MKL, under autocast and where gradients
    are needed, nothing changes.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs and _gains(args[0], args[1]):
            return _by_columns(*args)
        return func(*args, **(kwargs or {}))


def _gains(x: Tensor, weight: Tensor) -> bool:
    rows = x.numel() // max(x.shape[-1], 1)
    return (
        LEAST_ROWS <= rows <= MOST_ROWS
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and torch.backends.mkl.is_available()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _by_columns(x: Tensor, weight_OE: Tensor, bias_O: Tensor | None = None) -> Tensor:
    columns_ER = x.flatten(0, -2).t() if x.dim() > 1 else x[:, None]
    out_OR = weight_OE @ columns_ER if bias_O is None else torch.addmm(bias_O[:, None], weight_OE, columns_ER)
    return out_OR.t().reshape(*x.shape[:-1], -1)
