"""EVA-CLIP's ViT-g/14 (Fang et al. 2022; Sun et al. 2023) as BLIP-2 uses it: the second-last layer's tokens.

Surprising: the published file has 40 blocks, of which the last and the final norm are left out; queries and values
have biases, keys have none.
"""

from functools import partial

from timm.models.eva import Eva
from torch import Tensor, nn

from lavis_lite.nn.vision import (
    ImageEncoder,
    ViTConfig,
    image_tower,
    second_last_layer,
)

EVA_SIZES: dict[str, ViTConfig] = {
    "eva_tiny": ViTConfig(image_size=48, patch_size=12, width=64, depth=2, num_heads=4),
    "eva_clip_g": ViTConfig(patch_size=14, width=1408, depth=39, num_heads=16, mlp_ratio=4.3637),
}


class EvaViT(ImageEncoder, Eva):
    """timm's EVA without final norm; tokens (B,1+N,E), [CLS] first. Parameter names are LAVIS's."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            num_classes=0,
            global_pool="",
            norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
            drop_path_rate=config.drop_path_rate,
        )
        self.norm = nn.Identity()
        self.width, self.depth, self.image_size = config.width, config.depth, config.image_size

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From LAVIS's names, and from those of a whole EVA or EVA-CLIP file: its last block, norm and head are left
        out.
        """
        state = second_last_layer(image_tower(state), self.block_names, self.depth)
        return super().adapt_state_dict(
            {name: tensor for name, tensor in state.items() if not name.startswith(("norm.", "fc_norm.", "head."))}
        )
