"""Base class of BLIP's models: tokenizer, image encoder, text transformer sizes, loading of published files."""

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import deepcopy
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor

from lavis_lite.common.bounds import MAX_LAYERS, MAX_TOKENS, check_number
from lavis_lite.common.errors import InputError
from lavis_lite.models.base import BaseModel
from lavis_lite.models.blip.hf import BlipAdapter, blip_from_hf, is_hf_blip
from lavis_lite.models.initialise import (
    TextModel,
    bert_weights,
    blip_text_weights,
    check_bert,
    check_weight_file,
    init_from_state_dict,
    vit_weights,
)
from lavis_lite.models.tokenizers import blip_tokenizer
from lavis_lite.nn.attention import MAX_VOCABULARY, BertConfig
from lavis_lite.nn.momentum import ModulePair, copy_parameters
from lavis_lite.nn.video import frame_tokens
from lavis_lite.nn.vision import BlipViT, check_sizes, encoder_scale, interpolate_pos_embed, vit_config

logger = logging.getLogger(__name__)


class BlipBase(BaseModel):
    """Image encoder and tokenizer of a BLIP model.

    `vit` and `med` override sizes of the image encoder (`ViTConfig`) and of the text transformer (`BertConfig`).
    """

    hf = BlipAdapter()
    learns_answers: ClassVar[bool] = False
    momentum_parts: tuple[str, ...] = ()
    """Modules that have a momentum encoder, `<name>_m`."""

    def __init__(
        self,
        *,
        vit_type: str = "base",
        image_size: int = 224,
        vit: dict[str, Any] | None = None,
        vit_grad_ckpt: bool = False,
        vit_ckpt_layer: int = 0,
        vit_drop_path_rate: float | None = None,
        vit_layer_norm_epsilon: float = 1e-6,
        med: dict[str, Any] | None = None,
        tokenizer: str = "bert-base-uncased",
        max_txt_len: int = 35,
    ) -> None:
        super().__init__()
        others = {"image_size": "image_size", "num_checkpointed": "vit_grad_ckpt and model.vit_ckpt_layer"}
        for size, instead in others.items():
            if size in (vit or {}):
                raise InputError(f"model.vit.{size}: set model.{instead} instead")
        check_number("model.vit_ckpt_layer", vit_ckpt_layer, 0, MAX_LAYERS)
        check_number("model.max_txt_len", max_txt_len, 3, MAX_TOKENS)
        check_number("model.vit_layer_norm_epsilon", vit_layer_norm_epsilon, 0.0, 1.0)
        overrides = {"image_size": image_size, "norm_eps": vit_layer_norm_epsilon, **(vit or {})}
        if vit_drop_path_rate is not None:
            overrides["drop_path_rate"] = check_number("model.vit_drop_path_rate", vit_drop_path_rate, 0.0, 1.0)
        self.visual_encoder = BlipViT(
            vit_config(vit_type, num_checkpointed=vit_ckpt_layer if vit_grad_ckpt else 0, **overrides)
        )
        self.tokenizer = blip_tokenizer(tokenizer)
        self.max_txt_len = max_txt_len
        self.med = {"vocab_size": len(self.tokenizer), **(med or {})}
        known = {field.name for field in fields(BertConfig)} - {"context_width", "num_context_streams"}
        check_sizes("model.med", self.med, sorted(known))
        check_number("model.med.vocab_size", self.med["vocab_size"], len(self.tokenizer), MAX_VOCABULARY)
        self.max_positions = self.text_config().max_positions

    def text_config(self, context_width: int | None = None, **sizes: Any) -> BertConfig:
        """Return sizes of a text transformer that attends to states of this width (default: the image encoder's)."""
        width = self.visual_encoder.width if context_width is None else context_width
        return BertConfig(**self.med, context_width=width, **sizes)

    def encode_image(self, image: Tensor) -> Tensor:
        """Return the tokens (B,S,E) of images, or of videos (B,3,F,H,W) those of all frames."""
        return frame_tokens(self.visual_encoder, image)

    @property
    def encoder_start(self) -> int:
        """Id of `[ENC]`."""
        return self.tokenizer.enc_token_id

    def layer_scale(self, decay: float) -> Callable[[str], float]:
        return encoder_scale(self.visual_encoder, decay)

    def start_from(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        """Initialise from an ImageNet ViT (timm's name or a file) and/or a BERT (folder or hub id) as in BLIP's
        pretraining; momentum encoders become copies. `add_token_type` as in `bert_weights`.
        """
        if vit is not None:
            init_from_state_dict(self, vit_weights(vit, self.visual_encoder), source=vit, parts=("visual_encoder.",))
        if text is not None:
            bert = bert_weights(text, self.text_model(), add_token_type=add_token_type)
            parts = [f"{name}." for name in ("text_encoder", "text_decoder") if name in dict(self.named_children())]
            init_from_state_dict(self, blip_text_weights(bert), source=text, parts=parts)
        self.after_loading({})

    def check_start(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        if vit is not None:
            check_weight_file(vit, setting="init_vit")
        if text is not None:
            check_bert(text, self.text_model())

    def add_momentum_encoders(self, parts: Sequence[str], *, momentum: float, alpha: float) -> None:
        """Add a momentum encoder of each part; `alpha` is the weight of their soft labels."""
        self.momentum = check_number("model.momentum", momentum, 0.0, 1.0)
        self.alpha = check_number("model.alpha", alpha, 0.0, 1.0)
        self.momentum_parts = tuple(parts)
        for name in parts:
            self.add_module(f"{name}_m", deepcopy(self.get_submodule(name)).requires_grad_(False))

    def momentum_pairs(self) -> list[ModulePair]:
        """Return the (online, momentum) modules."""
        return [(self.get_submodule(name), self.get_submodule(f"{name}_m")) for name in self.momentum_parts]

    def after_loading(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights to the momentum encoders if the file has none (LAVIS saves none, and left them stale)."""
        if not any(name.startswith("visual_encoder_m.") for name in state):
            copy_parameters(self.momentum_pairs())

    def text_readers(self, samples: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
        return [(key, "tokenizer", self.tokenizer) for key in ("text_input", "answer") if key in samples]

    def text_model(self) -> TextModel:
        """Return the sizes and the tokenizer that a BERT must share with this model."""
        return TextModel(sizes=self.text_config(), section="med", tokenizer=self.tokenizer)

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """Translate Hugging Face's names, resize position embeddings to this image size, leave out feature queues of
        another length.
        """
        own = self.state_dict()
        if is_hf_blip(state):
            state = blip_from_hf(state)
        for name in [name for name in state if name in own]:
            if name.endswith(".pos_embed"):
                state[name] = interpolate_pos_embed(state[name], own[name].shape[1], quiet="_m." in name)
            elif name.endswith("_queue") and own[name].shape != state[name].shape:
                logger.info(
                    f"{name} of {state[name].shape[-1]} columns is left out: the model's has {own[name].shape[-1]}"
                )
                del state[name]
        if own.keys() & {"queue_ptr"} and not {"image_queue", "text_queue"} <= state.keys():
            state.pop("queue_ptr", None)
        return state


def ramp(samples: dict[str, Any], alpha: float, num_epochs: int) -> float:
    """Return alpha, ramped up linearly over the first epochs as in ALBEF; the full alpha if samples have no epoch."""
    if "epoch" not in samples:
        return alpha
    per_epoch = samples["num_iters_per_epoch"]
    return alpha * min(1.0, (samples["epoch"] * per_epoch + samples["iters"]) / (num_epochs * per_epoch))
