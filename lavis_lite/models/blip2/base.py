"""Base of BLIP-2's models: the image encoder, frozen or not, the Q-Former with its queries, and their weights.

Note: checkpoints leave out frozen parts that can be fetched again from their own source, so a published file holds
trainable keys only; the image encoder then comes from `vit_weights` (default: the encoder's published file).
"""

import contextlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common import checkpoint, dist
from lavis_lite.common.bounds import MAX_IMAGE_SIZE, MAX_TOKENS, check_number, one_of
from lavis_lite.common.errors import InputError, SettingError
from lavis_lite.common.precision import PRECISIONS, without_autocast
from lavis_lite.common.sharding import ShardUnit
from lavis_lite.common.sources import weights
from lavis_lite.common.sources.download import is_weight_file
from lavis_lite.common.sources.weights import LazyState
from lavis_lite.models.base import BaseModel, checked_frozen
from lavis_lite.models.blip2.hf import Blip2Adapter, blip2_from_hf, fit_vocabularies, is_hf_blip2
from lavis_lite.models.hf import HFAdapter
from lavis_lite.models.initialise import (
    TextModel,
    bert_weights,
    check_bert,
    check_weight_file,
    init_from_state_dict,
    qformer_weights,
    trained_qformer_weights,
)
from lavis_lite.models.inputs import features_of
from lavis_lite.models.tokenizers import blip2_tokenizer
from lavis_lite.nn import lora
from lavis_lite.nn.attention import MAX_VOCABULARY, CrossAttentionKV
from lavis_lite.nn.encoders import ENCODERS, PUBLISHED, build_encoder, encoder_statistics
from lavis_lite.nn.features import FEATURES, pack, unpack
from lavis_lite.nn.qformer import QFormer, QFormerConfig
from lavis_lite.nn.vision import check_sizes, encoder_scale

ENCODER = "visual_encoder."
"""Prefix of the names of the image encoder's tensors."""
RANDOM = "random"
DEFAULT_VIT = "eva_clip_g"
TEXT_PARTS = (
    *("Qformer.bert.embeddings.word_embeddings", "Qformer.bert.embeddings.position_embeddings"),
    *(".intermediate.dense.", "Qformer.cls."),
    *(f".layer.{i}.output." for i in range(48)),  # not the attention's own output
)


