"""BLIP-2's image encoders: EVA-CLIP's ViT-g/14 (Fang et al. 2022; Sun et al. 2023) and CLIP's ViT-L/14 (Radford et al.
2021), of which BLIP-2 uses the second-last layer's tokens.

Note: the published EVA file has 40 blocks, of which the last and the final norm are left out; its queries and values
have biases, its keys have none. CLIP has a norm before the blocks and none after them, QuickGELU, no bias in the patch
embedding, and its position embeddings are resized with aligned corners, unlike all others.

Letters: B images, S image tokens, N patches, E width.
"""

from collections import OrderedDict
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, QuickGELU
from timm.models.eva import Eva
from torch import Tensor, nn

from lavis_lite.nn.vision import ImageEncoder, TimmBased, ViTConfig, interpolate_pos_embed, timm_arguments

EVA_SIZES: dict[str, ViTConfig] = {
    "eva_tiny": ViTConfig(image_size=48, patch_size=12, width=64, depth=2, num_heads=4),
    "eva_clip_g": ViTConfig(patch_size=14, width=1408, depth=39, num_heads=16, mlp_ratio=4.3637),
}
CLIP_SIZES: dict[str, ViTConfig] = {
    "clip_tiny": ViTConfig(image_size=48, patch_size=12, width=64, depth=2, num_heads=4, norm_eps=1e-5),
    "clip_L": ViTConfig(patch_size=14, width=1024, depth=23, num_heads=16, norm_eps=1e-5),
}


class EvaViT(TimmBased):
    """timm's EVA without final norm; tokens (B,1+N,E), [CLS] first. Parameter names are LAVIS's."""

    def __init__(self, config: ViTConfig) -> None:
        model = Eva(**timm_arguments(config))
        model.norm = nn.Identity()
        super().__init__(model, width=config.width, depth=config.depth, image_size=config.image_size)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take LAVIS's names, or those of a whole EVA or EVA-CLIP file without its last block, norm and head."""
        state = clip_tower(state, self.block_names, self.depth)
        return super().adapt_state_dict(
            {name: tensor for name, tensor in state.items() if not name.startswith(("norm.", "fc_norm.", "head."))}
        )


class ClipAttention(nn.MultiheadAttention):
    """Self-attention with the parameters of torch's module."""

    def forward(self, x_BSE: Tensor) -> Tensor:  # type: ignore[override]  # only the parameters are torch's
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
        super().__init__(width=config.width, depth=config.depth, image_size=config.image_size)
        num_tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(config.width**-0.5 * torch.randn(config.width))
        self.positional_embedding = nn.Parameter(config.width**-0.5 * torch.randn(num_tokens, config.width))
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(config.width, eps=config.norm_eps)
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(ClipBlock(config, rate) for rate in rates)})

    def forward_features(self, image: Tensor) -> Tensor:
        patches_BNE = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(image), 1, -1), patches_BNE], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.blocks:
            x = block(x)
        return x

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take LAVIS's names, or a whole OpenAI CLIP file without its last block, norm and projection."""
        state = clip_tower(state, self.block_names, self.depth)
        state = {name: tensor for name, tensor in state.items() if name != "proj" and not name.startswith("ln_post.")}
        name = "positional_embedding"
        if name in state:
            num_tokens = len(self.positional_embedding)
            state[name] = interpolate_pos_embed(state[name][None], num_tokens, align_corners=True)[0]
        return state


def clip_tower(state: dict[str, Tensor], blocks: str, depth: int) -> dict[str, Tensor]:
    """Return the image encoder's tensors of a CLIP file, which are under `visual.` if it holds a text encoder too,
    without the last block if the file has one more than `depth`.
    """
    prefix = "visual."
    tower = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    state = tower or state
    numbers = {int(name.removeprefix(blocks).split(".")[0]) for name in state if name.startswith(blocks)}
    if max(numbers, default=-1) != depth:
        return state
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{blocks}{depth}.")}
