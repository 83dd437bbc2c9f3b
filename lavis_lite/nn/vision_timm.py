"""Any other image encoder of timm, by its name: SigLIP, DINOv2, Swin, ConvNeXt ...

Surprising: the model keeps timm's own parameter names because `ImageEncoder` is mixed into its class; its pooling and
heads are removed; a feature map is flattened to tokens; other image sizes are timm's business, which antialiases.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import timm
from timm.models import group_parameters
from torch import Tensor, nn

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError
from lavis_lite.common.sources.hub import timm_config
from lavis_lite.nn.vision import SIZE_BOUNDS, ImageEncoder

logger = logging.getLogger(__name__)

HEADS = ("head", "head_dist", "head_drop", "fc_norm", "attn_pool", "fc", "classifier")
TIMM_NAMES = {"width": "embed_dim"}


class TimmEncoder(ImageEncoder):
    """Mixed into the class of a timm model by `timm_encoder`; tokens (B,S,E) are all of its last layer."""

    layer_numbers: dict[str, int]
    """timm's layer of each parameter, 0 for the embeddings; empty where timm does not say."""

    def forward(self, image: Tensor) -> Tensor:
        tokens = super().forward(image)
        if isinstance(tokens, Tensor) and tokens.ndim == 4:
            tokens = tokens.flatten(1, 2) if getattr(self, "output_fmt", "") == "NHWC" else tokens.flatten(2).mT
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[-1] != self.width:
            raise InputError(
                f"timm's {type(self).__name__} gives no tokens of width {self.width}: choose another model"
            )
        return tokens

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[type[nn.Module]], dict[str, Any]]:
        """Copies and pickles name timm's class, as the mixed one is made where it is needed."""
        _, timm_class = type(self).__bases__
        return _empty_encoder, (timm_class,), self.__getstate__()

    def checkpoint_all(self) -> None:
        if hasattr(self, "blocks"):
            super().checkpoint_all()
        else:
            self.set_grad_checkpointing(True)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's own translation and resizing, unless the tensors fit as they are; heads are left out."""
        own = self.state_dict()
        if any(name not in state or state[name].shape != tensor.shape for name, tensor in own.items()):
            _, timm_class = type(self).__bases__
            translate = getattr(sys.modules[timm_class.__module__], "checkpoint_filter_fn", None)
            given, state = state, dict(state) if translate is None else translate(dict(state), self)
            tables = [name for name in own if name.endswith("relative_position_bias_table") and name in given]
            resized = [name for name in tables if given[name].shape != state[name].shape]
            if resized:  # of absolute positions timm says it itself
                sizes = sorted({f"{len(given[name])} to {len(state[name])} distances" for name in resized})
                logger.info(f"{len(resized)} tables of relative positions are resized from {', '.join(sizes)}")
        heads = tuple(f"{part}." for part in HEADS)
        return {name: tensor for name, tensor in state.items() if name in own or not name.startswith(heads)}

    def layer_scale(self, name: str, decay: float) -> float:
        if decay == 1.0:
            return 1.0
        if not self.layer_numbers:
            raise InputError(f"timm does not number the layers of {type(self).__name__}: set lr_layer_decay=1")
        return decay ** max(self.depth + 1 - self.layer_numbers[name], 0)


@cache
def encoder_class(timm_class: type[nn.Module]) -> type[TimmEncoder]:
    """`TimmEncoder` mixed into a class of timm."""
    return type(f"{timm_class.__name__}Encoder", (TimmEncoder, timm_class), {})


def _empty_encoder(timm_class: type[nn.Module]) -> TimmEncoder:
    mixed = encoder_class(timm_class)
    return mixed.__new__(mixed)


def timm_encoder(
    name: str, *, image_size: int, drop_path_rate: float = 0.0, sizes: Mapping[str, Any] | None = None
) -> TimmEncoder:
    """The timm model of that name with random weights.

    Raises ValueError if timm does not know the name, or the model takes no such size.
    """
    for key, value in (sizes or {}).items():  # a model of several stages takes a list
        for one in value if isinstance(value, list | tuple) and value else (value,):
            check_number(f"model.vit.{key}", one, *SIZE_BOUNDS[key])
    settings = {TIMM_NAMES.get(key, key): value for key, value in (sizes or {}).items()}
    if "norm_eps" in settings:
        settings["norm_layer"] = partial(nn.LayerNorm, eps=settings.pop("norm_eps"))
    if timm_config(name).fixed_input_size:
        settings["img_size"] = image_size
    if drop_path_rate:
        settings["drop_path_rate"] = drop_path_rate
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, **settings)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError, IndexError) as error:
        raise InputError(f"timm's {name} cannot be built with {settings}: {error}") from error
    for part in HEADS:
        if isinstance(getattr(model, part, None), nn.Module):
            setattr(model, part, nn.Identity())
    model.__class__ = encoder_class(type(model))
    model.width, model.image_size = model.num_features, image_size
    numbers = group_parameters(model, model.group_matcher(), reverse=True) if hasattr(model, "group_matcher") else {}
    blocks = [number for name, number in numbers.items() if name.startswith(model.block_names)]
    model.layer_numbers, model.depth = numbers, max(blocks or numbers.values(), default=0)
    return model
