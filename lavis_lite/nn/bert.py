"""The text transformer: BLIP's encoder, image-grounded encoder and decoder, NLVR2's two-image encoder.

Post-norm BERT with optional cross-attention, under BERT's parameter names; `qformer.py` builds on its layer. Keys and
values of a context (an image, or a question) are computed once by `project_kv` and passed to every forward pass that
needs them. One context row may serve several consecutive text rows (beams, candidate answers, texts to re-rank) without
being copied.

Letters: B texts, C contexts (B is a multiple of C), T text tokens, Q queries, L = Q + T, P cached tokens, S context
tokens, E width, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lavis_lite.common.errors import InputError
from lavis_lite.nn.attention import (
    AddNorm,
    Attention,
    BertConfig,
    CrossAttentionKV,
    DualCrossAttention,
    KeyValue,
    KeyValueCache,
    context_mask,
    text_mask,
)


def intermediate(config: BertConfig) -> nn.Sequential:
    """Build the feed-forward layer's first half."""
    return nn.Sequential(OrderedDict(dense=nn.Linear(config.hidden_size, config.intermediate_size), gelu=nn.GELU()))


class BertLayer(nn.Module):
    """Self-attention, cross-attention if a context is given, feed-forward (none without `has_text`)."""

    def __init__(self, config: BertConfig, index: int, *, has_text: bool = True) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention: Attention | DualCrossAttention | None = None
        if config.context_width is not None and config.cross_attends(index):
            if config.num_context_streams == 1:
                self.crossattention = Attention(config, config.context_width)
            else:
                merge = index >= config.merge_streams_from
                self.crossattention = DualCrossAttention(config, config.context_width, merge=merge)
        if has_text:
            self.intermediate = intermediate(config)
            self.output = AddNorm(config, config.intermediate_size)

    def project_kv(self, states: Sequence[Tensor]) -> tuple[KeyValue, ...]:
        """Return keys and values of each stream of states; nothing from a layer without cross-attention."""
        return () if self.crossattention is None else self.crossattention.project(states)

    def forward(
        self,
        x_BLE: Tensor,
        mask: Tensor | None,
        *,
        is_causal: bool,
        num_queries: int,
        past: KeyValue | None,
        past_has_room: bool,
        context: Sequence[KeyValue],
        context_mask: Tensor | None,
    ) -> tuple[Tensor, KeyValue]:
        """Return the new states and this layer's keys and values, cached ones first; if `past_has_room`, in place."""
        k, v = self.attention.self.project(x_BLE)
        if past is not None and past_has_room:
            for cached, new in zip(past, (k, v), strict=True):
                cached[:, :, -new.shape[2] :] = new
            k, v = past
        elif past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        x_BLE = self.attention(x_BLE, ((k, v),), mask, is_causal=is_causal)
        return self.after_self_attention(x_BLE, num_queries, context, context_mask), (k, v)

    def after_self_attention(
        self, x_BTE: Tensor, num_queries: int, context: Sequence[KeyValue], mask: Tensor | None
    ) -> Tensor:
        """Apply cross-attention and feed-forward; BERT has no queries, so all tokens are text."""
        x_BTE = self.cross_attend(x_BTE, context, mask)
        return self.output(self.intermediate(x_BTE), x_BTE)

    def cross_attend(self, x: Tensor, context: Sequence[KeyValue], mask: Tensor | None) -> Tensor:
        """Attend to the context, if there is one for this layer."""
        return x if self.crossattention is None or not context else self.crossattention(x, context, mask)


class Embeddings(nn.Module):
    """Queries as they are, words plus learned positions, one LayerNorm over both; no token types (BLIP has none)."""

    position_ids: Tensor

    def __init__(self, config: BertConfig, *, has_text: bool = True) -> None:
        super().__init__()
        self.where = f"{config.section}.max_positions"
        if has_text:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
            self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.register_buffer("position_ids", torch.arange(config.max_positions)[None])

    def forward(self, ids_BT: Tensor | None, start: int = 0, queries_BQE: Tensor | None = None) -> Tensor:
        """Return embeddings (B,Q+T,E); the text's positions are start, start+1, ..."""
        parts = [] if queries_BQE is None else [queries_BQE]
        if ids_BT is not None:
            stop, limit = start + ids_BT.shape[1], self.position_ids.shape[1]
            if stop > limit:
                raise InputError(f"{self.where}: a text of {stop} tokens is longer than the {limit} positions")
            parts.append(self.word_embeddings(ids_BT) + self.position_embeddings(self.position_ids[:, start:stop]))
        return self.dropout(self.LayerNorm(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)))


