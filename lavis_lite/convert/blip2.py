"""BLIP-2's and InstructBLIP's parameter names in Hugging Face's `Blip2*` and `InstructBlip*` classes.

Surprising: LAVIS has a bias for queries and one for values, Hugging Face one vector for queries, keys and values. A
bias of keys changes no attention (it adds the same to all of a query's scores), so that it is left out, with a warning
if it is not zero. The Q-Former's word embeddings and first norm stand elsewhere in each of Hugging Face's classes.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from lavis_lite.common.sources.weights import LazyState, Reader
from lavis_lite.convert.names import VISION, VISION_BLOCK, Table

logger = logging.getLogger(__name__)

LAYOUTS = {
    "blip-2": ("qformer.layernorm.", "embeddings."),
    "instructblip": ("qformer.embeddings.layernorm.", "qformer.embeddings."),
}
"""By Hugging Face's model type: the Q-Former's first norm, and its word and position embeddings."""
VOCABULARIES = (
    *("embed_tokens.weight", "shared.weight", "lm_head.weight"),
    *(".wte.weight", ".transformer.word_embeddings.weight", ".embed_in.weight", ".embed_out.weight"),
)
"""Of language models: GPT-2's and GPT-J's, Bloom's and Falcon's, GPT-NeoX's have names of their own."""
MOST_ADDED = 64
"""Vocabularies are rounded up to multiples of 64 at most."""
BIAS = ".attn.qkv.bias"


def table(part: str | None, layout: str) -> Table:
    """Names of a model whose language model is `<part>_model` (opt, t5, llm; None for none), in one of the layouts."""
    norm, embeddings = LAYOUTS[layout]
    qformer = "Qformer.bert.embeddings."
    prefixes = (
        *VISION,
        ("ln_vision.", "vision_model.post_layernorm."),
        (f"{qformer}LayerNorm.", norm),
        *((f"{qformer}{kind}_embeddings.", f"{embeddings}{kind}_embeddings.") for kind in ("word", "position")),
        ("Qformer.bert.encoder.layer.", "qformer.encoder.layer."),
        ("query_tokens", "query_tokens"),
    )
    if part is None:
        prefixes += (
            ("vision_proj.", "vision_projection."),
            ("text_proj.", "text_projection."),
            ("itm_head.", "itm_head."),
        )
    else:
        prefixes += ((f"{part}_proj.", "language_projection."), (f"{part}_model.", "language_model."))
    attention = ((".attention.self.", ".attention.attention."), (".crossattention.self.", ".crossattention.attention."))
    return Table(prefixes, inner={"visual_encoder.blocks.": VISION_BLOCK, "Qformer.bert.encoder.layer.": attention})


def is_hf_blip2(state: Mapping[str, Tensor]) -> bool:
    """Whether a state_dict comes from one of Hugging Face's Blip2 or InstructBlip classes."""
    return any(name.startswith("qformer.") for name in state)


def blip2_from_hf(state: Mapping[str, Tensor], part: str | None = None) -> LazyState:
    """A Hugging Face state_dict under LAVIS's names, for a model whose language model is called `<part>_model`. Names
    that are not Hugging Face's stay.
    """
    layout = "instructblip" if any(name.startswith(LAYOUTS["instructblip"][0]) for name in state) else "blip-2"
    names = table(part, layout)
    return _with_split_biases(LazyState.of(state).renamed(lambda name: names.from_hf(name) or name))


def blip2_to_hf(state: Mapping[str, Tensor], part: str | None = None, layout: str = "blip-2") -> LazyState:
    """A state_dict of ours under Hugging Face's names, without what its classes do not have (the Q-Former's language
    head, the temperature). `layout` is Hugging Face's model type, `blip-2` or `instructblip`.
    """
    return _with_joined_biases(LazyState.of(state)).renamed(table(part, layout).to_hf)


def fit_vocabularies(state: LazyState, own: Mapping[str, Tensor]) -> None:
    """Give vocabularies the rows of the model's `own`, in place: those that Hugging Face added for its image token are
    left out, those that the model added for padding stay. Others of another length are left as they are.
    """
    for name in [name for name in state if name.endswith(VOCABULARIES) and name in own]:
        rows, added, read = len(own[name]), len(state[name]) - len(own[name]), state.readers[name]
        if 0 < added <= MOST_ADDED:
            state.readers[name] = lambda read=read, rows=rows: read()[:rows]
            logger.info(f"{name}: {added} rows behind the first {rows}, Hugging Face's image token, are left out")
        elif -MOST_ADDED <= added < 0:
            state.readers[name] = lambda read=read, rest=own[name][added:]: torch.cat([read(), rest.to(read().dtype)])
            logger.info(f"{name}: the model's own last {-added} rows stay")


def _with_split_biases(state: LazyState) -> LazyState:
    """With separate biases of queries and values."""
    readers: dict[str, Reader] = {}
    for name, read in state.readers.items():
        if name.startswith("visual_encoder.") and name.endswith(BIAS):
            stem = name.removesuffix(BIAS)
            readers[f"{stem}.attn.q_bias"] = lambda read=read, name=name: _third(read(), 0, name)
            readers[f"{stem}.attn.v_bias"] = lambda read=read, name=name: _third(read(), 2, name)
        else:
            readers[name] = read
    return LazyState(readers)


def _with_joined_biases(state: LazyState) -> LazyState:
    """With the biases of queries and values in one vector, in which those of the keys are zero."""
    readers: dict[str, Reader] = {}
    for name, read in state.readers.items():
        stem = name.removesuffix(".attn.q_bias")
        if stem != name:
            readers[stem + BIAS] = lambda q=read, v=state.readers[f"{stem}.attn.v_bias"]: _joined(q(), v())
        elif not name.endswith(".attn.v_bias"):
            readers[name] = read
    return LazyState(readers)


def _third(bias: Tensor, index: int, name: str) -> Tensor:
    parts = bias.chunk(3)
    if index == 0 and parts[1].any():
        logger.warning(f"{name}: the bias of the keys is left out; it has no effect on the attention")
    return parts[index]


def _joined(q_bias: Tensor, v_bias: Tensor) -> Tensor:
    return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
