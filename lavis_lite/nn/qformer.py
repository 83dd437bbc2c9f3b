"""BLIP-2's querying transformer: BERT with learned queries that look at an image (BLIP-2, section 3.1, figure 2).

Queries and text share the self-attention; only queries cross-attend, in every second layer, and each has its own
feed-forward. Surprising: queries get neither word nor position embeddings, but the embeddings' LayerNorm. A pass of
the queries alone leaves keys and values that serve as the prefix of generated text, because queries never see text
that is predicted.

Letters: B samples, Q queries, T text tokens, P cached tokens, S image tokens, E width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_LAYERS, check_numbers
from lavis_lite.common.errors import InputError
from lavis_lite.nn.attention import (
    SELF_MASKED,
    AddNorm,
    Attention,
    BertConfig,
    Context,
    KeyValue,
    context_mask,
)
from lavis_lite.nn.bert import Intermediate, LanguageModelHead

AttentionKind = Literal["bidirectional", "causal", "unimodal"]


@dataclass(frozen=True, kw_only=True)
class QFormerConfig(BertConfig):
    """Sizes of the Q-Former; the defaults are BERT-base with the extra token `[DEC]`."""

    vocab_size: int = 30523
    cross_attention_freq: int = 2
    """Layers 0, freq, 2 freq ... cross-attend."""
    has_text: bool = True
    """Whether it can read text: word and position embeddings and the text's feed-forward exist."""
    section: ClassVar[str] = "model.qformer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("model", vars(self), cross_attention_freq=(1, MAX_LAYERS))


class QFormerLayer(nn.Module):
    """Joint self-attention, cross-attention of the queries, separate feed-forwards."""

    def __init__(self, config: QFormerConfig, index: int) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.crossattention = (
            Attention(config, config.context_width) if index % config.cross_attention_freq == 0 else None
        )
        if config.has_text:
            self.intermediate = Intermediate(config)
            self.output = AddNorm(config, config.intermediate_size)
        self.intermediate_query = Intermediate(config)
        self.output_query = AddNorm(config, config.intermediate_size)

    def project(self, image_BSE: Tensor) -> tuple[KeyValue, ...]:
        """The image's keys and values, or nothing in a layer that does not cross-attend."""
        return () if self.crossattention is None else self.crossattention.project((image_BSE,))

    def forward(
        self,
        x_BLE: Tensor,
        mask: Tensor | None,
        *,
        num_queries: int,
        past: KeyValue | None,
        context: Sequence[KeyValue],
        context_mask: Tensor | None,
    ) -> tuple[Tensor, KeyValue]:
        """New states of the queries (first) and the text, and this layer's keys and values, cached ones first."""
        key_value = self.attention.self.project(x_BLE)
        if past is not None:
            key_value = tuple(torch.cat(pair, dim=2) for pair in zip(past, key_value, strict=True))
        x_BLE = self.attention(x_BLE, (key_value,), mask)
        parts = []
        if num_queries:
            queries = x_BLE[:, :num_queries]
            if context:
                queries = self.crossattention(queries, context, context_mask)
            parts.append(self.output_query(self.intermediate_query(queries), queries))
        if num_queries < x_BLE.shape[1]:
            text = x_BLE[:, num_queries:]
            parts.append(self.output(self.intermediate(text), text))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), key_value


class QFormerEmbeddings(nn.Module):
    """Queries as they are, words with learned positions; one LayerNorm over both."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        if config.has_text:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
            self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.register_buffer("position_ids", torch.arange(config.max_positions)[None])

    def forward(self, queries_BQE: Tensor | None, ids_BT: Tensor | None, start: int = 0) -> Tensor:
        """(B,Q+T,E); the text stands at positions start, start+1, ..."""
        parts = [] if queries_BQE is None else [queries_BQE]
        if ids_BT is not None:
            stop, limit = start + ids_BT.shape[1], self.position_ids.shape[1]
            if stop > limit:
                raise InputError(f"a text of {stop} tokens is longer than the {limit} positions of the Q-Former")
            parts.append(self.word_embeddings(ids_BT) + self.position_embeddings(self.position_ids[:, start:stop]))
        return self.dropout(self.LayerNorm(torch.cat(parts, dim=1)))


class QFormerEncoder(nn.Module):
    """The stack of layers, named as in BERT."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(QFormerLayer(config, i) for i in range(config.num_layers))


