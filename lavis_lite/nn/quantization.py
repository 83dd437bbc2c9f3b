"""Bytes that bitsandbytes saves of a language model's weights, and the layers that it quantizes, counted without it.

The kinds are those of `load_language_model`. Embeddings, the output layer and what transformers keeps in float32 stay
in the model's precision.
"""

from torch import nn
from transformers import PreTrainedModel

BLOCK = 64
"""Weights that share one float32 scale in 4 bits (NF4); in 8 bits it is a row."""


def quantized_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the layers whose weights are quantized; trained ones, such as adapters, are not."""
    kept = set(model._keep_in_fp32_modules or ())
    head = model.get_output_embeddings()
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not module.weight.requires_grad
        and not kept & set(name.split("."))
    ]


def quantized_bytes(layer: nn.Linear, kind: str) -> int:
    """Return the bytes of a layer's weight in `int4` or `int8`, with its scales."""
    count = layer.weight.numel()
    if kind == "int4":
        return (count + 1) // 2 + 4 * (-(-count // BLOCK))
    return count + 4 * layer.out_features


def saved_by_quantization(model: PreTrainedModel, kind: str) -> int:
    """Return by how many bytes quantization makes the weights smaller than they are now."""
    layers = quantized_layers(model)
    return sum(layer.weight.numel() * layer.weight.element_size() - quantized_bytes(layer, kind) for layer in layers)
