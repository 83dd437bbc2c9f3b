"""BLIP-2's image encoders by name; constructors download nothing.

`eva_clip_g` and `clip_L` are the paper's (section 4.1), `blip_*` are BLIP's, `*_tiny` are small enough for a CPU;
`features` takes the tokens of another encoder, and any other name is timm's.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import timm

from lavis_lite.common.errors import InputError, SettingError, did_you_mean
from lavis_lite.common.sources.hub import timm_config
from lavis_lite.nn.features import FEATURES, FeatureEncoder
from lavis_lite.nn.vision import SIZE_BOUNDS, VIT_SIZES, BlipViT, ImageEncoder, ViTConfig, check_sizes
from lavis_lite.nn.vision_clip import CLIP_SIZES, EVA_SIZES, ClipViT, EvaViT
from lavis_lite.nn.vision_timm import timm_encoder

LAVIS_FILES = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
PUBLISHED: dict[str, str] = {
    "eva_clip_g": f"{LAVIS_FILES}/eva_vit_g.pth",
    "clip_L": f"{LAVIS_FILES}/clip_vit_L.pth",
}
"""URLs of the encoders' weights."""
ENCODERS: dict[str, tuple[Callable[[ViTConfig], ImageEncoder], ViTConfig]] = {
    **{f"blip_{name}": (BlipViT, config) for name, config in VIT_SIZES.items()},
    **{name: (EvaViT, config) for name, config in EVA_SIZES.items()},
    **{name: (ClipViT, config) for name, config in CLIP_SIZES.items()},
}


def build_encoder(
    vit_model: str,
    *,
    image_size: int = 224,
    drop_path_rate: float = 0.0,
    grad_checkpoint: bool = False,
    sizes: Mapping[str, Any] | None = None,
) -> ImageEncoder:
    """Build the image encoder of that name with random weights.

    `sizes` replaces some of width, depth, num_heads, mlp_ratio, patch_size, norm_eps. With `grad_checkpoint` every
    block recomputes its activations in the backward pass.

    Raises:
        ValueError: an unknown name or size, or sizes that do not fit each other.
    """
    sizes = sizes or {}
    if vit_model == FEATURES:
        return feature_encoder(sizes, drop_path_rate=drop_path_rate, grad_checkpoint=grad_checkpoint)
    check_sizes("model.vit", sizes, SIZE_BOUNDS)
    if vit_model in ENCODERS:
        kind, config = ENCODERS[vit_model]
        encoder = kind(replace(config, image_size=image_size, drop_path_rate=drop_path_rate, **sizes))
    elif timm.is_model(vit_model):
        encoder = timm_encoder(vit_model, image_size=image_size, drop_path_rate=drop_path_rate, sizes=sizes)
    else:
        known = [*ENCODERS, FEATURES, *timm.list_models()]
        raise InputError(f"model.vit_model: unknown image encoder {vit_model!r}. {did_you_mean(vit_model, known)}")
    if grad_checkpoint:
        encoder.checkpoint_all()
    return encoder


def feature_encoder(sizes: Mapping[str, Any], *, drop_path_rate: float, grad_checkpoint: bool) -> FeatureEncoder:
    """Return the encoder that takes features. InputError for settings of an encoder that computes something."""
    if set(sizes) != {"width"}:
        problem = f"must be {{width: W}} for vit_model {FEATURES}, the features' width, got {dict(sizes)}"
        raise SettingError("model.vit", problem)
    for key, value in (("drop_path_rate", drop_path_rate), ("use_grad_checkpoint", grad_checkpoint)):
        if value:
            problem = f"vit_model {FEATURES} has no layers, for which this could be set ({value}); leave it out"
            raise SettingError(f"model.{key}", problem)
    return FeatureEncoder(width=sizes["width"])


def is_encoder(name: str) -> bool:
    """Return whether there is an image encoder of that name."""
    return name in ENCODERS or timm.is_model(name)


def encoder_statistics(vit_model: str) -> dict[str, list[float]] | None:
    """Return `mean` and `std` of the images that timm's encoder of that name was trained on; None for our own names,
    whose images have CLIP's, and for names that timm does not know.
    """
    if vit_model in ENCODERS or not timm.is_model(vit_model):
        return None
    config = timm_config(vit_model)
    return {"mean": list(config.mean), "std": list(config.std)}
