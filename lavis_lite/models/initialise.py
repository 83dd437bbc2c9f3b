"""Starting weights from outside the family: an ImageNet ViT and BERT (BLIP, section 4.1).

What BERT has no weights for, the cross-attention and the two added tokens, stays random. Surprising: BERT adds an
embedding of the token's type to every token, BLIP and the Q-Former have none. That of type 0, which all tokens of a
text have, is therefore added to the position embeddings, which gives the same states.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lavis_lite.common import checkpoint
from lavis_lite.common.config.sections import BERT_TO_MED
from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.sources import download, weights
from lavis_lite.common.sources.hub import read_json_mapping
from lavis_lite.models.tokenizers import vocabulary
from lavis_lite.nn.attention import BertConfig
from lavis_lite.nn.vision import BlipViT, interpolate_pos_embed
from lavis_lite.nn.vision_timm import published_model

logger = logging.getLogger(__name__)

WEIGHT_FILES = (".pth", ".pt", ".safetensors")
_SAME = ("num_attention_heads", "hidden_size", "intermediate_size", "max_position_embeddings", "layer_norm_eps")
SAME_SIZES = {name: BERT_TO_MED[name] for name in _SAME}
"""Names of sizes that must be equal in BERT's config.json and in ours; the tensors' shapes do not tell the heads or
the epsilon."""
FIXED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
"""What the text transformer computes, under the names of BERT's config.json."""
BERT_DEFAULTS = FIXED | {
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "vocab_size": 30522,
}
"""What a config.json means that does not say."""
PADDED_ROWS = 127
"""Rows that a file's vocabulary may have beyond the tokenizer's, to be a multiple of up to 128."""


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """What a model's text transformer must have in common with a BERT to start from it."""

    sizes: BertConfig
    section: str
    """The key of the model section that sets the sizes: `med` or `qformer`."""
    tokenizer: PreTrainedTokenizerBase

    @property
    def num_tokens(self) -> int:
        """The tokenizer's tokens without those that BLIP adds, `[DEC]` first."""
        return max(self.tokenizer.vocab_size, self.tokenizer.bos_token_id)


def vit_weights(source: str, encoder: BlipViT) -> dict[str, Tensor]:
    """A ViT's tensors under `visual_encoder.`: a file, or a timm model by name with its published weights (which is
    downloaded).

    Position embeddings are resized to those of `encoder`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: timm has no model of this name, or its attention has another number of heads.
    """
    if is_weight_file(source):
        state = checkpoint.find_state_dict(checkpoint.load(source), source=source)
    else:
        state = timm_state(source, num_heads=encoder.config.num_heads)
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    report_layers(len(blocks), encoder.config.depth, source=source)
    pos_embed = encoder.pos_embed
    state = {
        f"visual_encoder.{name}": tensor for name, tensor in state.items() if not name.startswith(("head", "fc_norm"))
    }
    name = "visual_encoder.pos_embed"
    return {**state, name: interpolate_pos_embed(state[name], pos_embed.shape[1])} if name in state else state


def timm_state(name: str, *, num_heads: int) -> dict[str, Tensor]:
    """The published weights of a timm model; raises as `vit_weights`."""
    source = published_model(name)
    found = {module.num_heads for module in source.modules() if isinstance(getattr(module, "num_heads", None), int)}
    if found and found != {num_heads}:
        raise InputError(
            f"model.init_vit: {name} has {', '.join(map(str, sorted(found)))} attention heads, model.vit.num_heads is "
            f"{num_heads}: set it to the source's, or choose another source"
        )
    return source.state_dict()


def is_weight_file(source: str) -> bool:
    """Whether the source is a file of weights by its ending, and not a folder or a name."""
    return Path(source).suffix in WEIGHT_FILES


def check_weight_file(source: str, *, setting: str) -> None:
    """Raise FileNotFoundError if a source that is a file of this machine is not there."""
    if is_weight_file(source) and not download.is_url(source) and not Path(source).expanduser().is_file():
        raise MissingFileError(f"model.{setting}: no file {source} (relative paths start at {Path.cwd()})")


