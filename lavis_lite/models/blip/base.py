"""Base class of BLIP's models: tokenizer, image encoder, text transformer sizes, loading of published files."""

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from copy import deepcopy
from dataclasses import fields
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_TOKENS, check_number
from lavis_lite.common.errors import InputError
from lavis_lite.common.sharding import ShardUnit
from lavis_lite.common.sources.weights import LazyState
from lavis_lite.models.blip.hf import BlipAdapter, blip_from_hf, is_hf_blip
from lavis_lite.models.blip.vision import BlipVision, adapt
from lavis_lite.models.initialise import (
    TextModel,
    bert_weights,
    blip_text_weights,
    check_bert,
    init_from_state_dict,
)
from lavis_lite.models.tokenizers import blip_tokenizer
from lavis_lite.nn.attention import MAX_VOCABULARY, BertConfig
from lavis_lite.nn.lora import into_wrapped
from lavis_lite.nn.momentum import ModulePair, copy_parameters
from lavis_lite.nn.vision import check_sizes

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=nn.Module)
TEXT_PARTS = ("text_encoder", "text_decoder")


class BlipBase(BlipVision):
    """Image encoder and tokenizer of a BLIP model.

    `med` overrides sizes of the text transformer (`BertConfig`). `freeze_text` keeps text encoder and decoder as they
    are, `text_lora` trains adapters in them alone, with the settings of peft's LoraConfig.
    """

    hf = BlipAdapter()
    learns_answers: ClassVar[bool] = False
    momentum_parts: tuple[str, ...] = ()
    """Modules that have a momentum encoder, `<name>_m`."""

    def __init__(
        self,
        *,
        med: dict[str, Any] | None = None,
        tokenizer: str = "bert-base-uncased",
        max_txt_len: int = 35,
        freeze_text: bool = False,
        text_lora: dict[str, Any] | None = None,
        **vision: Any,
    ) -> None:
        super().__init__(**vision)
        check_number("model.max_txt_len", max_txt_len, 3, MAX_TOKENS)
        self.freeze_text, self.text_lora = freeze_text, text_lora
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

    def adapted(self, text: T) -> T:
        """Return a text transformer, frozen or with adapters as the settings say."""
        adapt(text, freeze=self.freeze_text, lora=self.text_lora, part="text")
        return text

    def train(self, mode: bool = True) -> Self:
        """Set the mode; frozen parts stay in evaluation mode, without dropout."""
        super().train(mode)
        for name, part in self.named_children():
            if self.freeze_text and name in TEXT_PARTS:
                part.eval()
        return self

    @property
    def encoder_start(self) -> int:
        """Id of `[ENC]`."""
        return self.tokenizer.enc_token_id

    def start_from(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        """Initialise from an ImageNet ViT (timm's name or a file) and/or a BERT (folder or hub id) as in BLIP's
        pretraining; momentum encoders become copies. `add_token_type` as in `bert_weights`.
        """
        super().start_from(vit=vit)
        if text is not None:
            bert = bert_weights(text, self.text_model(), add_token_type=add_token_type)
            parts = [f"{name}." for name in TEXT_PARTS if name in dict(self.named_children())]
            state = into_wrapped(LazyState.of(blip_text_weights(bert)), self.state_dict())
            init_from_state_dict(self, state, source=text, parts=parts)
        self.after_loading({})

    def check_start(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        super().check_start(vit=vit)
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

    def shard_units(self) -> list[ShardUnit]:
        if self.momentum_parts:
            problem = f"{type(self).__name__} updates its momentum encoders, and the queue, from whole parameters"
            raise InputError(f"run.parallel: fsdp: {problem}; set run.parallel: ddp")
        return super().shard_units()

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
        state = super().adapt_state_dict(blip_from_hf(state) if is_hf_blip(state) else state)
        own = self.state_dict()
        for name in [name for name in state if name in own]:
            if name.endswith("_queue") and own[name].shape != state[name].shape:
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
