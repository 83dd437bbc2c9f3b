"""BLIP-2 and InstructBLIP in Hugging Face's layout, the `Blip2*` and `InstructBlip*` classes.

Note: LAVIS has a bias for queries and one for values, Hugging Face one vector for queries, keys and values. A bias of
keys does not change the attention (it adds the same to all scores of a query), so it is left out, with a warning if it
is not zero. The Q-Former's word embeddings and first norm have other names in each of Hugging Face's classes. Hugging
Face's image encoder has one epsilon for all its norms, ours 1e-6 in the blocks and 1e-5 in `ln_vision`, as published,
so that features differ by about 1e-5 between the two.
"""

import copy
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lavis_lite.common.config.sections import BERT_TO_MED
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.common.sources.weights import LazyState, Reader
from lavis_lite.models.hf import (
    VISION,
    VISION_BLOCK,
    Classes,
    HFAdapter,
    NameTable,
    image_processor,
    read_sizes,
    transformers_class,
    write_sizes,
)
from lavis_lite.nn.vision_clip import EvaViT

if TYPE_CHECKING:
    from lavis_lite.models.blip2.base import Blip2Base
    from lavis_lite.models.blip2.llm import Blip2LLM

logger = logging.getLogger(__name__)

M = TypeVar("M", bound="Blip2Base")

LAYOUTS = {
    "blip-2": ("qformer.layernorm.", "embeddings."),
    "instructblip": ("qformer.embeddings.layernorm.", "qformer.embeddings."),
}
"""By Hugging Face's model type: the Q-Former's first norm, and its word and position embeddings."""
BERT_TO_QFORMER = BERT_TO_MED | {"cross_attention_frequency": "cross_attention_freq"}
VOCABULARIES = (
    *("embed_tokens.weight", "shared.weight", "lm_head.weight"),
    *(".wte.weight", ".transformer.word_embeddings.weight", ".embed_in.weight", ".embed_out.weight"),
)
"""Suffixes of a language model's vocabularies: GPT-2, GPT-J, Bloom, Falcon and GPT-NeoX have names of their own."""
MOST_ADDED = 64
"""Rows that another vocabulary may have more or fewer: sizes are rounded up to multiples of at most 64."""
BIAS = ".attn.qkv.bias"
QFORMER_TOKENIZER = "qformer_tokenizer"
IMAGE_TOKEN = "<image>"
ANY_PROMPT = ("blip2_opt", "blip2_t5", "blip2_llm", "blip2_vicuna")
"""Architectures whose Q-Former may read the instruction (`qformer_text_input`) or not."""
INSTRUCT = "InstructBlipForConditionalGeneration"


def name_table(part: str | None, layout: str) -> NameTable:
    """Return the names of a model whose language model is `<part>_model` (None: no language model) in one of the
    layouts.
    """
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
        prefixes += (("vision_proj.", "vision_projection."), ("text_proj.", "text_projection."), ("itm_head.",) * 2)
    else:
        prefixes += ((f"{part}_proj.", "language_projection."), (f"{part}_model.", "language_model."))
    attention = ((".attention.self.", ".attention.attention."), (".crossattention.self.", ".crossattention.attention."))
    return NameTable(prefixes, inner={"visual_encoder.blocks.": VISION_BLOCK, "Qformer.bert.encoder.layer.": attention})


