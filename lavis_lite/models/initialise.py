"""Initial weights from other families: an ImageNet ViT and BERT (BLIP, section 4.1).

Parameters that BERT lacks, the cross-attention and the two added tokens, stay random. Note: BERT adds an embedding of
the token type to every token, BLIP and the Q-Former have none. The embedding of type 0, the type of all tokens of a
text, is therefore added to the position embeddings, which gives the same states.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig as DefaultBert
from transformers import PreTrainedTokenizerBase

from lavis_lite.common.config.sections import BERT_TO_MED
from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.sources import download, folders, hub, weights
from lavis_lite.models.tokenizers import vocabulary
from lavis_lite.nn.attention import BertConfig
from lavis_lite.nn.vision import BlipViT, ImageEncoder, interpolate_pos_embed

logger = logging.getLogger(__name__)

SAME_SIZES = ("num_attention_heads", "hidden_size", "intermediate_size", "max_position_embeddings", "layer_norm_eps")
"""Sizes in BERT's config.json that must equal the model's; the tensors' shapes do not show the heads or the epsilon."""
FIXED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
"""Properties of the text transformer that no setting changes, under the names of BERT's config.json."""
PADDED_ROWS = 127
"""Rows that a file's vocabulary may have beyond the tokenizer's, to be a multiple of up to 128."""
VOCABULARIES = ("word_embeddings.weight", "predictions.decoder.weight", "predictions.bias", "decoder.bias")
"""Suffixes of the names of BERT's tensors that have a row for each token."""


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """The properties of a model's text transformer that a BERT must share to initialise it."""

    sizes: BertConfig
    section: str
    """The key of the model section that sets the sizes: `med` or `qformer`."""
    tokenizer: PreTrainedTokenizerBase

    @property
    def num_tokens(self) -> int:
        """Number of the tokenizer's tokens without those that BLIP adds, `[DEC]` first."""
        return max(self.tokenizer.vocab_size, self.tokenizer.bos_token_id)


def vit_weights(source: str, encoder: ImageEncoder) -> dict[str, Tensor]:
    """Return an image encoder's tensors under `visual_encoder.`: of a weight file or URL, or of timm's published model
    of that name. Position embeddings are resized to those of `encoder`.

    Raises:
        FileNotFoundError: the file does not exist, or it is not on this machine and LAVIS_LITE_OFFLINE is set.
        ValueError: timm has no model of this name, or its attention has another number of heads.
    """
    if not isinstance(encoder, BlipViT):
        state = weights.open_state(source if download.is_weight_file(source) else f"{weights.TIMM}{source}")
        return {f"visual_encoder.{name}": tensor for name, tensor in encoder.adapt_state_dict(dict(state)).items()}
    if not download.is_weight_file(source):
        with torch.device("meta"):
            modules = hub.timm_model(source, pretrained=False).modules()
        for heads in (getattr(module, "num_heads", None) for module in modules):  # which the tensors do not show
            if isinstance(heads, int) and heads != encoder.config.num_heads:
                own = f"model.vit.num_heads is {encoder.config.num_heads}"
                raise InputError(f"model.init_vit: {source} has {heads} attention heads, {own}: set it to the source's")
        source = f"{weights.TIMM}{source}"
    state = weights.open_state(source)
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    report_layers(len(blocks), encoder.config.depth, source=source.removeprefix(weights.TIMM))
    found = {name: tensor for name, tensor in state.items() if not name.startswith(("head", "fc_norm"))}
    if "pos_embed" in found:
        found["pos_embed"] = interpolate_pos_embed(found["pos_embed"], encoder.get_parameter("pos_embed").shape[1])
    return {f"visual_encoder.{name}": tensor for name, tensor in found.items()}


def check_weight_file(source: str, *, setting: str) -> None:
    """Raise FileNotFoundError if a source is the path of a weight file that is not there."""
    if download.is_weight_file(source) and not download.is_url(source) and not Path(source).expanduser().is_file():
        raise MissingFileError(f"model.{setting}: no file {source} (relative paths start at {Path.cwd()})")


def check_bert(source: str, model: TextModel) -> None:
    """Raise the errors of `bert_weights` that can be found in a folder on this machine without reading weights."""
    folder = download.local_folder(source, what="model.init_text: folder")
    if folder is not None:
        _checked_config(folder, model, source=source)
        weights.open_state(folder)


def bert_weights(source: str, model: TextModel, *, add_token_type: bool = True) -> dict[str, Tensor]:
    """Return BERT's tensors (of a folder or hub id) as `bert.*` and, if it has one, its language-model head as `cls.*`.

    With `add_token_type` the embedding of token type 0 is added to the position embeddings; without, it is dropped, as
    in LAVIS and BLIP. Vocabulary rows beyond the tokenizer's are left out.

    Raises:
        FileNotFoundError: the folder does not exist, or it lacks its config.json or weights.
        ValueError: sizes, activation, epsilon or vocabulary differ from the model's; the message has both values.
    """
    folder = download.local_folder(source, what="model.init_text: folder") or download.fetch_folder(source)
    config = _checked_config(folder, model, source=source)
    state = dict(weights.open_state(folder).renamed(bert_name))
    for name, tensor in state.items():
        if name.endswith(VOCABULARIES):
            state[name] = tensor[: model.num_tokens]
    positions, types = (state.get(f"bert.embeddings.{kind}_embeddings.weight") for kind in ("position", "token_type"))
    if add_token_type and positions is not None and types is not None:
        state["bert.embeddings.position_embeddings.weight"] = positions.float() + types[0].float()
    report_layers(config["num_hidden_layers"], model.sizes.num_layers, source=source)
    return state