class Blip2Base(BaseModel):
    """Image encoder, Q-Former and queries of a BLIP-2 model.

    `vit_model` is `eva_clip_g`, `clip_L`, one of BLIP's or tiny ones, or any timm encoder; `vit` overrides its sizes
    and `vit_weights` says where a pretrained encoder comes from (a file or URL with LAVIS's, BLIP's or timm's names;
    "random" for none; default the published weights of that encoder). `vit_precision`: fp32, bf16, fp16, or auto,
    which is fp16 on a GPU (as published) and fp32 on the CPU. `qformer` overrides sizes of the Q-Former.
    `vit_model: features` takes tokens (B,N,W) that another encoder computed, `vit: {width: W}`.
    `freeze_qformer` trains neither Q-Former nor queries; `qformer_lora` trains adapters in place of the Q-Former, with
    the keys of peft's LoraConfig.
    """

    hf: ClassVar[HFAdapter[Any] | None] = Blip2Adapter()
    takes_video: ClassVar[bool] = False
    reads_encoded: ClassVar[bool] = True
    truncation_side: ClassVar[str] = "right"
    qformer_has_lm_head: ClassVar[bool] = False

    def __init__(
        self,
        qformer_reads_text: bool = True,
        /,
        *,
        vit_model: str = DEFAULT_VIT,
        image_size: int = 224,
        drop_path_rate: float = 0.0,
        use_grad_checkpoint: bool = False,
        vit_precision: str = "auto",
        freeze_vit: bool = True,
        num_query_token: int = 32,
        cross_attention_freq: int = 2,
        vit: dict[str, Any] | None = None,
        vit_weights: str | None = None,
        qformer: dict[str, Any] | None = None,
        tokenizer: str = "bert-base-uncased",
        max_txt_len: int = 32,
        freeze_qformer: bool = False,
        qformer_lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_number("model.image_size", image_size, 1, MAX_IMAGE_SIZE)
        check_number("model.num_query_token", num_query_token, 1, MAX_TOKENS)
        check_number("model.max_txt_len", max_txt_len, 3, MAX_TOKENS)
        check_number("model.drop_path_rate", drop_path_rate, 0.0, 1.0)
        self.tokenizer = blip2_tokenizer(tokenizer, truncation_side=self.truncation_side)
        self.max_txt_len = max_txt_len
        self.freeze_vit = freeze_vit
        self.visual_encoder = build_encoder(
            vit_model,
            image_size=image_size,
            drop_path_rate=drop_path_rate,
            grad_checkpoint=use_grad_checkpoint,
            sizes=vit,
        )
        self.takes_features = vit_model == FEATURES
        self.sources: dict[str, str | None] = {ENCODER: encoder_source(vit_model, vit_weights, frozen=freeze_vit)}
        self.visual_encoder.to(
            weight_dtype("vit_precision", vit_precision, auto=torch.float32, is_trained=not freeze_vit)
        )
        self.visual_encoder.requires_grad_(not freeze_vit)
        self.ln_vision = nn.LayerNorm(self.visual_encoder.width)
        num_tokens = max(self.tokenizer.vocab_size, self.tokenizer.bos_token_id + 1)  # Hugging Face adds one for images
        sizes = {"vocab_size": num_tokens, "cross_attention_freq": cross_attention_freq, **(qformer or {})}
        known = {field.name for field in fields(QFormerConfig)} - {"context_width", "has_text", "num_context_streams"}
        check_sizes("model.qformer", sizes, sorted(known))
        check_number("model.qformer.vocab_size", sizes["vocab_size"], num_tokens, MAX_VOCABULARY)
        config = QFormerConfig(**sizes, context_width=self.visual_encoder.width, has_text=qformer_reads_text)
        self.Qformer = QFormer(config, with_lm_head=self.qformer_has_lm_head)
        self.max_positions = config.max_positions
        self.query_tokens = nn.Parameter(torch.empty(1, num_query_token, config.hidden_size))
        nn.init.normal_(self.query_tokens, std=config.initializer_range)
        self.freeze_qformer = freeze_qformer
        if freeze_qformer:
            self.Qformer.requires_grad_(False)
            self.query_tokens.requires_grad_(False)
        if qformer_lora is not None:
            add_qformer_lora(self.Qformer, qformer_lora, freeze_qformer=freeze_qformer)
            self.newly_initialized += ("lora_",)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen image encoder or Q-Former stays in evaluation mode, without drop path and dropout."""
        super().train(mode)
        if self.freeze_vit:
            self.visual_encoder.eval()
        if self.freeze_qformer:
            self.Qformer.eval()
        return self

    @classmethod
    def for_device(cls, cfg: dict[str, Any], device: str | torch.device) -> dict[str, Any]:
        """Return the section with `vit_precision: auto` resolved; raise InputError for fp16 on the CPU."""
        is_gpu = torch.device(device).type == "cuda"
        for key in ("vit_precision", "llm_precision"):
            if cfg.get(key) == "fp16" and not is_gpu:
                raise InputError(f"model.{key}: fp16 does not run on the CPU: set it to auto, bf16 or fp32")
        if cfg.get("vit_precision", "auto") == "auto":
            return {**cfg, "vit_precision": "fp16" if is_gpu and cfg.get("freeze_vit", True) else "fp32"}
        return cfg

    @classmethod
    def image_statistics(cls, cfg: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return timm's `mean` and `std` for an encoder of timm's, and the width of features; None for all others,
        which take CLIP's.
        """
        if cfg.get("vit_model") == FEATURES:
            return {"width": (cfg.get("vit") or {}).get("width")}
        return encoder_statistics(cfg.get("vit_model", DEFAULT_VIT))

    def shard_units(self) -> list[ShardUnit]:
        return [] if self.takes_features else [ShardUnit(block) for block in self.visual_encoder.blocks]

    def checked_image(self, samples: Mapping[str, Any], *, answering: bool = False) -> Tensor:
        """Return the batch's `image` as `BaseModel` does, or its features with their mask in the last channel."""
        if self.takes_features:
            return features_of(samples, self.visual_encoder.width, answering=answering)
        return super().checked_image(samples, answering=answering)

    def encode_image(self, image: Tensor) -> Tensor:
        """Return the image's tokens (B,S,E) after `ln_vision`, in its precision (float32, unless the whole model was
        cast); a frozen encoder runs without gradient, and one of low precision without autocast. `image` may be
        `encoder_tokens` already. Features keep their mask, in the last channel.
        """
        if self.takes_features:
            features, mask = unpack(image)
            return pack(self.ln_vision(self.visual_encoder(features).to(self.ln_vision.weight.dtype)), mask)
        tokens = image if image.dim() == 3 else self.encoder_tokens(image)
        return self.ln_vision(tokens.to(self.ln_vision.weight.dtype))

    def encoder_tokens(self, image: Tensor) -> Tensor:
        """Return the image encoder's tokens (B,S,E), before `ln_vision`; a frozen one runs without gradient."""
        is_low = next(self.visual_encoder.parameters()).dtype != torch.float32
        autocast = without_autocast(image.device) if is_low else contextlib.nullcontext()
        with torch.no_grad() if self.freeze_vit else contextlib.nullcontext(), autocast:
            return self.visual_encoder(image)

    def frozen_encoder(self) -> nn.Module:
        if self.takes_features:
            raise SettingError("model.cache_features", f"vit_model {FEATURES} has no encoder that runs; leave it out")
        return checked_frozen(self.visual_encoder, advice="set model.freeze_vit: true")

    def project_kv(self, tokens: Tensor) -> CrossAttentionKV:
        """Return the Q-Former's keys and values of tokens from `encode_image`, with the mask of features."""
        return self.Qformer.project_kv(*unpack(tokens)) if self.takes_features else self.Qformer.project_kv(tokens)

    def of_equal_length(self, tokens: Tensor) -> Tensor:
        """Return tokens that all ranks have in the same number: features are padded to the longest."""
        if not self.takes_features or dist.world_size() == 1:
            return tokens
        longest = max(dist.gather_objects([tokens.shape[1]]))
        return F.pad(tokens, (0, 0, 0, longest - tokens.shape[1]))

    def query_states(self, context: CrossAttentionKV, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the queries' states (B,Q,E) after reading the images and, if given, a text (ids and mask, (B,T), None
        without padding).
        """
        states, _ = self.Qformer(self.query_tokens, ids, mask, context=context)
        return states[:, : self.query_tokens.shape[1]]

    def layer_scale(self, decay: float) -> Callable[[str], float]:
        return encoder_scale(self.visual_encoder, decay)

    def start_from(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        """Initialise the Q-Former from a BERT (folder or hub id), whose feed-forward layers the queries copy, or from
        the trained Q-Former of a BLIP-2 file. `add_token_type` as in `bert_weights`.
        """
        self.check_start(vit=vit, text=text)
        if text is not None and is_weight_file(text):
            self._init_qformer(trained_qformer_weights(text), source=text, parts=("Qformer.", "query_tokens"))
        elif text is not None:
            bert = bert_weights(text, self.text_model(), add_token_type=add_token_type)
            self._init_qformer(qformer_weights(bert), source=text, parts=("Qformer.",))

    def _init_qformer(self, state: Mapping[str, Tensor], *, source: str, parts: Sequence[str]) -> None:
        wrapped = lora.into_wrapped(LazyState.of(state), self.state_dict())
        init_from_state_dict(self, wrapped, source=source, parts=parts)

    def check_start(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        if vit is not None:
            raise InputError("model.init_vit: BLIP-2's image encoder is set by model.vit_model and model.vit_weights")
        if text is not None and is_weight_file(text):
            check_weight_file(text, setting="init_text")
        elif text is not None:
            check_bert(text, self.text_model())

    def text_readers(self, samples: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
        return [("text_input", "tokenizer", self.tokenizer)] if "text_input" in samples else []

    def text_model(self) -> TextModel:
        """Return the sizes and tokenizer that a BERT must share with the Q-Former."""
        return TextModel(sizes=self.Qformer.config, section="qformer", tokenizer=self.tokenizer)

    def load_frozen(self, loaded: set[str]) -> None:
        """Fetch the image encoder unless the names `loaded` from a file cover it."""
        source = self.sources[ENCODER]
        if source is None or any(name.startswith(ENCODER) for name in loaded):
            return
        state = weights.open_state(source)
        state = blip2_from_hf(state) if is_hf_blip2(state) else state
        state = encoder_state(state) or state
        report = checkpoint.load_into(
            self.visual_encoder, self.visual_encoder.adapt_state_dict(dict(state)), source=source, take=True
        )
        if report.missing:
            raise InputError(f"{source} lacks {len(report.missing)} tensors of the image encoder: {report.missing[:5]}")

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """Translate Hugging Face's names, resize position embeddings to this image size; tensors of layers without LoRA
        go into the layers that LoRA wraps or copies.
        """
        return lora.into_wrapped(self._in_our_layout(LazyState.of(state)), self.state_dict())

    def _in_our_layout(self, state: LazyState) -> LazyState:
        if is_hf_blip2(state):
            state = blip2_from_hf(state, self.llm_prefix)
            fit_vocabularies(state, self.state_dict())
        encoder = encoder_state(state)
        if not encoder:
            return state
        rest = state.renamed(lambda name: None if name.startswith(ENCODER) else name)
        encoder = encoder.adapted(self.visual_encoder.adapt_state_dict).renamed(lambda name: ENCODER + name)
        return LazyState(rest.readers | encoder.readers)

    def is_restorable(self, name: str) -> bool:
        """Return whether a frozen parameter can be fetched again from its own source."""
        return any(name.startswith(prefix) and source is not None for prefix, source in self.sources.items())


def add_qformer_lora(qformer: QFormer, settings: Mapping[str, Any], *, freeze_qformer: bool) -> None:
    """Put adapters into the Q-Former, by default into the queries and values of every attention, as in LoRA's paper."""
    where = "model.qformer_lora"
    if freeze_qformer:
        raise SettingError(where, "the Q-Former is frozen already but for the adapters; leave freeze_qformer out")
    init = settings.get("init_lora_weights", True)
    if init not in (True, False, "gaussian"):
        problem = f"{init!r} derives adapters from weights, which are loaded later; leave it out, or set gaussian"
        raise SettingError(f"{where}.init_lora_weights", problem)
    lora.add_lora(qformer, {"target_modules": ["query", "value"], **settings}, section="model.qformer_lora")


def encoder_source(vit_model: str, vit_weights: str | None, *, frozen: bool = True) -> str | None:
    """Return the source of the encoder's weights: a file or URL, `timm:<name>`, or None for random ones."""
    if vit_model == FEATURES:
        for key, value in (("vit_weights", vit_weights), ("freeze_vit", None if frozen else False)):
            if value is not None:
                raise SettingError(f"model.{key}", f"vit_model {FEATURES} has no weights; leave it out, got {value}")
        return None
    if vit_weights is None:
        return PUBLISHED.get(vit_model) if vit_model in ENCODERS else f"{weights.TIMM}{vit_model}"
    return None if vit_weights == RANDOM else vit_weights


def encoder_state(state: LazyState) -> LazyState:
    """Return the image encoder's tensors of a whole model, under the encoder's own names."""
    return state.renamed(lambda name: name.removeprefix(ENCODER) if name.startswith(ENCODER) else None)


def weight_dtype(key: str, precision: str, *, auto: torch.dtype, is_trained: bool) -> torch.dtype:
    """Return the precision of weights. InputError for an unknown one, and for weights trained in a low one."""
    dtype = PRECISIONS.get(one_of(f"model.{key}", precision, ("auto", *PRECISIONS)), auto)
    if is_trained and dtype != torch.float32:
        raise InputError(f"model.{key}: {precision} would train weights in it: set fp32 or auto; see run.precision")
    return dtype
