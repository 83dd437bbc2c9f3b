"""Hugging Face's config.json against our constructors: which class is which architecture, and all sizes, both ways.

Surprising: Hugging Face's vision encoder has one epsilon for all its norms, ours 1e-6 in the blocks and 1e-5 behind
them (`ln_vision`, as published), so that BLIP-2's features differ by about 1e-5 between the two.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lavis_lite.common.config.sections import BERT_TO_MED
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry

INSTRUCT = "InstructBlipForConditionalGeneration"
CLASSES: dict[str, tuple[str, ...]] = {
    "BlipForConditionalGeneration": ("blip_caption",),
    "BlipForQuestionAnswering": ("blip_vqa",),
    "BlipForImageTextRetrieval": ("blip_image_text_matching", "blip_retrieval"),
    "Blip2ForImageTextRetrieval": ("blip2_image_text_matching", "blip2", "blip2_feature_extractor"),
    "Blip2ForConditionalGeneration": ("blip2_opt", "blip2_t5", "blip2_llm", "blip2_vicuna"),
    INSTRUCT: ("blip2_vicuna_instruct", "blip2_t5_instruct", "blip2_opt", "blip2_t5", "blip2_llm", "blip2_vicuna"),
}
"""transformers' classes and the architectures that can have the same parts, the usual one first."""
SAME_PARTS = {
    "Blip2Model": "Blip2ForConditionalGeneration",
    "InstructBlipModel": INSTRUCT,
    "InstructBlipVideoModel": INSTRUCT,
    "InstructBlipVideoForConditionalGeneration": INSTRUCT,
}
"""Classes that are read like another one, as which they are written."""
BERT_TO_QFORMER = BERT_TO_MED | {"cross_attention_frequency": "cross_attention_freq"}
VISION_TO_VIT = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "patch_size": "patch_size",
    "layer_norm_eps": "norm_eps",
}
DROPOUTS = ("hidden_dropout", "attention_dropout")
QFORMER_TOKENIZER = "qformer_tokenizer"


def hf_class_of(arch: str, *, reads_text: bool = False) -> str:
    """transformers' class for an architecture, or for one with a language model whose Q-Former reads the question.
    ValueError if there is none.
    """
    names = [name for name, archs in CLASSES.items() if arch in archs]
    if not names:
        known = sorted({arch for archs in CLASSES.values() for arch in archs})
        raise InputError(f"transformers has no class for {arch}; it has one for {', '.join(known)}")
    return INSTRUCT if reads_text and INSTRUCT in names else names[0]


def arch_of(config: Mapping[str, Any], *, source: str, wanted: str | None = None) -> str:
    """The architecture for a config.json: `wanted` if it fits, else the usual one for the class and language model.

    ValueError if transformers' class is none of ours, or `wanted` has other parts.
    """
    name = hf_class_in(config)
    archs = CLASSES.get(SAME_PARTS.get(name, name), ())
    if not archs:
        raise InputError(
            f"{source}: its config.json is of {name or config.get('model_type')}, and only "
            f"{', '.join((*CLASSES, *SAME_PARTS))} can be read"
        )
    if wanted is not None and wanted not in archs:
        raise InputError(f"{source} is a {name}, which is no {wanted}; it can be {' or '.join(archs)}")
    if wanted is not None:
        return wanted
    family = (config.get("text_config") or {}).get("model_type")
    families = {arch: getattr(registry.get_model_class(arch), "family", None) for arch in archs}
    model_types = {arch: () if own is None else own.model_types for arch, own in families.items()}
    return next(arch for arch in archs if not model_types[arch] or family in model_types[arch])


def hf_class_in(config: Mapping[str, Any]) -> str | None:
    """The class that a config.json names."""
    return next(iter(config.get("architectures") or ()), None)


def model_section(config: Mapping[str, Any], folder: Path, *, arch: str) -> dict[str, Any]:
    """The `model` section that builds what a config.json describes, with its tokenizers and weights from the folder."""
    name = hf_class_in(config)
    config = _config_class(name).from_dict(dict(config)).to_dict()  # with what the file leaves at its defaults
    vision = config["vision_config"]
    section: dict[str, Any] = {
        "arch": arch,
        "checkpoint": str(folder),
        "image_size": vision["image_size"],
        "vit": {ours: vision[theirs] for theirs, ours in VISION_TO_VIT.items()},
    }
    section["vit"]["mlp_ratio"] = (vision["intermediate_size"] + 0.5) / vision["hidden_size"]  # timm rounds down
    if name.startswith("BlipFor"):
        section |= {"tokenizer": str(folder), "med": _sizes(config["text_config"], BERT_TO_MED)}
    else:
        section |= _blip2_section(config, folder, arch=arch)
    if name.endswith("ForImageTextRetrieval"):
        section["embed_dim"] = config["image_text_hidden_size"]
    return section


