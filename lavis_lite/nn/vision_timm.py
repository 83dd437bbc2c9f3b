"""Any other image encoder of timm, by its name: SigLIP, DINOv2, Swin, ConvNeXt ...

Note: parameter names are timm's own. Pooling and heads are removed, and a feature map is flattened to tokens. Position
embeddings are resized by timm, which antialiases.
"""

import logging
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
from timm.models import group_parameters
from torch import Tensor, nn

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError
from lavis_lite.common.sources.hub import timm_config
from lavis_lite.nn.vision import SIZE_BOUNDS, TimmBased

logger = logging.getLogger(__name__)

HEADS = ("head", "head_dist", "head_drop", "fc_norm", "attn_pool", "fc", "classifier")
TIMM_NAMES = {"width": "embed_dim"}


class TimmEncoder(TimmBased):
    """A model of timm without its heads; tokens (B,S,E) are all of its last layer."""

    def __init__(self, model: Any, *, image_size: int) -> None:
        for part in dict(model.named_children()).keys() & set(HEADS):
            model.add_module(part, nn.Identity())
        matcher = getattr(model, "group_matcher", None)
        numbers: dict[str, int] = group_parameters(model, matcher(), reverse=True) if matcher else {}
        blocks = [number for name, number in numbers.items() if name.startswith(self.block_names)]
        depth = max(blocks or numbers.values(), default=0)
        super().__init__(model, width=model.num_features, depth=depth, image_size=image_size)
        self.has_class_token = self._parameters.get("cls_token") is not None
        self.layer_numbers = numbers
        """timm's layer of each parameter, 0 for the embeddings; empty where timm does not number them."""

    def forward(self, image: Tensor) -> Tensor:
        tokens = super().forward(image)
        if isinstance(tokens, Tensor) and tokens.ndim == 4:
            has_width_last = getattr(self.model, "output_fmt", "") == "NHWC"
            tokens = tokens.flatten(1, 2) if has_width_last else tokens.flatten(2).mT
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[-1] != self.width:
            kind = type(self.model).__name__
            raise InputError(f"model.vit_model: timm's {kind} returns no tokens of width {self.width}; choose another")
        return tokens

    def checkpoint_all(self) -> None:
        if "blocks" in dict(self.named_children()):
            super().checkpoint_all()
        else:
            self.model.set_grad_checkpointing(True)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate and resize as timm does, unless the tensors fit as they are; leave out heads."""
        own = self.state_dict()
        if any(name not in state or state[name].shape != tensor.shape for name, tensor in own.items()):
            translate = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
            given, state = state, dict(state) if translate is None else translate(dict(state), self.model)
            tables = [name for name in own if name.endswith("relative_position_bias_table") and name in given]
            resized = [name for name in tables if given[name].shape != state[name].shape]
            if resized:  # timm logs that it resizes absolute positions
                sizes = sorted({f"{len(given[name])} to {len(state[name])} distances" for name in resized})
                logger.info(f"{len(resized)} tables of relative positions are resized from {', '.join(sizes)}")
        heads = tuple(f"{part}." for part in HEADS)
        return {name: tensor for name, tensor in state.items() if name in own or not name.startswith(heads)}

    def layer_scale(self, name: str, decay: float) -> float:
        if decay == 1.0:
            return 1.0
        if not self.layer_numbers:
            kind = type(self.model).__name__
            raise InputError(f"run.lr_layer_decay: timm does not number the layers of {kind}; set it to 1")
        if name not in self.layer_numbers:
            raise InputError(f"run.lr_layer_decay: {name}, an adapter's, has no layer; set it to 1")
        return decay ** max(self.depth + 1 - self.layer_numbers[name], 0)


def timm_encoder(name: str, *, image_size: int, drop_path_rate: float, sizes: Mapping[str, Any]) -> TimmEncoder:
    """Build the timm model of that name with random weights.

    Raises ValueError if timm does not know the name, or the model takes no such size.
    """
    for key, value in sizes.items():  # a model of several stages takes a list
        for one in value if isinstance(value, list | tuple) and value else (value,):
            check_number(f"model.vit.{key}", one, *SIZE_BOUNDS[key])
    settings = {TIMM_NAMES.get(key, key): value for key, value in sizes.items()}
    if "norm_eps" in settings:
        settings["norm_layer"] = partial(nn.LayerNorm, eps=settings.pop("norm_eps"))
    if timm_config(name).fixed_input_size:
        settings["img_size"] = image_size
    if drop_path_rate:
        settings["drop_path_rate"] = drop_path_rate
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, **settings)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError, IndexError) as error:
        raise InputError(f"model.vit: timm's {name} cannot be built with {settings}: {error}") from error
    return TimmEncoder(model, image_size=image_size)
