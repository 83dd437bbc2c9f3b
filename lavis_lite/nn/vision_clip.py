"""CLIP's ViT-L/14 (Radford et al. 2021) as BLIP-2 uses it: the second-last layer's tokens, OpenAI's parameter names.

Surprising: a norm before the blocks and none behind them, QuickGELU, no bias in the patch embedding, and position
embeddings are resized with aligned corners, unlike all other encoders'.
"""

from collections import OrderedDict
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, QuickGELU
from torch import Tensor, nn

from lavis_lite.nn.vision import (
    ImageEncoder,
    ViTConfig,
    image_tower,
    interpolate_pos_embed,
    second_last_layer,
)

CLIP_SIZES: dict[str, ViTConfig] = {
    "clip_tiny": ViTConfig(image_size=48, patch_size=12, width=64, depth=2, num_heads=4, norm_eps=1e-5),
    "clip_L": ViTConfig(patch_size=14, width=1024, depth=23, num_heads=16, norm_eps=1e-5),
}


class ClipAttention(nn.MultiheadAttention):
    """Self-attention with the parameters of torch's module."""

    def forward(self, x_BSE: Tensor) -> Tensor:
        qkv = F.linear(x_BSE, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ClipBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.attn = ClipAttention(width, config.num_heads)
        self.ln_1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, hidden), gelu=QuickGELU(), c_proj=nn.Linear(hidden, width))
        )
        self.ln_2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.ln_1(x)))
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class ClipViT(ImageEncoder):
    """CLIP's ViT without its last norm and projection; tokens (B,1+N,E), [CLS] first."""

    block_names: ClassVar[str] = "transformer.resblocks."
    embedding_names: ClassVar[tuple[str, ...]] = ("class_embedding", "positional_embedding", "conv1", "ln_pre")

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.width, self.depth, self.image_size = config.width, config.depth, config.image_size
        num_tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(config.width**-0.5 * torch.randn(config.width))
        self.positional_embedding = nn.Parameter(config.width**-0.5 * torch.randn(num_tokens, config.width))
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(config.width, eps=config.norm_eps)
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(ClipBlock(config, rate) for rate in rates)})

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, from the first to the last."""
        return self.transformer["resblocks"]

    def forward_features(self, image: Tensor) -> Tensor:
        """Tokens (B,1+N,E) of an image (B,3,H,W)."""
        patches_BNE = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(image), 1, -1), patches_BNE], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.blocks:
            x = block(x)
        return x

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From LAVIS's names, and from a whole OpenAI CLIP file: its last block, norm and projection are left out."""
        state = second_last_layer(image_tower(state), self.block_names, self.depth)
        state = {name: tensor for name, tensor in state.items() if name != "proj" and not name.startswith("ln_post.")}
        name = "positional_embedding"
        if name in state:
            num_tokens = len(self.positional_embedding)
            state[name] = interpolate_pos_embed(state[name][None], num_tokens, align_corners=True)[0]
        return state