def is_hf_blip2(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state_dict comes from one of Hugging Face's Blip2 or InstructBlip classes."""
    return any(name.startswith("qformer.") for name in state)


def blip2_from_hf(state: Mapping[str, Tensor], part: str | None = None) -> LazyState:
    """Return a Hugging Face state_dict under LAVIS's names, for a model whose language model is `<part>_model`. Names
    that are not Hugging Face's stay.
    """
    layout = "instructblip" if any(name.startswith(LAYOUTS["instructblip"][0]) for name in state) else "blip-2"
    names = name_table(part, layout)
    state = LazyState.of(state).renamed(lambda name: names.inverse.to_hf(name) or name)
    for name in [name for name in state if name.startswith("visual_encoder.") and name.endswith(BIAS)]:
        read, stem = state.readers.pop(name), name.removesuffix(BIAS)
        state.readers[f"{stem}.attn.q_bias"] = partial(_third, read, 0, name)
        state.readers[f"{stem}.attn.v_bias"] = partial(_third, read, 2, name)
    return state


def blip2_to_hf(state: Mapping[str, Tensor], part: str | None = None, layout: str = "blip-2") -> LazyState:
    """Return a state_dict of ours under Hugging Face's names, without the tensors that its classes lack (the Q-Former's
    language head, the temperature). `layout` is Hugging Face's model type, `blip-2` or `instructblip`.
    """
    state = LazyState.of(state)
    for stem in [name.removesuffix(".attn.q_bias") for name in state if name.endswith(".attn.q_bias")]:
        read_q, read_v = (state.readers.pop(f"{stem}.attn.{part}_bias") for part in "qv")
        state.readers[stem + BIAS] = partial(_joined, read_q, read_v)
    return state.renamed(name_table(part, layout).to_hf)


def _third(read: Reader, index: int, name: str) -> Tensor:
    parts = read().chunk(3)
    if index == 0 and parts[1].any():
        logger.warning(f"{name}: the bias of the keys is left out; it has no effect on the attention")
    return parts[index]


def _joined(read_q: Reader, read_v: Reader) -> Tensor:
    q_bias = read_q()
    return torch.cat([q_bias, torch.zeros_like(q_bias), read_v()])


def fit_vocabularies(state: LazyState, own: Mapping[str, Tensor]) -> None:
    """Give vocabularies the number of rows of the model's `own`, in place: the rows that Hugging Face added for its
    image token are left out, those that the model added for padding stay. Vocabularies of other lengths stay as they
    are.
    """
    for name in [name for name in state if name.endswith(VOCABULARIES) and name in own]:
        rows = len(state[name])
        if 0 < abs(rows - len(own[name])) <= MOST_ADDED:
            state.readers[name] = partial(_fitted, state.readers[name], own[name])
            logger.info(f"{name}: of its {rows} rows the model takes those that its own {len(own[name])} have too")


def _fitted(read: Reader, own: Tensor) -> Tensor:
    theirs = read()[: len(own)]
    return torch.cat([theirs, own[len(theirs) :].to(theirs.dtype)])


class _QFormerAdapter(HFAdapter[M]):
    """The image encoder and Q-Former that all classes have."""

    encoder = EvaViT

    def own_section(self, config: Mapping[str, Any], folder: Path, *, arch: str) -> dict[str, Any]:
        section = {
            "vit_model": "eva_clip_g",
            "vit_weights": str(folder),
            "num_query_token": config["num_query_tokens"],
            "qformer": read_sizes(config["qformer_config"], BERT_TO_QFORMER),
        }
        if (folder / QFORMER_TOKENIZER).is_dir():
            section["tokenizer"] = str(folder / QFORMER_TOKENIZER)
        return section

    def sizes(self, model: M) -> dict[str, Any]:
        """Return the arguments of transformers' configuration for image encoder, queries and Q-Former."""
        vision = self.vision_sizes(model.visual_encoder)
        qformer = write_sizes(model.Qformer.config, BERT_TO_QFORMER) | {"encoder_hidden_size": vision["hidden_size"]}
        return {"vision_config": vision, "qformer_config": qformer, "num_query_tokens": model.query_tokens.shape[1]}

    def from_hf(self, state: Mapping[str, Tensor], model: M) -> LazyState:
        return blip2_from_hf(state, model.llm_prefix)


class Blip2Adapter(_QFormerAdapter["Blip2Base"]):
    """Models without a language model."""

    classes: ClassVar[Classes] = {
        "Blip2ForImageTextRetrieval": ("blip2_image_text_matching", "blip2", "blip2_feature_extractor")
    }

    def own_section(self, config: Mapping[str, Any], folder: Path, *, arch: str) -> dict[str, Any]:
        return {"tokenizer": str(folder)} | super().own_section(config, folder, arch=arch)

    def config(self, model: "Blip2Base", *, arch: str) -> Any:
        sizes = self.sizes(model)
        sizes["qformer_config"]["use_qformer_text_input"] = True
        embed_dim = len(model.get_parameter("text_proj.weight"))
        return transformers_class(self.hf_class(arch)).config_class(image_text_hidden_size=embed_dim, **sizes)

    def processor(self, model: "Blip2Base", config: Any) -> Any:
        from transformers import Blip2Processor

        return Blip2Processor(image_processor(model.visual_encoder), copy.deepcopy(model.tokenizer))

    def to_hf(self, own: Mapping[str, Tensor], model: "Blip2Base", config: Any) -> LazyState:
        return blip2_to_hf(own)


class Blip2LLMAdapter(_QFormerAdapter["Blip2LLM"]):
    """Models with a language model."""

    classes: ClassVar[Classes] = {
        "Blip2ForConditionalGeneration": ANY_PROMPT,
        INSTRUCT: ("blip2_vicuna_instruct", "blip2_t5_instruct", *ANY_PROMPT),
    }
    aliases: ClassVar[dict[str, str]] = {
        "Blip2Model": "Blip2ForConditionalGeneration",
        "InstructBlipModel": INSTRUCT,
        "InstructBlipVideoModel": INSTRUCT,
        "InstructBlipVideoForConditionalGeneration": INSTRUCT,
    }

    def default_arch(self, archs: tuple[str, ...], config: Mapping[str, Any]) -> str:
        """Return the first architecture that takes the language model of a config.json."""
        family = (config.get("text_config") or {}).get("model_type")
        types = {arch: registry.get_model_class(arch).family.model_types for arch in archs}
        return next(arch for arch in archs if not types[arch] or family in types[arch])

    def reads_instructions(self, model: "Blip2LLM") -> bool:
        return model.qformer_text_input

    def own_section(self, config: Mapping[str, Any], folder: Path, *, arch: str) -> dict[str, Any]:
        section = super().own_section(config, folder, arch=arch)
        section[f"{registry.get_model_class(arch).llm_prefix}_model"] = str(folder)
        if config["model_type"] != "blip-2":
            section["qformer_text_input"] = True
        else:
            del section["qformer"]["vocab_size"]
        return section

    def config(self, model: "Blip2LLM", *, arch: str) -> Any:
        text = copy.deepcopy(model.lm.model.config)
        text.eos_token_id, text.pad_token_id = model.lm.end_id, model.lm.pad_id
        if text.to_dict().get("bos_token_id") is None:
            text.bos_token_id = text.eos_token_id
        config = transformers_class(self.hf_class(arch, model)).config_class(text_config=text, **self.sizes(model))
        if config.use_decoder_only_language_model == model.lm.is_encoder_decoder:
            raise InputError(f"transformers' BLIP-2 uses only a {text.model_type}'s decoder: keep it as a .pth file")
        return config

    def processor(self, model: "Blip2LLM", config: Any) -> Any:
        from transformers import Blip2Processor, InstructBlipProcessor

        images, tokenizer = image_processor(model.visual_encoder), copy.deepcopy(model.llm_tokenizer.tokenizer)
        processor: Any
        if model.qformer_text_input:
            reader = copy.deepcopy(model.tokenizer)
            processor = InstructBlipProcessor(images, tokenizer, reader, num_query_tokens=config.num_query_tokens)
        else:
            processor = Blip2Processor(images, tokenizer, num_query_tokens=config.num_query_tokens)
        config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        config.text_config.vocab_size = max(config.text_config.vocab_size, config.image_token_index + 1)
        return processor

    def tokenizers(self, model: "Blip2LLM") -> dict[str, Any]:
        return {QFORMER_TOKENIZER: model.tokenizer}

    def to_hf(self, own: Mapping[str, Tensor], model: "Blip2LLM", config: Any) -> Mapping[str, Tensor]:
        """Return the tensors under transformers' names, with rows for its image token."""
        given = dict(blip2_to_hf(own, model.llm_prefix, config.model_type))
        if config.image_token_index is not None:
            rows = config.text_config.vocab_size
            for key in [key for key in given if key.endswith(VOCABULARIES) and len(given[key]) < rows]:
                vocabulary = given[key].detach()
                mean = vocabulary.float().mean(dim=0, keepdim=True).to(vocabulary.dtype)  # never the likeliest output
                given[key] = torch.cat([vocabulary, mean.expand(rows - len(vocabulary), -1)])
        return given
