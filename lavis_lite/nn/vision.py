"""The image encoders' interface and sizes, and BLIP's ViT-B/16 and ViT-L/16 under LAVIS's parameter names.

Note: no pooling and no head, the final norm is applied to all tokens, and position embeddings are resized bicubically
without antialiasing, as the published weights were; timm's own resizing antialiases and differs.

Letters: B images, S image tokens, N patches, E width.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_IMAGE_SIZE, MAX_LAYERS, MAX_WIDTH, Bounds, check_divides, check_numbers, one_of
from lavis_lite.common.errors import InputError
from lavis_lite.nn.activation_checkpointing import checkpoint_blocks

logger = logging.getLogger(__name__)

SIZE_BOUNDS: dict[str, Bounds] = {
    "width": (1, MAX_WIDTH),
    "depth": (1, MAX_LAYERS),
    "num_heads": (1, MAX_WIDTH),
    "mlp_ratio": (0.01, 100.0),
    "patch_size": (1, MAX_IMAGE_SIZE),
    "norm_eps": (0.0, 1.0),
}
"""Sizes of an image encoder, under their names in the YAML."""


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a ViT; the defaults are ViT-B/16."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    num_checkpointed: int = 0
    """BlipViT: how many of the last blocks recompute their activations in the backward pass."""
    sincos_init: bool = False
    """BlipViT: initialise position embeddings as 2-D sine and cosine, which trains faster from scratch."""

    def __post_init__(self) -> None:
        values = vars(self)
        check_numbers("model", values, image_size=(1, MAX_IMAGE_SIZE))
        check_numbers("model.vit", values, **SIZE_BOUNDS, drop_path_rate=(0.0, 1.0), num_checkpointed=(0, MAX_LAYERS))
        check_divides("model.vit", values, divisor="patch_size", number="image_size")
        check_divides("model.vit", values, divisor="num_heads", number="width")
        if self.width * self.mlp_ratio < 1:
            raise InputError(f"model.vit.mlp_ratio: {self.mlp_ratio} leaves nothing of width {self.width}; raise it")
        one_of("model.vit.sincos_init", self.sincos_init, (True, False))
        if self.sincos_init and self.width % 4:
            raise InputError(f"model.vit.width: must be a multiple of 4 with sincos_init, got {self.width}")


VIT_SIZES: dict[str, ViTConfig] = {
    "tiny": ViTConfig(image_size=48, patch_size=8, width=128, depth=3, num_heads=4, sincos_init=True),
    "base": ViTConfig(),
    "large": ViTConfig(width=1024, depth=24, num_heads=16),
}


def vit_config(vit_type: str, **overrides: Any) -> ViTConfig:
    """Return the sizes of `tiny`, `base` or `large`, with some replaced."""
    check_sizes("model.vit", overrides, [field.name for field in fields(ViTConfig)])
    return replace(VIT_SIZES[one_of("model.vit_type", vit_type, VIT_SIZES)], **overrides)


def check_sizes(section: str, sizes: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise InputError for sizes that a part of the model does not have."""
    unknown = sorted(sizes.keys() - set(known))
    if unknown:
        raise InputError(f"{section}: no size {', '.join(unknown)}; it has {', '.join(known)}")


