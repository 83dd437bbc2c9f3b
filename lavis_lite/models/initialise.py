"""Starting weights from outside the family: an ImageNet ViT and BERT (BLIP, section 4.1).

What BERT has no weights for, the cross-attention and the two added tokens, stays random.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from lavis_lite import checkpoint, download
from lavis_lite.errors import InputError, MissingFileError
from lavis_lite.hub import from_hub
from lavis_lite.nn.vision import interpolate_pos_embed
from lavis_lite.nn.vision_timm import timm_weights

logger = logging.getLogger(__name__)


def vit_weights(source: str, pos_embed: Tensor) -> dict[str, Tensor]:
    """A ViT's tensors under `visual_encoder.`: a file, or a timm model by name with its published weights (which is
    downloaded).

    Position embeddings are resized to those of `pos_embed`.
    """
    if Path(source).suffix in (".pth", ".pt", ".safetensors"):
        state = checkpoint.find_state_dict(checkpoint.load(source), source=source)
    else:
        state = timm_weights(source)
    state = {
        f"visual_encoder.{name}": tensor for name, tensor in state.items() if not name.startswith(("head", "fc_norm"))
    }
    name = "visual_encoder.pos_embed"
    return {**state, name: interpolate_pos_embed(state[name], pos_embed.shape[1])} if name in state else state


def bert_weights(source: str) -> dict[str, Tensor]:
    """BERT's tensors (a folder or hub id) under the names of BLIP's text encoder and decoder."""
    state = {}
    for name, tensor in load_bert(source).state_dict().items():
        state[f"text_decoder.{name}"] = tensor
        if name.startswith("bert."):
            state[f"text_encoder.{name.removeprefix('bert.')}"] = tensor
    return state


def load_bert(source: str) -> nn.Module:
    """Return transformers' BERT of a folder or hub id."""
    from transformers import BertForMaskedLM

    try:
        return from_hub(BertForMaskedLM.from_pretrained, source)
    except MissingFileError as error:
        raise MissingFileError(f"init_text: no BERT could be loaded from {source}: {error}") from error


def qformer_bert_weights(source: str) -> dict[str, Tensor]:
    """Tensors of BLIP-2's Q-Former: from a checkpoint file that has one, or BERT's (a folder or hub id), whose
    feed-forward serves texts and queries alike.
    """
    if Path(source).suffix in (".pth", ".pt", ".safetensors"):
        state = checkpoint.find_state_dict(checkpoint.load(download.fetch(source)), source=source)
        return {name: tensor for name, tensor in state.items() if name.startswith(("Qformer.", "query_tokens"))}
    state = {}
    for name, tensor in load_bert(source).state_dict().items():
        state[f"Qformer.{name}"] = tensor
        for part in ("intermediate", "output"):
            if f".{part}." in name and ".attention." not in name:
                state[f"Qformer.{name}".replace(f".{part}.", f".{part}_query.")] = tensor
    return state


@torch.no_grad()
def start_from(model: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Copy every tensor that the model has too; a longer vocabulary keeps its added rows.

    Raises ValueError if a tensor has another shape, or if none fits.
    """
    own = model.state_dict(keep_vars=True)
    copied = 0
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
        copied += 1
    if not copied:
        raise InputError(
            f"{source} holds no tensor that {type(model).__name__} could start from; "
            f"it has {', '.join(sorted(state)[:3])}, ..."
        )
    logger.info(f"{copied} tensors start from {source}")
