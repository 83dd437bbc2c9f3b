"""The image encoder of BLIP's models: BLIP's own ViT or any other, trained, frozen, or trained by adapters (LoRA)."""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_IMAGE_SIZE, MAX_LAYERS, check_number
from lavis_lite.common.errors import InputError
from lavis_lite.common.sharding import ShardUnit
from lavis_lite.common.sources.weights import LazyState
from lavis_lite.models.base import BaseModel, checked_frozen
from lavis_lite.models.initialise import check_weight_file, init_from_state_dict, vit_weights
from lavis_lite.nn.encoders import build_encoder, encoder_statistics, is_encoder
from lavis_lite.nn.lora import add_lora, into_wrapped
from lavis_lite.nn.video import frame_tokens
from lavis_lite.nn.vision import (
    VIT_SIZES,
    BlipViT,
    ImageEncoder,
    TimmBased,
    encoder_scale,
    interpolate_pos_embed,
    vit_config,
)

ENCODERS = ("visual_encoder.", "visual_encoder_m.")
"""Prefixes of the image encoder's tensors, and of its momentum encoder's."""
NORM_EPS = 1e-6


class BlipVision(BaseModel):
    """A model with BLIP's image encoder.

    `vit_type` is `tiny`, `base` or `large`, BLIP's own, or the name of another encoder: of timm, or of BLIP-2's
    (`eva_clip_g` ...). `vit` overrides its sizes. `freeze_vit` keeps it as it is, `vit_lora` trains adapters in it
    alone, with the settings of peft's LoraConfig. Frozen weights are in checkpoints, which are complete.
    """

    visual_encoder: ImageEncoder

    def __init__(
        self,
        *,
        vit_type: str = "base",
        image_size: int = 224,
        vit: dict[str, Any] | None = None,
        vit_grad_ckpt: bool = False,
        vit_ckpt_layer: int = 0,
        vit_drop_path_rate: float | None = None,
        vit_layer_norm_epsilon: float = NORM_EPS,
        freeze_vit: bool = False,
        vit_lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        others = {"image_size": "image_size", "num_checkpointed": "vit_grad_ckpt and model.vit_ckpt_layer"}
        for size, instead in others.items():
            if size in (vit or {}):
                raise InputError(f"model.vit.{size}: set model.{instead} instead")
        check_number("model.vit_ckpt_layer", vit_ckpt_layer, 0, MAX_LAYERS)
        check_number("model.vit_layer_norm_epsilon", vit_layer_norm_epsilon, 0.0, 1.0)
        if vit_drop_path_rate is not None:
            check_number("model.vit_drop_path_rate", vit_drop_path_rate, 0.0, 1.0)
        if vit_type in VIT_SIZES or not is_encoder(vit_type):
            overrides = {"image_size": image_size, "norm_eps": vit_layer_norm_epsilon, **(vit or {})}
            if vit_drop_path_rate is not None:
                overrides["drop_path_rate"] = vit_drop_path_rate
            num_checkpointed = vit_ckpt_layer if vit_grad_ckpt else 0
            self.visual_encoder = BlipViT(vit_config(vit_type, num_checkpointed=num_checkpointed, **overrides))
        else:
            self.visual_encoder = other_encoder(
                vit_type,
                image_size=image_size,
                sizes=vit or {},
                drop_path_rate=vit_drop_path_rate or 0.0,
                norm_eps=vit_layer_norm_epsilon,
                grad_checkpoint=vit_grad_ckpt,
                num_checkpointed=vit_ckpt_layer,
            )
        self.freeze_vit = freeze_vit
        self.newly_initialized = (*self.newly_initialized, "lora_", ".modules_to_save.")
        adapt(inner_module(self.visual_encoder), freeze=freeze_vit, lora=vit_lora, part="vit")

    @classmethod
    def image_statistics(cls, cfg: Mapping[str, Any]) -> dict[str, list[float]] | None:
        """Return timm's `mean` and `std` for an encoder of timm's; None for all others, which take CLIP's."""
        return encoder_statistics(cfg.get("vit_type", "base"))

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen image encoder stays in evaluation mode, without drop path."""
        super().train(mode)
        if self.freeze_vit:
            self.visual_encoder.eval()
        return self

    def shard_units(self) -> list[ShardUnit]:
        return [ShardUnit(block) for block in self.visual_encoder.blocks]

    def encode_image(self, image: Tensor) -> Tensor:
        """Return the tokens (B,S,E) of images, or of videos (B,3,F,H,W) those of all frames. `image` may be tokens
        already.
        """
        return image if image.dim() == 3 else self.encoder_tokens(image)

    def frozen_encoder(self) -> nn.Module:
        if not self.reads_encoded:
            return super().frozen_encoder()
        return checked_frozen(self.visual_encoder, advice="set model.freeze_vit: true without model.vit_lora")

    def encoder_tokens(self, image: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vit):
            return frame_tokens(self.visual_encoder, image)

    def layer_scale(self, decay: float) -> Callable[[str], float]:
        return encoder_scale(self.visual_encoder, decay)

    def start_from(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        """Initialise the image encoder from a ViT (timm's name or a file)."""
        self.check_start(vit=vit, text=text)
        if vit is not None:
            state = into_wrapped(LazyState.of(vit_weights(vit, self.visual_encoder)), self.state_dict())
            init_from_state_dict(self, state, source=vit, parts=ENCODERS[:1])

    def check_start(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        if vit is not None:
            check_weight_file(vit, setting="init_vit")
        if text is not None:
            raise InputError(f"model.init_text: {type(self).__name__} has no text transformer; leave it out")

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """Resize position embeddings to this image size; put tensors of layers without LoRA into the layers that LoRA
        wraps.
        """
        own = self.state_dict()
        if isinstance(self.visual_encoder, BlipViT):
            for name in [name for name in state if name in own and name.endswith(".pos_embed")]:
                state[name] = interpolate_pos_embed(state[name], own[name].shape[1], quiet="_m." in name)
        else:
            state = self.adapted_encoders(LazyState.of(state))
        return into_wrapped(LazyState.of(state), own)

    def adapted_encoders(self, state: LazyState) -> LazyState:
        """Return the state with the tensors of both image encoders as the encoder's own class adapts them."""
        readers = dict(state.renamed(lambda name: None if name.startswith(ENCODERS) else name).readers)
        for prefix in ENCODERS:
            own = {name.removeprefix(prefix): read for name, read in state.readers.items() if name.startswith(prefix)}
            if own:
                adapted = LazyState(own).adapted(self.visual_encoder.adapt_state_dict)
                readers |= {prefix + name: read for name, read in adapted.readers.items()}
        return LazyState(readers)


def other_encoder(
    name: str,
    *,
    image_size: int,
    sizes: Mapping[str, Any],
    drop_path_rate: float,
    norm_eps: float,
    grad_checkpoint: bool,
    num_checkpointed: int,
) -> ImageEncoder:
    """Build an encoder that is not BLIP's own; gradient checkpointing is of all its blocks."""
    check_number("model.image_size", image_size, 1, MAX_IMAGE_SIZE)
    if num_checkpointed:
        problem = f"{name} recomputes all of its blocks, or none"
        raise InputError(f"model.vit_ckpt_layer: {problem}: set it to 0, and vit_grad_ckpt to true or false")
    given = dict(sizes) | ({} if norm_eps == NORM_EPS else {"norm_eps": norm_eps})
    return build_encoder(
        name, image_size=image_size, drop_path_rate=drop_path_rate, grad_checkpoint=grad_checkpoint, sizes=given
    )


def inner_module(encoder: ImageEncoder) -> nn.Module:
    """Return the module by whose names peft finds an encoder's layers; `blocks` of the encoder itself is a list."""
    return encoder.model if isinstance(encoder, TimmBased) else encoder


def adapt(module: nn.Module, *, freeze: bool, lora: Mapping[str, Any] | None, part: str) -> None:
    """Freeze a part of the model (`freeze_<part>`), or add adapters, which alone are trained then (`<part>_lora`)."""
    if freeze and lora is not None:
        raise InputError(f"model.freeze_{part}: {part}_lora trains adapters in what it freezes: set one of them")
    if freeze:
        module.requires_grad_(False)
    if lora is not None:
        add_lora(module, lora, section=f"model.{part}_lora")