def bert_name(name: str) -> str:
    """Return a tensor's name with the prefix that encoder-only files lack, and with the present names of the norms."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def _checked_config(folder: Path, model: TextModel, *, source: str) -> dict[str, Any]:
    """Return the folder's config.json with BERT's defaults. ValueError, with both values, for each difference between
    the BERT and the model, and for another vocabulary.
    """
    config = DefaultBert().to_dict() | FIXED | folders.read_config(folder)  # which may leave out defaults
    wrong = [f"{key} is {config[key]!r}, the model's {value!r}" for key, value in FIXED.items() if config[key] != value]
    for theirs in SAME_SIZES:
        ours = BERT_TO_MED[theirs]
        if config[theirs] != (size := vars(model.sizes)[ours]):
            wrong.append(f"{theirs} is {config[theirs]}, model.{model.section}.{ours} is {size}")
    if config["vocab_size"] not in range(model.num_tokens, model.num_tokens + PADDED_ROWS + 1):
        wrong.append(f"vocab_size is {config['vocab_size']}, the tokenizer has {model.num_tokens} tokens")
    tokens = {index: token for token, index in vocabulary(folder).items()}
    for index, token in enumerate(model.tokenizer.convert_ids_to_tokens(list(range(model.num_tokens)))):
        if tokens and tokens.get(index) != token and not wrong:
            wrong.append(f"token {index} is {tokens.get(index)!r}, the tokenizer's {token!r} (see model.tokenizer)")
    if wrong:
        raise InputError(f"model.init_text: {source} does not fit the model: {'; '.join(wrong)}")
    return config


def report_layers(num_theirs: int, num_ours: int, *, source: str) -> None:
    """Warn of layers that the model or the source lacks."""
    first, last = sorted((num_theirs, num_ours))
    layers = f"layer {first}" if last == first + 1 else f"layers {first}-{last - 1}"
    if num_theirs > num_ours:
        logger.warning(f"{source}: {layers} of its {num_theirs} will not be used, as the model has only {num_ours}")
    if num_theirs < num_ours:
        logger.warning(f"{source}: {layers} of the model's {num_ours} start at random, as it has only {num_theirs}")


def blip_text_weights(bert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return BERT's tensors under the names of BLIP's text encoder and decoder."""
    encoder = {f"text_encoder.{n.removeprefix('bert.')}": t for n, t in bert.items() if n.startswith("bert.")}
    return encoder | {f"text_decoder.{name}": tensor for name, tensor in bert.items()}


def qformer_weights(bert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return BERT's tensors under the Q-Former's names; the feed-forward layers of the queries are copies."""
    state = {}
    for name, tensor in bert.items():
        state[f"Qformer.{name}"] = tensor
        for part in ("intermediate", "output"):
            if f".{part}." in name and ".attention." not in name:
                state[f"Qformer.{name}".replace(f".{part}.", f".{part}_query.")] = tensor
    return state


def trained_qformer_weights(source: str) -> dict[str, Tensor]:
    """Return the tensors of the Q-Former and its queries in a checkpoint file or URL."""
    state = weights.open_state(source)
    return {name: state[name] for name in state if name.startswith(("Qformer.", "query_tokens"))}


@torch.no_grad()
def init_from_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, source: str, parts: Sequence[str]) -> None:
    """Copy every tensor that the model has too; a longer vocabulary keeps its added rows. Log how many tensors of
    `parts` (prefixes of names) are initialised from the source, and which parts of them stay random.

    Raises ValueError if a tensor has another shape, or if none fits.
    """
    own = model.state_dict(keep_vars=True)
    copied: set[int] = set()
    for name in sorted(own.keys() & state.keys()):
        mine, theirs = own[name], state[name]
        if name.endswith("position_ids") and mine.shape != theirs.shape:
            continue
        rows = mine[: len(theirs)] if name.endswith(VOCABULARIES) else mine  # added tokens come last
        if rows.shape != theirs.shape:
            raise InputError(f"{source}: {name} has shape {tuple(theirs.shape)}, this model's is {tuple(mine.shape)}")
        rows.copy_(theirs)
        copied.add(id(mine))
    if not copied:
        has = ", ".join(sorted(state)[:3])
        raise InputError(f"{source} holds no tensor that {type(model).__name__} could start from, only {has} ...")
    wanted = {name: p for name, p in own.items() if name.startswith(tuple(parts)) and isinstance(p, nn.Parameter)}
    random = {_part_of(name) for name, parameter in wanted.items() if id(parameter) not in copied}
    ids = {id(parameter) for parameter in wanted.values()}
    rest = f"; random: {', '.join(sorted(random))}" if random else ""
    names = ", ".join(part.rstrip(".") for part in parts)
    logger.info(f"{len(ids & copied)} of the {len(ids)} tensors of {names} start from {source}{rest}")


def _part_of(name: str) -> str:
    """Return the part of the model that a tensor belongs to."""
    for part in ("crossattention", "cls", "query_tokens"):
        if part in name.split("."):
            return part
    layer = re.search(r"\.(layer|blocks)\.(\d+)\.", name)
    return f"layer {layer[2]}" if layer else name.rpartition(".")[0]
