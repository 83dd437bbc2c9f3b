"""Retrieval evaluation: similarity of all images and texts, then the matching head over the best candidates.

Image-major: an image's keys and values are computed once and serve all its candidate texts, and each (image, text)
pair is scored once although both directions may ask for it. Images and texts are sharded over the ranks.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lavis_lite import dist
from lavis_lite.nn.attention import Context
from lavis_lite.nn.bert import BertModel

UNRANKED = -100.0
TEXTS_PER_STEP = 256


class Retriever(Protocol):
    """What re-ranking needs of a model."""

    text_encoder: BertModel
    max_txt_len: int
    device: torch.device

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]: ...

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor: ...

    def tokenize(self, texts: list[str], *, max_length: int | None = None) -> tuple[Tensor, Tensor]: ...

    def matching_logits(self, ids: Tensor, mask: Tensor, context: Context) -> Tensor: ...


@torch.no_grad()
def similarity_matrices(model: Retriever, loader: DataLoader, k_test: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (I,T) and (T,I), float32, whole on every rank; a score is the matching logit plus the cosine similarity.

    `loader` yields this rank's images with their `index`; `loader.dataset.text` are all texts.
    """
    num_images, num_texts = len(loader.dataset), len(loader.dataset.text)
    if k_test < 1:
        raise ValueError(f"k_test {k_test} must be at least 1")
    texts = [
        model.tokenize(chunk, max_length=model.max_txt_len) for chunk in chunks(loader.dataset.text, TEXTS_PER_STEP)
    ]
    text_feat = torch.cat([model.encode_text(ids, mask) for ids, mask in texts])
    tokens, index, image_feat = encode_images(model, loader)
    sims = whole_rows(
        image_feat @ text_feat.t() if len(index) else text_feat.new_zeros(0, num_texts), index, num_images
    )
    wanted_i2t = top_mask(sims, min(k_test, num_texts))
    wanted_t2i = top_mask(sims.t(), min(k_test, num_images)).t()
    scores = torch.full((len(index), num_texts), UNRANKED, device=model.device)
    padded = stack_all(texts)
    for row, image in enumerate(index.tolist()):
        columns = (wanted_i2t[image] | wanted_t2i[image]).nonzero().squeeze(1)
        context = model.text_encoder.project_context(tokens[row : row + 1])
        for part in columns.split(TEXTS_PER_STEP):
            ids, mask = trimmed(padded[0][part], padded[1][part])
            scores[row, part] = model.matching_logits(ids, mask, context)[:, 1].float() + sims[image, part]
    scores = whole_rows(scores, index, num_images)
    unranked = torch.full_like(scores, UNRANKED)
    return (
        torch.where(wanted_i2t, scores, unranked).cpu().numpy(),
        torch.where(wanted_t2i, scores, unranked).t().contiguous().cpu().numpy(),
    )


def encode_images(model: Retriever, loader: DataLoader) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (N,S,E), dataset indices (N,) and features (N,D) of this rank's images; all empty on a rank without
    images.
    """
    tokens, features, index = [], [], []
    for batch in loader:
        tokens_BSE, feature = model.encode_image(batch["image"].to(model.device))
        tokens.append(tokens_BSE)
        features.append(feature)
        index.append(torch.as_tensor(batch["index"], device=model.device))
    if not index:
        return torch.empty(0), torch.empty(0, dtype=torch.long, device=model.device), torch.empty(0)
    return torch.cat(tokens), torch.cat(index), torch.cat(features)


def whole_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """All ranks' rows in one matrix, in dataset order."""
    whole = rows.new_empty(num_rows, rows.shape[1]).float()
    for their_index, their_rows in dist.gather_objects([(index.cpu(), rows.float().cpu())]):
        whole[their_index.to(whole.device)] = their_rows.to(whole.device)
    return whole


def top_mask(scores: Tensor, k: int) -> Tensor:
    """True at each row's k best columns."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(k, dim=1).indices, True)


def chunks(items: list[str], size: int) -> Iterator[list[str]]:
    """Consecutive parts of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def stack_all(texts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All ids and masks, padded with zeros to the longest."""
    longest = max(ids.shape[1] for ids, _ in texts)
    return tuple(
        torch.cat([torch.nn.functional.pad(t, (0, longest - t.shape[1])) for t in part])
        for part in zip(*texts, strict=True)
    )


def trimmed(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Without the columns in which all texts are padded."""
    longest = int(mask.sum(dim=1).max())
    return ids[:, :longest], mask[:, :longest]
