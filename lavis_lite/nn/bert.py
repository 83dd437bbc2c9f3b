"""The one text transformer: BLIP's encoder, image-grounded encoder and decoder, and NLVR2's two-image twin.

Post-norm BERT with optional cross-attention, under BERT's parameter names. Two things are unusual: the keys and
values of the context (an image, or a question) are computed once by `project_context` and handed to every pass that
needs them, and one context row may serve several consecutive text rows (beams, candidate answers, texts to re-rank)
without being copied.

Letters: B texts, C contexts (B is a multiple of C), T text tokens, P cached tokens, S context tokens, E width,
V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common.errors import InputError
from lavis_lite.nn.attention import (
    AddNorm,
    Attention,
    BertConfig,
    Context,
    KeyValue,
    TwinAttention,
    context_mask,
    text_mask,
)


class Intermediate(nn.Module):
    """The feed-forward layer's first half."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class BertLayer(nn.Module):
    """Self-attention, cross-attention if a context is given, feed-forward."""

    def __init__(self, config: BertConfig, index: int) -> None:
        super().__init__()
        self.attention = Attention(config)
        if config.context_width is not None:
            if config.num_context_streams == 1:
                self.crossattention = Attention(config, config.context_width)
            else:
                merge = index >= config.merge_streams_from
                self.crossattention = TwinAttention(config, config.context_width, merge=merge)
        self.intermediate = Intermediate(config)
        self.output = AddNorm(config, config.intermediate_size)

    def forward(
        self,
        x_BTE: Tensor,
        mask: Tensor,
        *,
        past: KeyValue | None,
        context: Sequence[KeyValue] | None,
        context_mask: Tensor | None,
    ) -> tuple[Tensor, KeyValue]:
        """Returns the new states and this layer's text keys and values, cached ones first."""
        key_value = self.attention.self.project(x_BTE)
        if past is not None:
            key_value = tuple(torch.cat(pair, dim=2) for pair in zip(past, key_value, strict=True))
        x_BTE = self.attention(x_BTE, (key_value,), mask)
        if context is not None:
            x_BTE = self.crossattention(x_BTE, context, context_mask)
        return self.output(self.intermediate(x_BTE), x_BTE), key_value


class BertEmbeddings(nn.Module):
    """Word plus learned position embeddings; no token types (BLIP's MED has none)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.register_buffer("position_ids", torch.arange(config.max_positions)[None])

    def forward(self, ids_BT: Tensor, start: int = 0) -> Tensor:
        """Embeddings (B,T,E) of tokens that stand at positions start, start+1, ..."""
        stop = start + ids_BT.shape[1]
        if stop > self.position_embeddings.num_embeddings:
            limit = self.position_embeddings.num_embeddings
            raise InputError(f"a text of {stop} tokens is longer than the {limit} positions of the text transformer")
        x = self.word_embeddings(ids_BT) + self.position_embeddings(self.position_ids[:, start:stop])
        return self.dropout(self.LayerNorm(x))


class BertEncoder(nn.Module):
    """The stack of layers, named as in BERT."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config, i) for i in range(config.num_layers))


class BertModel(nn.Module):
    """Text in, states out; with `causal` a decoder, with a context grounded in it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def project_context(self, *states_CSE: Tensor, mask: Tensor | None = None) -> Context:
        """Every layer's keys and values of the context's states (C,S,E'), one tensor a stream; `mask` (C,S) is 1
        where a state counts.
        """
        layers = tuple(layer.crossattention.project(states_CSE) for layer in self.encoder.layer)
        return Context(layers, mask)

    def forward(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor,
        *,
        context: Context | None = None,
        causal: bool = False,
        past: Sequence[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """States (B,T,E) and the text's keys and values of every layer.

        `mask_BT` is 1 where a token counts; with `past` (cached keys and values of P tokens) it covers all P+T
        tokens.
        """
        num_past = 0 if past is None else past[0][0].shape[2]
        x_BTE = self.embeddings(ids_BT, num_past)
        mask = text_mask(mask_BT, num_past, causal=causal, dtype=x_BTE.dtype)
        blocked = None if context is None else context_mask(context.mask, x_BTE.dtype)
        cache = []
        for i, layer in enumerate(self.encoder.layer):
            x_BTE, key_value = layer(
                x_BTE,
                mask,
                past=None if past is None else past[i],
                context=None if context is None else context.layers[i],
                context_mask=blocked,
            )
            cache.append(key_value)
        return x_BTE, cache


class PredictionTransform(nn.Module):
    """Dense, GELU, LayerNorm before the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """Scores of the next token, with the word embeddings' weights; `bias` stands twice in the state_dict, as in
    BERT's files.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = PredictionTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class LanguageModelHead(nn.Module):
    """BERT's `cls`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.predictions(x)


class BertLMHeadModel(nn.Module):
    """A causal decoder: `bert` and the language-model head `cls`, whose weight is the word embeddings'."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config)
        self.cls = LanguageModelHead(config)
        self.cls.apply(self.bert._init_weights)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the vocabulary's weight with the word embeddings (again, after these were replaced)."""
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor,
        *,
        context: Context | None = None,
        past: Sequence[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Logits of the next token (B,T,V) and the cache."""
        states, cache = self.bert(ids_BT, mask_BT, context=context, causal=True, past=past)
        return self.cls(states), cache

    def share_with_encoder(self, encoder: BertModel) -> None:
        """Tie all but the self-attention to the encoder's (BLIP, section 3.2: encoder and decoder differ in
        self-attention only).
        """
        self.bert.embeddings = encoder.embeddings
        for mine, theirs in zip(self.bert.encoder.layer, encoder.encoder.layer, strict=True):
            mine.crossattention = theirs.crossattention
            mine.intermediate = theirs.intermediate
            mine.output = theirs.output
        self.tie_weights()
