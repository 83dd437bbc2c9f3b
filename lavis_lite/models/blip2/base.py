"""What BLIP-2's models share: the image encoder, frozen or not, the Q-Former with its queries, and their weights.

Surprising: checkpoints leave out what is frozen and can be fetched again from its own source, so a published file
holds trainable keys only; the image encoder then comes from `vit_weights` (default: the encoder's published file).
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lavis_lite.common import checkpoint
from lavis_lite.common.bounds import (
    MAX_IMAGE_SIZE,
    MAX_TOKENS,
    check_number,
    check_numbers,
)
from lavis_lite.common.errors import InputError
from lavis_lite.common.precision import PRECISIONS
from lavis_lite.common.sources import weights
from lavis_lite.common.sources.weights import LazyState
from lavis_lite.convert import blip2_from_hf, is_hf_blip2
from lavis_lite.convert.blip2 import fit_vocabularies
from lavis_lite.models.base import BaseModel
from lavis_lite.models.initialise import (
    TextModel,
    bert_weights,
    check_bert,
    check_weight_file,
    is_weight_file,
    qformer_weights,
    start_from,
    trained_qformer_weights,
)
from lavis_lite.models.tokenizers import blip2_tokenizer, tokenize
from lavis_lite.nn.attention import MAX_VOCABULARY, Context
from lavis_lite.nn.decoding import DecodingConfig
from lavis_lite.nn.encoders import (
    ENCODERS,
    PUBLISHED,
    build_encoder,
    encoder_statistics,
    timm_weights,
)
from lavis_lite.nn.qformer import QFormer, QFormerConfig

logger = logging.getLogger(__name__)

RANDOM = "random"
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
    """

    takes_video: ClassVar[bool] = False
    truncation_side: ClassVar[str] = "right"

    def __init__(
        self,
        *,
        vit_model: str = "eva_clip_g",
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
    ) -> None:
        super().__init__()
        check_numbers(
            "model",
            {"image_size": image_size, "num_query_token": num_query_token, "max_txt_len": max_txt_len},
            image_size=(1, MAX_IMAGE_SIZE),
            num_query_token=(1, MAX_TOKENS),
            max_txt_len=(3, MAX_TOKENS),
        )
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
        self.sources = {"visual_encoder.": encoder_source(vit_model, vit_weights)}
        self._freeze_encoder(vit_precision)
        self.ln_vision = nn.LayerNorm(self.visual_encoder.width)
        num_tokens = num_text_tokens(self.tokenizer)
        config = qformer_config(
            {"vocab_size": num_tokens, "cross_attention_freq": cross_attention_freq, **(qformer or {})},
            num_tokens=num_tokens,
            context_width=self.visual_encoder.width,
            has_text=self.qformer_has_text,
        )
        self.Qformer = QFormer(config, with_lm_head=self.qformer_has_lm_head)
        self.query_tokens = nn.Parameter(torch.empty(1, num_query_token, config.hidden_size))
        nn.init.normal_(self.query_tokens, std=config.initializer_range)

    @property
    def qformer_has_text(self) -> bool:
        """Whether the Q-Former reads text."""
        return True

    @property
    def qformer_has_lm_head(self) -> bool:
        """Whether the Q-Former writes text."""
        return False

    def _freeze_encoder(self, precision: str) -> None:
        dtype = PRECISIONS["fp32"] if precision == "auto" else PRECISIONS.get(precision)
        if dtype is None:
            raise InputError(f"vit_precision {precision!r} is not one of auto, {', '.join(PRECISIONS)}")
        if not self.freeze_vit and dtype != torch.float32:
            raise InputError(
                f"vit_precision {precision} with freeze_vit=False would train weights in {precision}: "
                "set vit_precision=fp32 (run.precision still chooses what it computes in)"
            )
        self.visual_encoder.to(dtype)
        if self.freeze_vit:
            self.visual_encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """A frozen image encoder stays in evaluation mode, without drop path."""
        super().train(mode)
        if self.freeze_vit:
            self.visual_encoder.eval()
        return self

    @classmethod
    def from_config(cls, cfg: dict[str, Any], *, device: str | torch.device = "cpu") -> Self:
        """As BaseModel's, and then the frozen parts from their own sources, unless the file had them."""
        cfg = {**cfg, "vit_precision": encoder_precision(cfg, torch.device(device))}
        return super().from_config(cfg, device=device)

    @classmethod
    def image_statistics(cls, cfg: Mapping[str, Any]) -> dict[str, list[float]] | None:
        """Return timm's `mean` and `std` for an encoder of timm's; None for all others, which take CLIP's."""
        return encoder_statistics(cfg.get("vit_model", cls.__signature__.parameters["vit_model"].default))

    def encode_image(self, image: Tensor) -> Tensor:
        """The image's tokens (B,S,E) behind `ln_vision`, in its precision (float32, unless the whole model was cast); a
        frozen encoder runs without gradient in its own.
        """
        with self._encoder_scope(image):
            tokens = self.visual_encoder(image)
        return self.ln_vision(tokens.to(self.ln_vision.weight.dtype))

    @contextlib.contextmanager
    def _encoder_scope(self, image: Tensor) -> Iterator[None]:
        low_precision = next(self.visual_encoder.parameters()).dtype != torch.float32
        with contextlib.ExitStack() as stack:
            if self.freeze_vit:
                stack.enter_context(torch.no_grad())
            if low_precision:
                stack.enter_context(torch.autocast(image.device.type, enabled=False))
            yield

    def query_states(self, context: Context, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """What the queries saw in the images, (B,Q,E); with a text (ids and mask, (B,T)) they saw that too."""
        states, _ = self.Qformer(self.query_tokens, ids, mask, context=context)
        return states[:, : self.query_tokens.shape[1]]

    def tokenize(
        self, texts: Sequence[str], *, start: int | None = None, max_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The Q-Former's ids and mask (B,T), padded to the longest; `start` replaces [CLS]; `max_length` truncates."""
        return tokenize(self.tokenizer, texts, start=start, max_length=max_length, device=self.device)

    @property
    def decoder_start(self) -> int:
        """Id of `[DEC]`."""
        return self.tokenizer.bos_token_id

    def labels(self, ids: Tensor) -> Tensor:
        """Labels of a language-model loss: padding does not count."""
        return ids.masked_fill(ids == self.tokenizer.pad_token_id, -100)

    def decoding(self, **settings: Any) -> DecodingConfig:
        """Decoding settings with the Q-Former tokenizer's end and padding tokens, and its positions."""
        return DecodingConfig(
            eos_id=self.tokenizer.sep_token_id,
            pad_id=self.tokenizer.pad_token_id,
            max_positions=self.Qformer.config.max_positions,
            **settings,
        )

    def layer_scale(self, decay: float) -> Callable[[str], float]:
        prefix = "visual_encoder."
        return lambda name: (
            self.visual_encoder.layer_scale(name.removeprefix(prefix), decay) if name.startswith(prefix) else 1.0
        )

    def start_from(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        """The Q-Former starts from a BERT (folder or hub id), or from the trained one of a BLIP-2 file; the queries'
        feed-forward is a copy of BERT's. `add_token_type` as in `bert_weights`.
        """
        self.check_start(vit=vit, text=text)
        if text is None:
            return
        if is_weight_file(text):
            start_from(self, trained_qformer_weights(text), source=text, parts=("Qformer.", "query_tokens"))
        else:
            bert = bert_weights(text, self.text_model(), add_token_type=add_token_type)
            start_from(self, qformer_weights(bert), source=text, parts=("Qformer.",))

    def check_start(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        if vit is not None:
            raise InputError("BLIP-2's image encoder is chosen by model.vit_model and model.vit_weights, not init_vit")
        if text is not None and is_weight_file(text):
            check_weight_file(text, setting="init_text")
        elif text is not None:
            check_bert(text, self.text_model())

    def text_model(self) -> TextModel:
        """What a BERT must have in common with the Q-Former."""
        return TextModel(sizes=self.Qformer.config, section="qformer", tokenizer=self.tokenizer)

    def load_frozen(self, loaded: set[str]) -> None:
        """Fetch the image encoder unless the names `loaded` from a file cover it."""
        prefix = "visual_encoder."
        source = self.sources[prefix]
        if source is None or any(name.startswith(prefix) for name in loaded):
            return
        if source.startswith("timm:"):
            state = timm_weights(source.removeprefix("timm:"))
        else:
            state = weights.open_state(source)
            state = blip2_from_hf(state) if is_hf_blip2(state) else state
        if any(name.startswith(prefix) for name in state):
            state = {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
        state = self.visual_encoder.adapt_state_dict(state)
        report = checkpoint.load_into(self.visual_encoder, state, source=source)
        if report.missing:
            raise InputError(f"{source} lacks {len(report.missing)} tensors of the image encoder: {report.missing[:5]}")

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """Translate Hugging Face's names, resize position embeddings to this image size."""
        state, prefix = LazyState.of(state), "visual_encoder."
        if is_hf_blip2(state):
            state = blip2_from_hf(state, getattr(self, "part", None))
            fit_vocabularies(state, self.state_dict())
        encoder = state.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
        if not encoder:
            return state
        rest = state.renamed(lambda name: None if name.startswith(prefix) else name)
        encoder = encoder.adapted(self.visual_encoder.adapt_state_dict).renamed(lambda name: prefix + name)
        return LazyState(rest.readers | encoder.readers)

    def is_restorable(self, name: str) -> bool:
        """Whether a frozen parameter can be fetched again from its own source."""
        return any(name.startswith(prefix) and source is not None for prefix, source in self.sources.items())


def num_text_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that texts can have: all up to `[DEC]`, behind which Hugging Face adds one for images."""
    return max(tokenizer.vocab_size, tokenizer.bos_token_id + 1)


def encoder_source(vit_model: str, vit_weights: str | None) -> str | None:
    """Where the encoder's weights come from: a file or URL, `timm:<name>`, or None for random ones."""
    if vit_weights == RANDOM:
        return None
    if vit_weights is not None:
        return vit_weights
    if vit_model in ENCODERS:
        return PUBLISHED.get(vit_model)
    return f"timm:{vit_model}"


def encoder_precision(cfg: dict[str, Any], device: torch.device) -> str:
    """`vit_precision` with `auto` resolved for the device. ValueError for fp16 on the CPU, which has no kernels for
    it.
    """
    precision = cfg.get("vit_precision", "auto")
    if precision == "auto":
        return "fp16" if device.type == "cuda" and cfg.get("freeze_vit", True) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise InputError("model.vit_precision=fp16 does not run on the CPU: set it to auto, bf16 or fp32")
    return precision


def qformer_config(sizes: dict[str, Any], *, num_tokens: int, context_width: int, has_text: bool) -> QFormerConfig:
    """The Q-Former's sizes. ValueError for unknown ones and for a vocabulary smaller than the tokenizer's."""
    known = {field.name for field in fields(QFormerConfig)} - {"context_width", "has_text", "num_context_streams"}
    unknown = sorted(sizes.keys() - known)
    if unknown:
        raise InputError(f"qformer has no size {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    check_number("model.qformer.vocab_size", sizes["vocab_size"], num_tokens, MAX_VOCABULARY)
    return QFormerConfig(**sizes, context_width=context_width, has_text=has_text)
