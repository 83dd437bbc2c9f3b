"""Retrieval evaluation: similarity of all images and texts, then the matching head over the best candidates.

Image-major: an image's keys and values are computed once for all its candidate texts, and each (image, text) pair is
scored once although both directions may need it. Images are sharded over the ranks.

Note: between the two passes a rank keeps its images' tokens in main memory, in the type in which their keys and values
(several times larger) are computed; the device holds one batch. COCO's 5,000 test images at 364 px with ViT-g take 9.5
GB under autocast, 19 GB without, over all ranks.

Letters: I images, T texts, B images of a batch, S image tokens, D width of features.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.common.bounds import check_number
from lavis_lite.common.progress import progress
from lavis_lite.common.transfer import upload
from lavis_lite.models.batches import in_compute_type, padded, stack_texts, trimmed
from lavis_lite.models.image_text import ImageTextModel

UNRANKED = -100.0
MAX_CANDIDATES = 10**9
TEXTS_PER_STEP = 256
TEXTS_PER_STEP_OF_CPU = 64
"""Fewer, which are of more equal length; a GPU would have too little to do."""


class GalleryLoader(Protocol):
    """Batches of this rank's images, with their `index` in the dataset, which has all images and `text`."""

    dataset: Any

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the batches."""


@torch.no_grad()
def similarity_matrices(model: ImageTextModel, loader: GalleryLoader, k_test: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (I,T) and (T,I), float32, whole on every rank; a score is the matching logit plus the similarity.

    Pairs that are not among the `k_test` most similar have -100. With `k_test` 0 nothing is re-ranked: the scores are
    the similarities of all pairs.
    """
    check_number("k_test", k_test, 0, MAX_CANDIDATES)
    model.warn_of_cut_texts(loader.dataset.text)
    num_images, num_texts = len(loader.dataset), len(loader.dataset.text)
    chunks = (loader.dataset.text[start : start + TEXTS_PER_STEP] for start in range(0, num_texts, TEXTS_PER_STEP))
    texts = [model.tokenize(chunk, max_length=model.max_txt_len) for chunk in chunks]
    text_feat = torch.cat([model.encode_text(ids, mask) for ids, mask in texts])
    tokens, index, rows = compare_images(model, loader, text_feat, keep_tokens=k_test > 0)
    sims = whole_rows(rows, index, num_images)
    if k_test == 0:
        return sims.cpu().numpy(), sims.t().contiguous().cpu().numpy()
    wanted_i2t = top_mask(sims, min(k_test, num_texts))
    wanted_t2i = top_mask(sims.t(), min(k_test, num_images)).t()
    scores = torch.full((len(index), num_texts), UNRANKED, device=model.device)
    ids, mask = (part.cpu() for part in padded(stack_texts(*texts)))  # there, so that no image waits for the one before
    by_length = mask.sum(dim=1).argsort(stable=True)  # texts that are scored at once are padded little
    wanted = (wanted_i2t | wanted_t2i).cpu()
    at_once = TEXTS_PER_STEP_OF_CPU if model.device.type == "cpu" else TEXTS_PER_STEP
    for row, image in enumerate(progress(index.tolist(), len(index), name="re-ranking")):
        context = model.project_kv(upload(tokens[row][None], model.device))
        for part in by_length[wanted[image, by_length]].split(at_once):
            own = (part, *trimmed((ids[part], mask[part])))
            columns, own_ids, own_mask = (upload(tensor, model.device) for tensor in own)
            logits = model.matching_logits(own_ids, own_mask, context)
            scores[row, columns] = logits[:, 1].float() + sims[image, columns]
    scores = whole_rows(scores, index, num_images)
    unranked = torch.full_like(scores, UNRANKED)
    return (
        torch.where(wanted_i2t, scores, unranked).cpu().numpy(),
        torch.where(wanted_t2i, scores, unranked).t().contiguous().cpu().numpy(),
    )


def compare_images(
    model: ImageTextModel, loader: GalleryLoader, text_feat: Tensor, *, keep_tokens: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return this rank's images' tokens (none unless `keep_tokens`), one tensor (S,E) each in main memory, their
    dataset indices (N,) and their similarities to all texts (N,T); all empty on a rank without images.
    """
    tokens: list[Tensor] = []
    index = [torch.empty(0, dtype=torch.long, device=model.device)]
    sims = [text_feat.new_empty(0, len(text_feat))]
    for batch in loader:
        tokens_BSE, image_feat = model.image_features(model.checked_image(batch, answering=True).to(model.device))
        if keep_tokens:
            tokens += in_compute_type(tokens_BSE).cpu().unbind()
        index.append(upload(torch.as_tensor(batch["index"]), model.device))
        sims.append(model.full_similarity(image_feat, text_feat))
    return tokens, torch.cat(index), torch.cat(sims)


def whole_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Return all ranks' rows in one matrix, in dataset order."""
    whole = rows.new_empty(num_rows, rows.shape[1]).float()
    for their_index, their_rows in dist.gather_objects([(index.cpu(), rows.float().cpu())]):
        whole[their_index.to(whole.device)] = their_rows.to(whole.device)
    return whole


def top_mask(scores: Tensor, k: int) -> Tensor:
    """Return True at each row's k best columns."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(k, dim=1).indices, True)