class ImageEncoder(nn.Module):
    """An image (B,3,image_size,image_size) in, all its tokens (B,S,width) out."""

    block_names: ClassVar[str] = "blocks."
    """Prefix of the blocks' parameter names, which a block's number follows."""
    embedding_names: ClassVar[tuple[str, ...]] = ("cls_token", "pos_embed", "patch_embed")
    """Modules and parameters before the first block."""

    has_class_token: bool = True
    """Whether the first token stands for the whole image."""

    def __init__(self, *, width: int, depth: int, image_size: int) -> None:
        super().__init__()
        self.width, self.depth, self.image_size = width, depth, image_size

    def forward(self, image: Tensor) -> Tensor:
        """Encode an image of any floating-point type; it is cast to the weights'."""
        size = self.image_size
        if image.ndim != 4 or image.shape[1:] != (3, size, size):
            found = f"image: has shape {tuple(image.shape)}, but the image encoder takes (B, 3, {size}, {size})"
            raise InputError(f"{found}; set image_size of the processor and of the model to the same value")
        return self.forward_features(image.to(next(self.parameters()).dtype))

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the tokens of an image of the right size and type."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last; none of an encoder that is built otherwise."""
        found = dict(self.named_modules()).get(self.block_names.removesuffix("."))
        return [] if found is None else list(found.children())

    def checkpoint_all(self) -> None:
        """Make every block recompute its activations in the backward pass."""
        checkpoint_blocks(self.blocks)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a file's tensors, named without `visual_encoder.`, under this encoder's names and with its number of
        positions.
        """
        raise NotImplementedError

    def layer_scale(self, name: str, decay: float) -> float:
        """Return the learning-rate factor of a parameter for layer-wise decay: 1 after the last block, decay^(depth+1)
        for the embeddings.
        """
        if name.startswith(self.block_names):
            layer = int(name.removeprefix(self.block_names).split(".")[0]) + 1
        else:
            layer = 0 if name.split(".")[0] in self.embedding_names else self.depth + 1
        return decay ** (self.depth + 1 - layer)


class TimmBased(ImageEncoder):
    """An encoder that computes its tokens by a model of timm, under that model's parameter names.

    Note: as a submodule the model would prefix all names. Instead both modules share the tables of parameters, buffers
    and submodules, so that casts, loading and copies reach both.
    """

    def __init__(self, model: nn.Module, **sizes: int) -> None:
        super().__init__(**sizes)
        self._parameters, self._modules = model._parameters, model._modules
        self._buffers, self._non_persistent_buffers_set = model._buffers, model._non_persistent_buffers_set
        object.__setattr__(self, "model", model)  # not registered

    model: Any  # classes of timm have forward_features, which nn.Module has not

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the timm model too, which is not among the submodules."""
        super().train(mode)
        self.model.training = mode
        return self

    def forward_features(self, image: Tensor) -> Tensor:
        return self.model.forward_features(image)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if "pos_embed" not in state:
            return state
        num_tokens = self.get_parameter("pos_embed").shape[1]
        return {**state, "pos_embed": interpolate_pos_embed(state["pos_embed"], num_tokens)}


def timm_arguments(config: ViTConfig) -> dict[str, Any]:
    """Return the sizes as timm's constructors of ViTs take them; the model has no head."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "num_classes": 0,
        "global_pool": "",
        "norm_layer": partial(nn.LayerNorm, eps=config.norm_eps),
        "drop_path_rate": config.drop_path_rate,
    }


class BlipViT(TimmBased):
    """timm's ViT returning all normalised tokens (B,1+N,E), [CLS] first, of an image (B,3,H,W) of the configured
    size.
    """

    def __init__(self, config: ViTConfig) -> None:
        model = VisionTransformer(qkv_bias=True, **timm_arguments(config))
        super().__init__(model, width=config.width, depth=config.depth, image_size=config.image_size)
        self.config = config
        if config.sincos_init:
            side = config.image_size // config.patch_size
            with torch.no_grad():
                self.get_parameter("pos_embed")[0, 1:] = build_sincos2d_pos_embed([side, side], dim=config.width)
        if config.num_checkpointed:
            checkpoint_blocks(self.blocks[-config.num_checkpointed :])


def interpolate_pos_embed(
    pos_embed: Tensor, num_tokens: int, *, align_corners: bool = False, quiet: bool = False
) -> Tensor:
    """Return position embeddings (1,1+N,E) resized to `num_tokens` tokens, [CLS] first; both grids must be square.

    Bicubic, in float32, without antialiasing; logged unless `quiet`.
    """
    if pos_embed.shape[1] == num_tokens:
        return pos_embed
    old, new = (round((n - 1) ** 0.5) for n in (pos_embed.shape[1], num_tokens))
    if (old**2 + 1, new**2 + 1) != (pos_embed.shape[1], num_tokens):
        raise InputError(f"{pos_embed.shape[1] - 1} and {num_tokens - 1} patches do not both form a square grid")
    if not quiet:
        logger.info(f"position embeddings are resized from {old} x {old} to {new} x {new} patches")
    grid = pos_embed[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=align_corners)
    return torch.cat([pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)], dim=1)


def encoder_scale(encoder: ImageEncoder, decay: float, prefix: str = "visual_encoder.") -> Callable[[str], float]:
    """Return the function from a model's parameter name to its learning-rate factor, 1 outside the encoder."""
    return lambda name: encoder.layer_scale(name.removeprefix(prefix), decay) if name.startswith(prefix) else 1.0