def check_bert(source: str, model: TextModel) -> None:
    """Raise what `bert_weights` would, as far as a folder on this machine tells without reading weights."""
    folder = bert_folder(source)
    if folder is not None:
        check_bert_config(read_bert_config(folder), model, source=source)
        check_vocabulary(vocabulary(folder), model, source=source)
        weights.open_state(folder)


def bert_folder(source: str) -> Path | None:
    """The folder of BERT on this machine, or None for a hub id."""
    give = "give a folder with BERT's config.json and weights, or a hub id"
    return download.local_folder(source, what="model.init_text: folder", give=give)


def bert_weights(source: str, model: TextModel, *, add_token_type: bool = True) -> dict[str, Tensor]:
    """BERT's tensors (of a folder or hub id) as `bert.*` and, if it has one, its language-model head as `cls.*`.

    With `add_token_type` the embedding of token type 0 is part of the position embeddings; without, it is dropped, as
    LAVIS and BLIP did. Vocabulary rows beyond the tokenizer's are left out.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks its config.json or weights.
        ValueError: sizes, activation, epsilon or vocabulary differ from the model's; the message has both values.
    """
    folder = bert_folder(source) or download.fetch_folder(source)
    config = read_bert_config(folder)
    check_bert_config(config, model, source=source)
    check_vocabulary(vocabulary(folder), model, source=source)
    state = dict(weights.open_state(folder).renamed(bert_name))
    for name, tensor in state.items():
        if name.endswith(("word_embeddings.weight", "predictions.decoder.weight", "predictions.bias", "decoder.bias")):
            state[name] = tensor[: model.num_tokens]
    positions, types = (state.get(f"bert.embeddings.{kind}_embeddings.weight") for kind in ("position", "token_type"))
    if add_token_type and positions is not None and types is not None:
        state["bert.embeddings.position_embeddings.weight"] = positions.float() + types[0].float()
    report_layers(config["num_hidden_layers"], model.sizes.num_layers, source=source)
    return state


def bert_name(name: str) -> str:
    """BERT's name of a tensor: with the prefix that encoder-only files lack, and the norms' names of this century."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def read_bert_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json with BERT's defaults. Raises MissingFileError or InputError."""
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError(
            f"model.init_text: {folder} has no config.json: give a folder that save_pretrained wrote"
        )
    return BERT_DEFAULTS | read_json_mapping(path)


def check_bert_config(config: Mapping[str, Any], model: TextModel, *, source: str) -> None:
    """Raise ValueError, with both values, for whatever of the source the model would compute differently."""
    wrong = [
        f"{name} is {config[name]!r}, the model's {FIXED[name]!r}" for name in FIXED if config[name] != FIXED[name]
    ]
    wrong += [
        f"{theirs} is {config[theirs]}, model.{model.section}.{ours} is {getattr(model.sizes, ours)}"
        for theirs, ours in SAME_SIZES.items()
        if config[theirs] != getattr(model.sizes, ours)
    ]
    if config["vocab_size"] not in range(model.num_tokens, model.num_tokens + PADDED_ROWS + 1):
        wrong.append(f"vocab_size is {config['vocab_size']}, the tokenizer has {model.num_tokens} tokens")
    if wrong:
        raise InputError(
            f"model.init_text: {source} does not fit the model: {'; '.join(wrong)}. Set the model's sizes and "
            "tokenizer to the source's, or choose a source of the same sizes"
        )


def check_vocabulary(stored: Mapping[str, int], model: TextModel, *, source: str) -> None:
    """Raise ValueError, naming the first token, if the source's vocabulary (unless empty) is not the tokenizer's."""
    if not stored:
        return
    theirs = {index: token for token, index in stored.items()}
    for index, token in enumerate(model.tokenizer.convert_ids_to_tokens(range(model.num_tokens))):
        if theirs.get(index) != token:
            raise InputError(
                f"model.init_text: {source} has another vocabulary: its token {index} is {theirs.get(index)!r}, the "
                f"tokenizer's {token!r}. Set model.tokenizer={source}, or choose a source of the tokenizer's vocabulary"
            )