class Transformer(nn.Module):
    """Embeddings and layers under BERT's names, not initialised."""

    def __init__(self, config: BertConfig, layer_class: type[BertLayer] = BertLayer, *, has_text: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config, has_text=has_text)
        layers = [layer_class(config, i, has_text=has_text) for i in range(config.num_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    @property
    def layers(self) -> Sequence[BertLayer]:
        """The layers, first to last."""
        return cast("Sequence[BertLayer]", self.encoder["layer"])  # ModuleDict is not generic

    def project_kv(self, *states_CSE: Tensor, mask: Tensor | None = None) -> CrossAttentionKV:
        """Return every layer's keys and values of the context's states (C,S,E'), one tensor per stream; `mask` (C,S) is
        1 where a state counts.
        """
        return CrossAttentionKV(tuple(layer.project_kv(states_CSE) for layer in self.layers), mask)

    def forward(
        self,
        ids_BT: Tensor | None,
        mask_BT: Tensor | None,
        *,
        queries_BQE: Tensor | None = None,
        context: CrossAttentionKV | None = None,
        causal: bool = False,
        past: KeyValueCache | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """Return states (B,Q+T,E), queries first, and every layer's keys and values.

        `mask_BT` is 1 where a text token counts, None where all do; with `past` (of P tokens) it covers earlier text
        too. With `causal` a decoder, with a context grounded in it.
        """
        num_queries = 0 if queries_BQE is None else queries_BQE.shape[1]
        num_past, past_queries = (0, 0) if past is None else (past.num_tokens, past.num_queries)
        x_BLE = self.embeddings(ids_BT, num_past - past_queries, queries_BQE)
        blocked, all_queries = context_mask(context, x_BLE.dtype), past_queries + num_queries
        is_ordered = causal and ids_BT is not None and x_BLE.shape[1] > 1  # one token attends to all before it
        is_causal = is_ordered and mask_BT is None and num_past + num_queries == 0
        if is_ordered and mask_BT is None and not is_causal:
            mask_BT = x_BLE.new_ones(1, num_past + x_BLE.shape[1] - all_queries)
        mask = None
        if mask_BT is not None:
            mask = text_mask(mask_BT, num_past, num_queries=all_queries, causal=causal, dtype=x_BLE.dtype)
        growing = None if past is None else past.growing
        cache = []
        for i, layer in enumerate(self.layers):
            x_BLE, key_value = layer(
                x_BLE,
                mask,
                is_causal=is_causal,
                num_queries=num_queries,
                past=None if past is None else past.past(i, x_BLE.shape[1]),
                past_has_room=growing is not None,
                context=() if context is None else context.layers[i],
                context_mask=blocked,
            )
            cache.append(key_value)
        return x_BLE, KeyValueCache(tuple(cache), growing, all_queries)


def initialise(module: nn.Module, std: float) -> None:
    """Draw the weights of linear layers and embeddings from a normal distribution and set biases to 0."""

    def draw(part: nn.Module) -> None:
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)

    module.apply(draw)


class BertModel(Transformer):
    """Text in, states out; with `causal` a decoder, with a context grounded in it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        initialise(self, config.initializer_range)


class LMHead(nn.Module):
    """BERT's language-model head `cls`: states (...,E) in, scores of the next token (...,V) out."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        transform = OrderedDict(
            dense=nn.Linear(config.hidden_size, config.hidden_size),
            gelu=nn.GELU(),
            LayerNorm=nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
        )
        decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.predictions = nn.Sequential(OrderedDict(transform=nn.Sequential(transform), decoder=decoder))
        self.predictions.bias = decoder.bias  # twice in the state_dict, as in BERT's files

    def forward(self, x: Tensor) -> Tensor:
        return self.predictions(x)

    def tie(self, embeddings: Embeddings) -> None:
        """Share the vocabulary's weight with the word embeddings."""
        self.predictions.get_submodule("decoder").weight = embeddings.word_embeddings.weight


class BertLMHeadModel(nn.Module):
    """A causal decoder: `bert` and the language-model head `cls`, whose weight is the word embeddings'."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config)
        self.cls = LMHead(config)
        initialise(self.cls, config.initializer_range)
        self.cls.tie(self.bert.embeddings)

    def forward(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None,
        *,
        context: CrossAttentionKV | None = None,
        past: KeyValueCache | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """Return logits of the next token (B,T,V) and the cache."""
        states, cache = self.bert(ids_BT, mask_BT, context=context, causal=True, past=past)
        return self.cls(states), cache

    def share_with_encoder(self, encoder: BertModel) -> None:
        """Tie all but the self-attention to the encoder's (BLIP, section 3.2: encoder and decoder differ in
        self-attention only).
        """
        self.bert.embeddings = encoder.embeddings
        for mine, theirs in zip(self.bert.layers, encoder.layers, strict=True):
            mine.crossattention = theirs.crossattention
            mine.intermediate = theirs.intermediate
            mine.output = theirs.output
        self.cls.tie(self.bert.embeddings)
