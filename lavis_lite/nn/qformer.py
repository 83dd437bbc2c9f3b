"""BLIP-2's querying transformer: BERT with learned queries that attend to an image (BLIP-2, section 3.1, figure 2).

Queries and text share the self-attention; only queries cross-attend, in every second layer, and each has its own
feed-forward. Note: queries get neither word nor position embeddings, but the embeddings' LayerNorm. A pass of the
queries alone leaves keys and values that serve as the prefix of generated text, because queries never attend to text
that is predicted.

Letters: B samples, Q queries, T text tokens, L = Q + T, P cached tokens, S image tokens, E width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_LAYERS, check_numbers
from lavis_lite.nn.attention import AddNorm, BertConfig, CrossAttentionKV, KeyValue, KeyValueCache
from lavis_lite.nn.bert import BertLayer, LMHead, Transformer, initialise, intermediate


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
        self.intermediate_query = intermediate(config)
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
        self.config = config
        self.bert = Transformer(config, QFormerLayer, has_text=config.has_text)
        self.cls = LMHead(config) if with_lm_head else None
        initialise(self, config.initializer_range)
        if self.cls is not None:
            self.cls.tie(self.bert.embeddings)

    def project_kv(self, image_BSE: Tensor, mask_BS: Tensor | None = None) -> CrossAttentionKV:
        """Return keys and values of the image's tokens in the layers that cross-attend; `mask_BS` is 1 where a token
        counts.
        """
        return self.bert.project_kv(image_BSE, mask=mask_BS)

    def forward(
        self,
        queries_BQE: Tensor | None,
        ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        *,
        context: CrossAttentionKV | None = None,
        causal: bool = False,
        past: KeyValueCache | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """Return states (B,Q+T,E), queries first, and every layer's keys and values.

        Queries of one row serve all samples; without queries the text is read alone, without the image. `mask_BT` is 1
        where a text token counts, or None where all do; `causal` as in `text_mask`. With `past`, the cache of a pass of
        the queries (and of earlier text), the new text is causal and follows it, and `mask_BT` covers earlier text
        tokens too.
        """
        if queries_BQE is not None and context is not None and len(queries_BQE) == 1:
            queries_BQE = queries_BQE.expand(context.num_rows if ids_BT is None else len(ids_BT), -1, -1)
        causal = causal or past is not None
        return self.bert(ids_BT, mask_BT, queries_BQE=queries_BQE, context=context, causal=causal, past=past)

    def logits(self, states: Tensor) -> Tensor:
        """Return scores of the next token (...,V)."""
        assert self.cls is not None, "this Q-Former was built without language-model head"
        return self.cls(states)
