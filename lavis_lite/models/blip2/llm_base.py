"""What BLIP-2's models with a language model are made of: the language model, how images and texts come before it, and
what must fit before it is loaded.

Letters: B samples, F frames of a video (1 for an image), Q queries, S tokens the language model reads, T text tokens,
E width.
"""

import logging
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lavis_lite.common.bounds import MAX_TOKENS, check_number
from lavis_lite.common.errors import InputError
from lavis_lite.common.sources import weights
from lavis_lite.common.sources.weights import LazyState
from lavis_lite.models.base import chosen_weights
from lavis_lite.models.blip2.base import PRECISIONS, TEXT_PARTS, Blip2Base
from lavis_lite.models.blip2.llm_text import TextCoder, text_coder
from lavis_lite.models.inputs import image_of
from lavis_lite.nn import llm_loading, lora
from lavis_lite.nn.llm import (
    LanguageModel,
    has_weights,
    language_model_config,
    load_language_model,
)
from lavis_lite.nn.llm_sources import embedding_width
from lavis_lite.nn.lora import trains_whole_parts

logger = logging.getLogger(__name__)

TINY_WIDTH = 512
"""Below it `llm_precision: auto` follows the config file; at and above it, it is bf16."""


class LanguageModelBase(Blip2Base):
    """Queries in front of a language model.

    `prompt` begins every caption; with a gap `{}` it goes around questions instead. `qformer_text_input`: the Q-Former
    reads what the language model is asked. `llm` overrides the language model's config; `llm_precision` is fp32, bf16,
    fp16 or auto (bf16, but for tiny and for trained models); `llm_quantization` is int8 or int4; `llm_lora` holds
    settings of peft's LoraConfig, or is a folder that peft wrote.
    """

    prompt_begins_captions = True
    takes_video: ClassVar[bool] = True
    part: ClassVar[str] = "llm"
    """`<part>_model` is the language model, its setting too; `<part>_proj` projects queries to its width."""
    model_types: ClassVar[tuple[str, ...]] = ()
    """transformers' names of the families that this architecture takes; empty: any."""
    end_text: ClassVar[str | None] = None
    """What ends a text, if not the tokenizer's end token."""
    starts_with_end: ClassVar[bool] = False
    """The end token begins a text too."""
    pad_token: ClassVar[str | None] = None
    """Padding token that is added to the vocabulary."""
    answer_repetition_penalty: ClassVar[float] = 1.0
    prompt_limit: int | None = None
    """Tokens to which `generate` and `predict_answers` cut prompts before they write; None: they do not."""
    bare_candidates: ClassVar[bool] = False
    """Candidates are scored without end token, by the mean over all positions of image, prompt and longest candidate.
    """

    def __init__(
        self,
        source: str,
        /,
        *,
        prompt: str = "",
        max_output_txt_len: int | None = None,
        apply_lemmatizer: bool = False,
        qformer_text_input: bool = False,
        llm_precision: str = "auto",
        llm: dict[str, Any] | None = None,
        llm_lora: dict[str, Any] | str | None = None,
        llm_quantization: str | None = None,
        llm_grad_checkpoint: bool = False,
        freeze_llm: bool = True,
        **parts: Any,
    ) -> None:
        if max_output_txt_len is not None:
            check_number("model.max_output_txt_len", max_output_txt_len, 1, MAX_TOKENS)
        config = self.language_model_config(source, llm)
        llm_lora = lora.lora_settings(llm_lora)
        dtype = llm_dtype(llm_precision, config, frozen=freeze_llm, lora=llm_lora)
        tokenizer = llm_loading.check_language_model(
            source, config, quantization=llm_quantization, lora=llm_lora, overrides=llm
        )
        self.coder = self.text_coder(tokenizer, config)
        self.qformer_text_input = qformer_text_input  # the Q-Former is built with or without text
        super().__init__(**parts)
        model, _ = load_language_model(
            source,
            dtype=dtype,
            tokenizer=tokenizer,
            overrides=llm,
            pad_token=self.pad_token,
            frozen=freeze_llm,
            quantization=llm_quantization,
            lora=llm_lora,
            grad_checkpoint=llm_grad_checkpoint,
        )
        self.prompt, self.apply_lemmatizer = prompt, apply_lemmatizer
        self.max_output_txt_len = max_output_txt_len or self.max_txt_len
        setattr(self, f"{self.part}_model", model)
        self.lm = LanguageModel(
            model, start_id=start_id(config, self.coder), end_id=self.coder.end_id, pad_id=self.coder.pad_id
        )
        setattr(self, f"{self.part}_proj", nn.Linear(self.Qformer.config.hidden_size, self.lm.width))
        self.lm_source = source
        self.sources[f"{self.part}_model."] = source if has_weights(source) else None
        self.adapter = (llm_lora or {}).get(lora.ADAPTER)
        self.loaded_later = () if self.adapter is None else (f"{self.part}_model.",)
        self.new_parts = (f"{self.part}_proj.", "lora_", ".modules_to_save.", ".token_adapter.")
        self.new_parts += TEXT_PARTS if qformer_text_input else ()
        self.new_parts += () if freeze_llm else (f"{self.part}_model.",)

    @property
    def qformer_has_text(self) -> bool:
        """Whether the Q-Former reads the prompt."""
        return self.qformer_text_input

    @property
    def proj(self) -> nn.Linear:
        """From the queries' width to the language model's."""
        return getattr(self, f"{self.part}_proj")

    @classmethod
    def language_model_config(cls, source: str, overrides: dict[str, Any] | None) -> PreTrainedConfig:
        """The language model's config. ValueError if this architecture does not take its family."""
        if not isinstance(source, str | Path):
            raise InputError(f"model.{cls.part}_model is missing: a folder, a hub id or a packaged tiny language model")
        config = language_model_config(source, overrides)
        if cls.model_types and config.model_type not in cls.model_types:
            raise InputError(
                f"model.{cls.part}_model={source} is a {config.model_type}, and {cls.__name__} takes "
                f"{' or '.join(cls.model_types)} only: use arch blip2_llm (llm_model) for any language model"
            )
        return config

    @classmethod
    def from_config(cls, cfg: dict[str, Any], *, device: str | torch.device = "cpu") -> Self:
        """As Blip2Base's; what does not fit is said before the language model is loaded."""
        if cfg.get("llm_precision") == "fp16" and torch.device(device).type == "cpu":
            raise InputError("model.llm_precision=fp16 does not run on the CPU: set it to auto, bf16 or fp32")
        key = f"{cls.part}_model"
        source = cfg.get(key, cls.__signature__.parameters[key].default)
        config = cls.language_model_config(source, cfg.get("llm"))
        chosen = chosen_weights(cfg)
        if chosen is not None:
            check_fit(weights.open_state(chosen[1]), config, part=cls.part, source=chosen[1], llm=source)
        return super().from_config(cfg, device=device)

    @classmethod
    def text_coder(cls, tokenizer: Any, config: PreTrainedConfig) -> TextCoder:
        """What this architecture puts around a text. The tokenizer is told too, for those who use it outside."""
        if cls.starts_with_end:
            tokenizer.bos_token = tokenizer.eos_token
            tokenizer.add_bos_token = True  # builds its template anew
        return text_coder(
            tokenizer,
            is_encoder_decoder=config.is_encoder_decoder,
            end=cls.end_text,
            start_with_end=cls.starts_with_end,
            truncation_side=cls.truncation_side,
        )

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """As Blip2Base's; layers of a language model without LoRA go into those that LoRA wraps or copies."""
        state, own = LazyState.of(super().adapt_state_dict(state)), self.state_dict()
        wrapped = lora.targets(own)
        readers = {}
        for name, read in state.readers.items():
            names = [name] if name in own else wrapped.get(name, [name])
            readers |= {inner: read for inner in names if inner == name or inner not in state}
        return LazyState(readers)

    def load_frozen(self, loaded: set[str]) -> None:
        """As Blip2Base's; then adapters from a folder of their own, unless the file had them."""
        super().load_frozen(loaded)
        prefix = f"{self.part}_model."
        if self.sources[prefix] is None and not any(name.startswith(prefix) for name in loaded):
            logger.warning(f"{self.lm_source} has no weights: the language model's are random")
        if self.adapter is not None and not any(".lora_" in name for name in loaded):
            lora.load_adapter(self.lm.model, self.adapter)

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """As BaseModel's; of a language model that can be fetched again, also its buffers stay out."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        prefix = f"{self.part}_model."
        state = super().checkpoint_state_dict()
        return {
            name: tensor
            for name, tensor in state.items()
            if not name.startswith(prefix) or name in trained or not self.is_restorable(name)
        }

    def see(self, samples: dict[str, Any], instructions: list[str]) -> Tensor:
        """What the language model reads of an `image` (B,3,H,W) or video (B,3,F,H,W): (B,FxQ,E), frame after frame."""
        image = image_of(samples, video=True)
        frames = image.transpose(1, 2) if image.dim() == 5 else image[:, None]
        num_frames = frames.shape[1]
        context = self.Qformer.project_kv(self.encode_image(frames.flatten(0, 1)))
        ids = mask = None
        if self.qformer_text_input:
            repeated = [text for text in instructions for _ in range(num_frames)]
            ids, mask = self.tokenize(repeated, max_length=self.max_txt_len)
        return self.proj(self.query_states(context, ids, mask)).view(len(image), -1, self.lm.width)

    def joined(self, seen_BQE: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B,S,E) and mask (B,S) of what was seen and then read."""
        dtype = self.lm.dtype
        embeds = torch.cat([seen_BQE.to(dtype), self.lm.embed(ids_BT).to(dtype)], dim=1)
        return embeds, torch.cat([mask_BT.new_ones(seen_BQE.shape[:2]), mask_BT], dim=1)

    def asked(
        self, samples: dict[str, Any], prompts: list[str], *, max_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of the images and these prompts, cut to `max_length` tokens if it is given."""
        rows = self.coder.inputs(prompts, max_length=max_length)
        return self.joined(self.see(samples, prompts), *self.pad(rows))

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B,T) on the model's device."""
        return tuple(tensor.to(self.device) for tensor in self.coder.pad(rows))


def llm_dtype(
    precision: str, config: PreTrainedConfig, *, frozen: bool, lora: Mapping[str, Any] | None = None
) -> torch.dtype:
    """The language model's precision. ValueError for an unknown one, and for training weights in a low one."""
    if precision not in ("auto", *PRECISIONS):
        raise InputError(f"llm_precision {precision!r} is not one of auto, {', '.join(PRECISIONS)}")
    if trains_whole_parts(lora):
        if precision not in ("auto", "fp32"):
            raise InputError(
                f"llm_precision {precision} with bias, modules_to_save or trainable_token_indices in llm_lora would "
                "train weights of the language model in it: set fp32 or auto"
            )
        return torch.float32
    if precision == "auto":
        tiny = config.dtype == torch.float32 and embedding_width(config) < TINY_WIDTH
        return torch.float32 if tiny or not frozen else torch.bfloat16
    if not frozen and precision != "fp32":
        raise InputError(f"llm_precision {precision} with freeze_llm=False would train weights in it: set fp32 or auto")
    return PRECISIONS[precision]


def start_id(config: PreTrainedConfig, coder: TextCoder) -> int:
    """The token that generation starts from."""
    name = "decoder_start_token_id" if config.is_encoder_decoder else "bos_token_id"
    found = (getattr(part, name, None) for part in (config, config.get_text_config()))
    return next((i for i in found if i is not None), coder.before[0] if coder.before else coder.end_id)


def check_fit(state: Mapping[str, Tensor], config: PreTrainedConfig, *, part: str, source: str, llm: str) -> None:
    """ValueError if a checkpoint was made with a language model of another width or vocabulary."""
    width, vocabulary = embedding_width(config), config.get_text_config().vocab_size
    advice = f"set model.{part}_model to the one that it was made with"
    for name in state:
        if name == f"{part}_proj.weight" and len(state[name]) != width:
            raise InputError(
                f"{source} was made for a language model of width {len(state[name])}, but {llm} has {width}: {advice}"
            )
        is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight", "shared.weight"))
        if name.startswith(f"{part}_model.") and is_vocabulary and not 0 <= len(state[name]) - vocabulary <= 1:
            raise InputError(
                f"{source} was made with a vocabulary of {len(state[name])} tokens ({name}), but {llm} has "
                f"{vocabulary}: {advice}"
            )
