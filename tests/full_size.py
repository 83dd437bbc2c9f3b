"""Models of any size on the meta device, where they take no memory and no weights are read.

The hub is not at hand: a small tokenizer stands in for BERT's, and the packaged config.json and a small tokenizer of
the same family for a language model.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig

import lavis_lite
from lavis_lite.common.config.schema import schema_of
from lavis_lite.common.config.sections import MODEL_KEYS
from lavis_lite.common.registry import registry

REFERENCE = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference"))
TINY_HF = REFERENCE / "tiny_hf"
PACKAGED = Path(lavis_lite.__file__).parent / "configs" / "llms"
BERT_VOCABULARY = {"med": 30524, "qformer": 30523}
STAND_INS = {"qwen2": "opt"}
"""Model types whose tokenizer is of another's kind: byte pairs, as OPT's."""
MADE_BY_QUICKSTART = {"output/quickstart_blip2/opt": "tiny_opt", "output/quickstart_blip2/t5": "tiny_t5"}


def meta_model(section: Mapping[str, Any]) -> nn.Module:
    """The model of a `model` section, without memory."""
    settings = {key: value for key, value in section.items() if key not in MODEL_KEYS}
    for key in {"opt_model", "t5_model", "llm_model"} & settings.keys():
        settings[key] = MADE_BY_QUICKSTART.get(settings[key], settings[key])
    model_class = registry.get_model_class(section["arch"])
    reads_texts = "tokenizer" in schema_of(model_class)[0]
    berts = ("bert-base-uncased", "output/real/packages/minilm")
    if reads_texts and settings.get("tokenizer", berts[0]) in berts:
        part = "qformer" if section["arch"].startswith("blip2") else "med"
        settings[part] = {"vocab_size": BERT_VOCABULARY[part], **settings.get(part, {})}
        settings["tokenizer"] = str(TINY_HF / "bert")
    with torch.device("meta"), hub_stand_ins():
        return model_class(**settings)


@contextlib.contextmanager
def hub_stand_ins() -> Iterator[None]:
    """What the hub says of the language models whose config.json is packaged, without a network."""
    get_config, get_tokenizer = PreTrainedConfig.get_config_dict, AutoTokenizer.from_pretrained

    def config(source: Any, *args: Any, **settings: Any) -> Any:
        return get_config(packaged(source) or source, *args, **settings)

    def tokenizer(source: Any, *args: Any, **settings: Any) -> Any:
        folder = packaged(source)
        family = folder and json.loads((folder / "config.json").read_text())["model_type"]
        return get_tokenizer(TINY_HF / STAND_INS.get(family, family) if family else source, *args, **settings)

    with (
        mock.patch.object(PreTrainedConfig, "get_config_dict", config),
        mock.patch.object(AutoTokenizer, "from_pretrained", tokenizer),
    ):
        yield


def packaged(source: Any) -> Path | None:
    """The package's folder for a hub id."""
    owner, _, name = str(source).partition("/")
    folder = PACKAGED / name.lower().removesuffix("-v1.1").removesuffix("-instruct")
    return folder if owner and name and folder.is_dir() else None
