"""Compile the repeated layers of a model with torch.compile (`run.compile`)."""

import logging
from collections.abc import Iterator

import torch
from torch import nn

logger = logging.getLogger(__name__)

MOST_VARIANTS = 64
"""Of the code of one kind of layer: with and without queries, context, cache and gradients, of training and evaluation.
torch's limit is 8, beyond which it continues without compiling.
"""


def compile_layers(model: nn.Module, part: str, *, backend: str = "inductor") -> int:
    """Let the layers of the image encoder (`part` is "encoder"), or of the whole model ("model"), be compiled at their
    first call; return their number.

    Layers of one kind share their code, so that the time to compile does not grow with the depth. Names of parameters
    stay. Note: a second length of texts makes torch compile once more, for any length.
    """
    torch._dynamo.config.recompile_limit = max(MOST_VARIANTS, torch._dynamo.config.recompile_limit)
    root = model.get_submodule("visual_encoder") if part == "encoder" else model
    layers = list(repeated_layers(root))
    for layer in layers:
        layer.compile(backend=backend)
    logger.info(f"run.compile: {part}: {len(layers)} layers are compiled when they are first needed")
    return len(layers)


def repeated_layers(root: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the members of all lists of modules of one class, the outermost lists only."""
    for child in root.children():
        members = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        if len(members) > 1 and len({type(member) for member in members}) == 1 and len(members[0]._modules) > 0:
            yield from members
        else:
            yield from repeated_layers(child)