def _blip2_section(config: Mapping[str, Any], folder: Path, *, arch: str) -> dict[str, Any]:
    qformer = config["qformer_config"]
    section = {
        "vit_model": "eva_clip_g",
        "vit_weights": str(folder),
        "num_query_token": config["num_query_tokens"],
        "qformer": _sizes(qformer, BERT_TO_QFORMER),
    }
    part = getattr(registry.get_model_class(arch), "llm_prefix", None)
    if part is not None:
        section[f"{part}_model"] = str(folder)
    reads_text = part is None or config["model_type"] != "blip-2"
    if reads_text and part is not None:
        section["qformer_text_input"] = True
    if not reads_text:
        del section["qformer"]["vocab_size"]
    if (folder / QFORMER_TOKENIZER).is_dir():
        section["tokenizer"] = str(folder / QFORMER_TOKENIZER)
    elif part is None:
        section["tokenizer"] = str(folder)
    return section


def _sizes(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config and ours not in DROPOUTS}


def hf_config(model: nn.Module, *, arch: str) -> Any:
    """transformers' configuration of our model. ValueError if no class of transformers has such a model."""
    name = hf_class_of(arch, reads_text=getattr(model, "qformer_text_input", False))
    config_class, is_blip = _config_class(name), name.startswith("BlipFor")
    vision = vision_config(model.visual_encoder, is_blip2=not is_blip)
    if is_blip:
        text = _theirs(model.text_config(), BERT_TO_MED)
        text |= {
            "bos_token_id": model.decoder_start,
            "sep_token_id": model.tokenizer.sep_token_id,
            "eos_token_id": model.tokenizer.sep_token_id,
            "pad_token_id": model.tokenizer.pad_token_id,
            "label_smoothing": 0.1,
        }
        width = {"image_text_hidden_size": model.text_proj.out_features} if hasattr(model, "text_proj") else {}
        return config_class(text_config=text, vision_config=vision, label_smoothing=0.1, **width)
    return _blip2_config(model, config_class, vision)


def _blip2_config(model: nn.Module, config_class: Any, vision: dict[str, Any]) -> Any:
    qformer = _theirs(model.Qformer.config, BERT_TO_QFORMER)
    qformer["encoder_hidden_size"] = vision["hidden_size"]
    sizes: dict[str, Any] = {"num_query_tokens": model.query_tokens.shape[1]}
    part = getattr(model, "llm_prefix", None)
    if part is None:
        qformer["use_qformer_text_input"] = True
        sizes["image_text_hidden_size"] = model.text_proj.out_features
    else:
        sizes["text_config"] = language_model_config(model)
    config = config_class(vision_config=vision, qformer_config=qformer, **sizes)
    if part is not None and config.use_decoder_only_language_model == model.lm.is_encoder_decoder:
        raise InputError(
            f"transformers' BLIP-2 takes of a {config.text_config.model_type} the decoder alone, so that this model "
            "cannot be written as a folder: keep it as a .pth file"
        )
    return config


def language_model_config(model: nn.Module) -> Any:
    """The language model's configuration with the tokens that our model begins, ends and pads texts with."""
    config = copy.deepcopy(model.lm.model.config)
    config.eos_token_id, config.pad_token_id = model.lm.end_id, model.lm.pad_id
    if getattr(config, "bos_token_id", None) is None:
        config.bos_token_id = config.eos_token_id
    return config


def vision_config(encoder: nn.Module, *, is_blip2: bool) -> dict[str, Any]:
    """Sizes of an image encoder as transformers names them. ValueError if its class has no such encoder."""
    if type(encoder).__name__ != ("EvaViT" if is_blip2 else "BlipViT"):
        raise InputError(
            "transformers has EVA-CLIP (vit_model eva_clip_g) in BLIP-2 and BLIP's own ViT in BLIP, but no "
            f"{type(encoder).__name__}"
        )
    block = encoder.blocks[0]
    return {
        "hidden_size": encoder.width,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": block.attn.num_heads,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_embed.patch_size[0],
        "layer_norm_eps": block.norm1.eps,
    }


def _theirs(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in names.items()}


def _config_class(hf_class: str) -> Any:
    import transformers

    return getattr(transformers, hf_class).config_class