def report_layers(num_theirs: int, num_ours: int, *, source: str) -> None:
    """Warn of layers that the model has no place for, or that the source has no weights for."""
    first, last = sorted((num_theirs, num_ours))
    layers = f"layer {first}" if last == first + 1 else f"layers {first}-{last - 1}"
    if num_theirs > num_ours:
        logger.warning(f"{source}: {layers} of its {num_theirs} will not be used, as the model has only {num_ours}")
    if num_theirs < num_ours:
        logger.warning(
            f"{source}: {layers} of the model's {num_ours} will start at random, as it has only {num_theirs}"
        )


def blip_text_weights(bert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BERT's tensors under the names of BLIP's text encoder and decoder."""
    encoder = {f"text_encoder.{n.removeprefix('bert.')}": t for n, t in bert.items() if n.startswith("bert.")}
    return encoder | {f"text_decoder.{name}": tensor for name, tensor in bert.items()}


def qformer_weights(bert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BERT's tensors under the Q-Former's names; its feed-forward serves texts and queries alike."""
    state = {}
    for name, tensor in bert.items():
        state[f"Qformer.{name}"] = tensor
        for part in ("intermediate", "output"):
            if f".{part}." in name and ".attention." not in name:
                state[f"Qformer.{name}".replace(f".{part}.", f".{part}_query.")] = tensor
    return state


def trained_qformer_weights(source: str) -> dict[str, Tensor]:
    """Tensors of the Q-Former and its queries in a checkpoint file or URL."""
    state = checkpoint.find_state_dict(checkpoint.load(download.fetch(source)), source=source)
    found = {name: tensor for name, tensor in state.items() if name.startswith(("Qformer.", "query_tokens"))}
    if not found:
        raise InputError(
            f"model.init_text: {source} holds no Q-Former: it has {', '.join(sorted(state)[:3])}, ...: name a "
            "checkpoint of BLIP-2, or a folder or hub id of a BERT"
        )
    return found


@torch.no_grad()
def start_from(model: nn.Module, state: Mapping[str, Tensor], *, source: str, parts: Sequence[str]) -> None:
    """Copy every tensor that the model has too; a longer vocabulary keeps its added rows. Logs how many tensors of
    `parts` (prefixes of names) start from the source and what of them stays random.

    Raises ValueError if a tensor has another shape, or if none fits.
    """
    own = model.state_dict(keep_vars=True)
    copied: set[int] = set()
    for name in sorted(own.keys() & state.keys()):
        mine, theirs = own[name], state[name]
        is_vocabulary = (
            "word_embeddings" in name or "cls.predictions.decoder" in name or name.endswith("cls.predictions.bias")
        )
        if is_vocabulary and mine.shape[1:] == theirs.shape[1:] and len(mine) >= len(theirs):
            mine[: len(theirs)].copy_(theirs)
        elif mine.shape == theirs.shape:
            mine.copy_(theirs)
        elif name.endswith("position_ids"):
            continue
        else:
            raise InputError(
                f"{source}: {name} has shape {tuple(theirs.shape)}, this model's is {tuple(mine.shape)}: "
                "choose a source of the same sizes"
            )
        copied.add(id(mine))
    if not copied:
        raise InputError(
            f"{source} holds no tensor that {type(model).__name__} could start from; "
            f"it has {', '.join(sorted(state)[:3])}, ..."
        )
    wanted = {name: p for name, p in own.items() if name.startswith(tuple(parts)) and isinstance(p, nn.Parameter)}
    left = {_kind(name) for name, parameter in wanted.items() if id(parameter) not in copied}
    total = len({id(parameter) for parameter in wanted.values()})
    given = len({id(parameter) for parameter in wanted.values()} & copied)
    rest = f"; random: {', '.join(sorted(left))}" if left else ""
    logger.info(
        f"{given} of the {total} tensors of {', '.join(p.rstrip('.') for p in parts)} start from {source}{rest}"
    )


def _kind(name: str) -> str:
    """Of a tensor's name the part of the model that it belongs to."""
    words = name.split(".")
    for part in ("crossattention", "cls", "query_tokens"):
        if part in words:
            return part
    stack = next((word for word in ("layer", "blocks") if word in words), None)
    return f"layer {words[words.index(stack) + 1]}" if stack else ".".join(words[:-1])