class QFormerBert(nn.Module):
    """Embeddings and layers, under the names of the published files."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.embeddings = QFormerEmbeddings(config)
        self.encoder = QFormerEncoder(config)


class QFormer(nn.Module):
    """Queries and/or text in, states out. `with_lm_head` adds BERT's head `cls`, tied to the word embeddings."""

    def __init__(self, config: QFormerConfig, *, with_lm_head: bool = False) -> None:
        super().__init__()
        if config.context_width is None:
            raise InputError("the Q-Former needs context_width, the width of the image's tokens")
        if with_lm_head and not config.has_text:
            raise InputError("a Q-Former without text has no word embeddings for the language-model head to share")
        self.config = config
        self.bert = QFormerBert(config)
        self.cls = LanguageModelHead(config) if with_lm_head else None
        self.apply(self._init_weights)
        if self.cls is not None:
            self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def project_context(self, image_BSE: Tensor, mask: Tensor | None = None) -> Context:
        """Keys and values of the image's tokens in the layers that cross-attend; `mask` (B,S) is 1 where one counts."""
        return Context(tuple(layer.project(image_BSE) for layer in self.bert.encoder.layer), mask)

    def forward(
        self,
        queries_BQE: Tensor | None,
        ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        *,
        context: Context | None = None,
        attention: AttentionKind = "bidirectional",
        past: Sequence[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """States (B,Q+T,E), queries first, and every layer's keys and values.

        `queries_BQE` of one row serve all samples; without queries the text is read alone, without the image.
        `mask_BT` is 1 where a text token counts. With `past`, the cache of a pass of the queries (and of earlier
        text), the new text is causal behind it, and `mask_BT` covers earlier text tokens too.
        """
        self._check(queries_BQE, ids_BT, past)
        if queries_BQE is not None and context is not None and len(queries_BQE) == 1:
            queries_BQE = queries_BQE.expand(num_rows(ids_BT, context), -1, -1)
        num_queries = 0 if queries_BQE is None else queries_BQE.shape[1]
        num_earlier = 0 if ids_BT is None or mask_BT is None else mask_BT.shape[1] - ids_BT.shape[1]
        x_BLE = self.bert.embeddings(queries_BQE, ids_BT, num_earlier)
        if past is None:
            mask = qformer_mask(num_queries, mask_BT, attention=attention, dtype=x_BLE.dtype)
        else:
            num_past = past[0][0].shape[2]
            mask = qformer_mask(num_past - num_earlier, mask_BT, attention="causal", dtype=x_BLE.dtype)[:, :, num_past:]
        blocked = None if context is None else context_mask(context.mask, x_BLE.dtype)
        cache = []
        for i, layer in enumerate(self.bert.encoder.layer):
            x_BLE, key_value = layer(
                x_BLE,
                mask,
                num_queries=num_queries,
                past=None if past is None else past[i],
                context=() if context is None else context.layers[i],
                context_mask=blocked,
            )
            cache.append(key_value)
        return x_BLE, cache

    def logits(self, states: Tensor) -> Tensor:
        """Scores of the next token (...,V)."""
        assert self.cls is not None, "this Q-Former was built without language-model head"
        return self.cls(states)

    def _check(self, queries: Tensor | None, ids: Tensor | None, past: Sequence[KeyValue] | None) -> None:
        if queries is None and ids is None:
            raise InputError("the Q-Former needs queries or text")
        if ids is not None and not self.config.has_text:
            raise InputError("this Q-Former was built without text; set qformer_text_input=True to let it read one")
        if queries is not None and past is not None:
            raise InputError("cached queries cannot be followed by other queries")


def num_rows(ids_BT: Tensor | None, context: Context) -> int:
    """How many samples a call is about: as many as texts, else as images."""
    if ids_BT is not None:
        return len(ids_BT)
    return next(streams[0][0].shape[0] for streams in context.layers if streams)


def qformer_mask(
    num_queries: int, mask_BT: Tensor | None, *, attention: AttentionKind, dtype: torch.dtype
) -> Tensor | None:
    """The additive self-attention mask (B,1,Q+T,Q+T) of BLIP-2's figure 2, or None where all may see all.

    `bidirectional` (image-text matching): queries and text see one another. `causal` (image-grounded generation):
    queries see queries, text sees the queries and the text before it. `unimodal` (contrast): queries see queries, text
    sees text. Padding is seen by nobody.
    """
    if mask_BT is None:
        return None
    num_text = mask_BT.shape[1]
    is_text = torch.arange(num_queries + num_text, device=mask_BT.device) >= num_queries
    seen_by, sees = is_text[:, None], is_text[None, :]  # rows look at columns
    if attention == "bidirectional":
        allowed = torch.ones_like(seen_by & sees)
    elif attention == "unimodal":
        allowed = seen_by == sees
    elif attention == "causal":
        position = torch.arange(len(is_text), device=mask_BT.device)
        allowed = ~sees | (seen_by & (position[None, :] <= position[:, None]))
    else:
        raise InputError(f"attention {attention!r} is not one of bidirectional, causal, unimodal")
    counts = torch.cat([mask_BT.new_ones(len(mask_BT), num_queries), mask_BT], dim=1).bool()
    allowed = allowed[None, None] & counts[:, None, None, :]
    return torch.zeros(allowed.shape, dtype=dtype, device=mask_BT.device).masked_fill(~allowed, SELF_MASKED)
