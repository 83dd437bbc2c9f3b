"""Floating-point operations (FLOPs) of BLIP-2 per image, counted from the modules.

A multiplication with its addition is 2 FLOPs: a linear layer costs 2 per weight and token, attention 4 x queries x keys
x width. Norms, activations, softmax, similarities and the optimizer are left out (under 1 %). Backward, a trained part
costs twice its forward pass; a frozen one that gradients pass through costs its linear layers once and its attention
twice; a frozen one before all that is trained costs nothing. Keys and values of an image count once, and the output
layer only where there are labels.

Letters: Q queries, T text tokens, S image tokens or tokens that a language model reads.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn


class Cost(NamedTuple):
    """Forward FLOPs in linear layers and in attention."""

    linear: float = 0.0
    attention: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.linear + other.linear, self.attention + other.attention)

    @property
    def forward(self) -> float:
        """A forward pass."""
        return self.linear + self.attention

    @property
    def trained(self) -> float:
        """Forward and backward with gradients of weights and inputs."""
        return 3 * self.forward

    @property
    def passed_through(self) -> float:
        """Forward and backward of frozen weights with gradients of inputs."""
        return 2 * self.linear + 3 * self.attention


def total(costs: Iterable[Cost]) -> Cost:
    """Their sum."""
    return sum(costs, Cost())


def linear(module: nn.Module, tokens: int) -> Cost:
    """All linear layers (and patch embeddings) in a module, each applied to every token."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    return Cost(linear=2.0 * tokens * sum(layer.weight.numel() for layer in layers))


def attention(queries: int, keys: int, width: int) -> Cost:
    """Scores and weighted sum over all heads."""
    return Cost(attention=4.0 * queries * keys * width)


def image_encoder(encoder: Any) -> Cost:
    """The ViT on one image."""
    tokens, num_patches = encoder.pos_embed.shape[1], encoder.patch_embed.num_patches
    blocks = [linear(block, tokens) + attention(tokens, tokens, encoder.width) for block in encoder.blocks]
    return total([linear(encoder.patch_embed.proj, num_patches), *blocks])


def image_context(qformer: Any, image_tokens: int) -> Cost:
    """Keys and values of an image in the layers that cross-attend."""
    layers = [layer.crossattention.self for layer in qformer.bert.encoder.layer if layer.crossattention is not None]
    return total(linear(part, image_tokens) for layer in layers for part in (layer.key, layer.value))


def qformer_pass(qformer: Any, *, queries: int = 0, text: int = 0, image_tokens: int = 0, past: int = 0) -> Cost:
    """Queries (and the image's keys and values, which cost apart) and/or text, after `past` cached tokens."""
    costs, width, tokens = [], qformer.config.hidden_size, queries + text
    for layer in qformer.bert.encoder.layer:
        costs += [linear(layer.attention, tokens), attention(tokens, past + tokens, width)]
        if queries:
            costs += [linear(part, queries) for part in (layer.intermediate_query, layer.output_query)]
        if text:
            costs += [linear(part, text) for part in (layer.intermediate, layer.output)]
        if queries and layer.crossattention is not None:
            cross = layer.crossattention
            costs += [linear(cross.self.query, queries), linear(cross.output, queries)]
            costs.append(attention(queries, image_tokens, width))
    return total(costs)


def stage1_step(model: Any, text: int) -> float:
    """A first-stage training step, for one image and its text of that many tokens: the frozen image encoder; contrast
    (queries; text alone), matching (three pairs), generation (text after the queries).
    """
    num_image, num_queries = model.visual_encoder.pos_embed.shape[1], model.query_tokens.shape[1]
    qformer = model.Qformer
    pair = qformer_pass(qformer, queries=num_queries, text=text, image_tokens=num_image)
    trained = [
        image_context(qformer, num_image),
        qformer_pass(qformer, queries=num_queries, image_tokens=num_image),
        linear(model.vision_proj, num_queries),
        qformer_pass(qformer, text=text),
        linear(model.text_proj, 1),
        *[pair + linear(model.itm_head, num_queries)] * 3,
        qformer_pass(qformer, text=text, past=num_queries),
        linear(qformer.cls, text - 1),  # the first token is not predicted
    ]
    return image_encoder(model.visual_encoder).forward + total(trained).trained


def stage2_step(model: Any, text: int, labels: int) -> float:
    """A second-stage training step, for one image: frozen image encoder, the queries' pass, and the frozen language
    model after them, which reads `text` tokens and whose last `labels` tokens, or those it writes, are learned.
    """
    num_image, num_queries = model.visual_encoder.pos_embed.shape[1], model.query_tokens.shape[1]
    trained = total(
        [
            image_context(model.Qformer, num_image),
            qformer_pass(model.Qformer, queries=num_queries, image_tokens=num_image),
            linear(model.proj, num_queries),
        ]
    )
    count = encoder_decoder if model.lm.is_encoder_decoder else causal_model
    llm = count(model.lm.model, num_queries + text, labels)
    return image_encoder(model.visual_encoder).forward + trained.trained + llm.passed_through


def causal_model(llm: Any, tokens: int, labels: int) -> Cost:
    """A causal model that reads `tokens`, with logits for the labels."""
    config = llm.config
    scores = [attention(tokens, tokens, config.hidden_size)] * config.num_hidden_layers
    return total([linear(llm.get_decoder(), tokens), linear(llm.get_output_embeddings(), labels), *scores])


def encoder_decoder(llm: Any, tokens: int, labels: int) -> Cost:
    """A T5 that reads `tokens` and writes `labels`."""
    config = llm.config
    width = config.num_heads * config.d_kv
    costs = [linear(llm.encoder, tokens), linear(llm.get_output_embeddings(), labels)]
    costs += [attention(tokens, tokens, width)] * config.num_layers
    for block in llm.decoder.block:
        self_attention, cross, feed_forward = block.layer
        costs += [linear(self_attention, labels), attention(labels, labels, width)]
        costs += [linear(part, labels) for part in (cross.EncDecAttention.q, cross.EncDecAttention.o, feed_forward)]
        costs += [linear(part, tokens) for part in (cross.EncDecAttention.k, cross.EncDecAttention.v)]
        costs.append(attention(labels, tokens, width))
    return total(costs)
