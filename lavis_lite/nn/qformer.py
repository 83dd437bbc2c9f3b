"""BLIP-2's querying transformer: BERT with learned queries that attend to an image (BLIP-2, section 3.1, figure 2).

Queries and text share the self-attention; only queries cross-attend, in every second layer, and each has its own
feed-forward. Note: queries get neither word nor position embeddings, but the embeddings' LayerNorm. A pass of the
queries alone leaves keys and values that serve as the prefix of generated text, because queries never attend to text
that is predicted.

Letters: B samples, Q queries, T text tokens, L = Q + T, P cached tokens, S image tokens, E width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_LAYERS, check_numbers
from lavis_lite.common.errors import InputError
from lavis_lite.nn.attention import (
    SELF_MASKED,
    AddNorm,
    BertConfig,
    CrossAttentionKV,
    KeyValue,
    KeyValueCache,
    additive_mask,
)
from lavis_lite.nn.bert import BertLayer, Intermediate, LMHead, Transformer, initialise

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

    def cross_attends(self, index: int) -> bool:
        return index % self.cross_attention_freq == 0


class QFormerLayer(BertLayer):
    """BERT's layer with a feed-forward of the queries, which alone cross-attend."""

    def __init__(self, config: BertConfig, index: int, *, has_text: bool) -> None:
        super().__init__(config, index, has_text=has_text)
        self.intermediate_query = Intermediate(config)
        self.output_query = AddNorm(config, config.intermediate_size)

    def after_self_attention(
        self, x_BLE: Tensor, num_queries: int, context: Sequence[KeyValue], mask: Tensor | None
    ) -> Tensor:
        """Apply cross-attention and feed-forward of the queries, and feed-forward of the text after them."""
        parts = []
        if num_queries:
            queries = self.cross_attend(x_BLE[:, :num_queries], context, mask)
            parts.append(self.output_query(self.intermediate_query(queries), queries))
        if num_queries < x_BLE.shape[1]:
            parts.append(super().after_self_attention(x_BLE[:, num_queries:], 0, (), None))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class QFormer(nn.Module):
    """Queries and/or text in, states out. `with_lm_head` adds BERT's head `cls`, tied to the word embeddings."""

    def __init__(self, config: QFormerConfig, *, with_lm_head: bool = False) -> None:
        super().__init__()
        if config.context_width is None:
            raise InputError("the Q-Former needs context_width, the width of the image's tokens")
        if with_lm_head and not config.has_text:
            raise InputError("a Q-Former without text has no word embeddings for the language-model head to share")
        self.config = config
        self.bert = Transformer(config, QFormerLayer, has_text=config.has_text)
        self.cls = LMHead(config) if with_lm_head else None
        initialise(self, config.initializer_range)
        if self.cls is not None:
            self.cls.tie(self.bert.embeddings)

    def project_kv(self, image_BSE: Tensor, mask: Tensor | None = None) -> CrossAttentionKV:
        """Return keys and values of the image's tokens in the layers that cross-attend; `mask` (B,S) is 1 where a token
        counts.
        """
        return self.bert.project_kv(image_BSE, mask=mask)

    def forward(
        self,
        queries_BQE: Tensor | None,
        ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        *,
        context: CrossAttentionKV | None = None,
        attention: AttentionKind = "bidirectional",
        past: KeyValueCache | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """Return states (B,Q+T,E), queries first, and every layer's keys and values.

        Queries of one row serve all samples; without queries the text is read alone, without the image. `mask_BT` is 1
        where a text token counts. With `past`, the cache of a pass of the queries (and of earlier text), the new text
        is causal and follows it, and `mask_BT` covers earlier text tokens too.
        """
        self._check(queries_BQE, ids_BT, past)
        if queries_BQE is not None and context is not None and len(queries_BQE) == 1:
            queries_BQE = queries_BQE.expand(context.num_rows if ids_BT is None else len(ids_BT), -1, -1)
        num_queries = 0 if queries_BQE is None else queries_BQE.shape[1]
        num_earlier = 0 if ids_BT is None or mask_BT is None else mask_BT.shape[1] - ids_BT.shape[1]
        x_BLE = self.bert.embeddings(ids_BT, num_earlier, queries_BQE)
        if past is None:
            mask = qformer_mask(num_queries, mask_BT, attention=attention, dtype=x_BLE.dtype)
        else:
            mask = qformer_mask(past.num_tokens - num_earlier, mask_BT, attention="causal", dtype=x_BLE.dtype)
            mask = None if mask is None else mask[:, :, past.num_tokens :]
        return self.bert.run_layers(x_BLE, mask, context=context, past=past, num_queries=num_queries)

    def logits(self, states: Tensor) -> Tensor:
        """Return scores of the next token (...,V)."""
        assert self.cls is not None, "this Q-Former was built without language-model head"
        return self.cls(states)

    def _check(self, queries: Tensor | None, ids: Tensor | None, past: KeyValueCache | None) -> None:
        if queries is None and ids is None:
            raise InputError("the Q-Former needs queries or text")
        if ids is not None and not self.config.has_text:
            raise InputError("this Q-Former was built without text; set qformer_text_input=True to let it read one")
        if queries is not None and past is not None:
            raise InputError("cached queries cannot be followed by other queries")


def qformer_mask(
    num_queries: int, mask_BT: Tensor | None, *, attention: AttentionKind, dtype: torch.dtype
) -> Tensor | None:
    """Return the additive self-attention mask (B,1,Q+T,Q+T) of BLIP-2's figure 2, or None without text.

    `bidirectional` (image-text matching): queries and text attend to each other. `causal` (image-grounded generation):
    queries attend to queries, text to the queries and the text before it. `unimodal` (contrast): queries attend to
    queries, text to text. Nothing attends to padding.
    """
    if attention not in get_args(AttentionKind):
        raise InputError(f"attention {attention!r} is not one of {', '.join(get_args(AttentionKind))}")
    if mask_BT is None:
        return None
    position = torch.arange(num_queries + mask_BT.shape[1], device=mask_BT.device)
    row, column = position[:, None], position[None, :]  # rows attend to columns
    if attention == "bidirectional":
        allowed = torch.ones_like(row == column)
    elif attention == "unimodal":
        allowed = (row < num_queries) == (column < num_queries)
    else:
        allowed = (column < num_queries) | (column <= row)
    counts = torch.cat([mask_BT.new_ones(len(mask_BT), num_queries), mask_BT], dim=1).bool()
    return additive_mask(allowed[None, None] & counts[:, None, None, :], SELF_MASKED, dtype)
