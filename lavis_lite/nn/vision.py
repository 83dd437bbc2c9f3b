"""Image encoders from timm under LAVIS's parameter names: what they share, and BLIP's ViT-B/16 and ViT-L/16.

Surprising: no pooling and no head, the final norm is applied to all tokens, and position embeddings are resized
bicubically without antialiasing, as the published weights were; timm's own resizing antialiases and differs.

Letters: B images, S image tokens, N patches, E width.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lavis_lite.common.bounds import (
    MAX_IMAGE_SIZE,
    MAX_LAYERS,
    MAX_WIDTH,
    Bounds,
    check_divides,
    check_numbers,
)
from lavis_lite.common.errors import InputError
from lavis_lite.nn.ckpt import checkpoint_blocks

logger = logging.getLogger(__name__)


SIZE_BOUNDS: dict[str, Bounds] = {
    "width": (1, MAX_WIDTH),
    "depth": (1, MAX_LAYERS),
    "num_heads": (1, MAX_WIDTH),
    "mlp_ratio": (0.01, 100.0),
    "patch_size": (1, MAX_IMAGE_SIZE),
    "norm_eps": (0.0, 1.0),
}
"""Sizes of an image encoder."""


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
    """BlipViT: start position embeddings as 2-D sine and cosine: from scratch, places are learned faster."""

    def __post_init__(self) -> None:
        values = vars(self)
        check_numbers("model", values, image_size=(1, MAX_IMAGE_SIZE))
        check_numbers("model.vit", values, **SIZE_BOUNDS, drop_path_rate=(0.0, 1.0), num_checkpointed=(0, MAX_LAYERS))
        check_divides("model.vit", values, divisor="patch_size", number="image_size")
        check_divides("model.vit", values, divisor="num_heads", number="width")
        if self.width * self.mlp_ratio < 1:
            raise InputError(f"model.vit.mlp_ratio: {self.mlp_ratio} leaves nothing of width {self.width}")
        if not isinstance(self.sincos_init, bool):
            raise InputError(f"model.vit.sincos_init: must be true or false, got {self.sincos_init!r}")
        if self.sincos_init and self.width % 4:
            raise InputError(f"model.vit.width: must be a multiple of 4 with sincos_init, got {self.width}")


VIT_SIZES: dict[str, ViTConfig] = {
    "tiny": ViTConfig(image_size=48, patch_size=8, width=128, depth=3, num_heads=4, sincos_init=True),
    "base": ViTConfig(),
    "large": ViTConfig(width=1024, depth=24, num_heads=16),
}


def vit_config(vit_type: str, **overrides: object) -> ViTConfig:
    """The sizes of `tiny`, `base` or `large`, with some replaced."""
    if vit_type not in VIT_SIZES:
        raise InputError(f"vit_type {vit_type!r} is not one of {', '.join(VIT_SIZES)}")
    known = [field.name for field in fields(ViTConfig)]
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise InputError(f"vit has no size {', '.join(unknown)}; it has {', '.join(known)}")
    return replace(VIT_SIZES[vit_type], **overrides)


class ImageEncoder(nn.Module):
    """An image (B,3,image_size,image_size) in, all its tokens (B,S,E) out.

    Mixed in before the class that computes them by `forward_features`, so that parameter names stay that class's.
    """

    width: int
    depth: int
    image_size: int
    block_names: ClassVar[str] = "blocks."
    embedding_names: ClassVar[tuple[str, ...]] = ("cls_token", "pos_embed", "patch_embed")

    def forward(self, image: Tensor) -> Tensor:
        """The image may be of any floating-point type: it is cast to the weights'."""
        size = self.image_size
        if image.ndim != 4 or image.shape[1:] != (3, size, size):
            raise InputError(
                f"image has shape {tuple(image.shape)}; the image encoder wants (B, 3, {size}, {size}): "
                f"set image_size of the processor and of the model to the same value"
            )
        return self.forward_features(image.to(next(self.parameters()).dtype))

    def checkpoint_all(self) -> None:
        """Every block recomputes its activations in the backward pass."""
        checkpoint_blocks(self.blocks)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors, named as there without `visual_encoder.`, under this encoder's names and with its number of
        positions.
        """
        if "pos_embed" not in state:
            return state
        return {**state, "pos_embed": interpolate_pos_embed(state["pos_embed"], self.pos_embed.shape[1])}

    def layer_scale(self, name: str, decay: float) -> float:
        """Learning-rate factor of the parameter for layer-wise decay, see `layer_scales`."""
        return layer_scales(self.depth, decay, blocks=self.block_names, embeddings=self.embedding_names)(name)


class BlipViT(ImageEncoder, VisionTransformer):
    """timm's ViT returning all normalised tokens (B,1+N,E), [CLS] first, of an image (B,3,H,W) of the configured
    size.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=True,
            num_classes=0,
            global_pool="",
            norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
            drop_path_rate=config.drop_path_rate,
        )
        self.config = config
        self.width, self.depth, self.image_size = config.width, config.depth, config.image_size
        if config.sincos_init:
            side = config.image_size // config.patch_size
            with torch.no_grad():
                self.pos_embed[0, 1:] = build_sincos2d_pos_embed([side, side], dim=config.width)
        if config.num_checkpointed:
            checkpoint_blocks(self.blocks[-config.num_checkpointed :])


def interpolate_pos_embed(
    pos_embed: Tensor, num_tokens: int, *, align_corners: bool = False, quiet: bool = False
) -> Tensor:
    """Position embeddings (1,1+N,E) resized to `num_tokens` tokens, [CLS] first; both grids must be square.

    Bicubic, in float32, without antialiasing; logged, unless it is `quiet`.
    """
    if pos_embed.shape[1] == num_tokens:
        return pos_embed
    old, new = (square_root(n - 1) for n in (pos_embed.shape[1], num_tokens))
    if not quiet:
        logger.info(f"position embeddings are resized from {old} x {old} to {new} x {new} patches")
    grid = pos_embed[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=align_corners)
    return torch.cat([pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)], dim=1)


def square_root(number: int) -> int:
    """The side of a square grid of that many patches."""
    side = round(number**0.5)
    if side * side != number:
        raise InputError(f"{number} patches do not form a square grid")
    return side


def layer_scales(
    depth: int,
    decay: float,
    *,
    blocks: str = ImageEncoder.block_names,
    embeddings: Sequence[str] = ImageEncoder.embedding_names,
) -> Callable[[str], float]:
    """Learning-rate factor of each ViT parameter for layer-wise decay: 1 behind the last block, decay^(depth+1) for
    the embeddings. The parameters' names start with `blocks` and the block's number, or with one of `embeddings`.
    """

    def scale(name: str) -> float:
        if name.startswith(blocks):
            layer = int(name.removeprefix(blocks).split(".")[0]) + 1
        elif name.split(".")[0] in embeddings:
            layer = 0
        else:
            layer = depth + 1
        return decay ** (depth + 1 - layer)

    return scale


def image_tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `visual.` of a CLIP file, which holds a text encoder too; all tensors where none is."""
    prefix = "visual."
    tower = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return tower or state


def second_last_layer(state: dict[str, Tensor], blocks: str, depth: int) -> dict[str, Tensor]:
    """Without the last block if the file has one more than `depth`."""
    numbers = {int(name.removeprefix(blocks).split(".")[0]) for name in state if name.startswith(blocks)}
    if max(numbers, default=-1) != depth:
        return state
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{blocks}{depth}.")}
