"""The losses of the BLIP papers as pure functions of tensors.

Letters: B rows of this rank, N columns (batch and queue, or all ranks' batch), Q queries, D width of features,
T tokens, L tokens of a batch that are predicted, E width of states, V vocabulary.
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.common.precision import without_autocast
from lavis_lite.common.transfer import upload
from lavis_lite.nn.sampling import draw

IGNORED = -100
"""Label of tokens that are not predicted."""
LABEL_SMOOTHING = 0.1
"""Of BLIP's language-model losses."""


class NextTokens(NamedTuple):
    """The tokens of a batch of texts that are predicted: `labels` (L,), and `positions` (L,) of the states that predict
    them among the batch's (BxT). Only they need scores of the vocabulary.
    """

    positions: Tensor
    labels: Tensor

    @classmethod
    def at(cls, labels_BT: Tensor) -> Self:
        """Return the tokens whose label counts, each predicted by the state at its own position.

        Their number depends on the labels: give labels on the CPU, because the host would wait for those on a GPU.
        """
        labels = labels_BT.flatten()
        positions = (labels != IGNORED).nonzero()[:, 0]
        return cls(positions, labels[positions])

    @classmethod
    def of(cls, labels_BT: Tensor) -> Self:
        """Return the tokens whose label counts, each predicted by the state before it, a text's first token by none."""
        return cls.at(F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED))

    def upload(self, device: torch.device) -> "NextTokens":
        """Return them on a device, without waiting for it."""
        return NextTokens(upload(self.positions, device), upload(self.labels, device))

    def states(self, states_BTE: Tensor) -> Tensor:
        """Return the states (L,E) that predict them."""
        return states_BTE.flatten(0, 1).index_select(0, self.positions)

    def sum_per_text(self, losses_L: Tensor, shape: torch.Size) -> Tensor:
        """Return the sum of each text's losses (B,); `shape` is that of the texts' ids, (B,T)."""
        return losses_L.new_zeros(shape.numel()).index_copy(0, self.positions, losses_L).view(shape).sum(dim=1)


def language_modeling_loss(logits_LV: Tensor, labels_L: Tensor, *, reduction: str = "mean") -> Tensor:
    """Return BLIP's label-smoothed cross-entropy, averaged over the labels or, with `none`, of each (L,)."""
    return F.cross_entropy(logits_LV, labels_L, label_smoothing=LABEL_SMOOTHING, reduction=reduction)


def smoothed_loss_per_text(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the label-smoothed cross-entropy of each text's labels, summed over its tokens: (B,)."""
    loss = F.cross_entropy(
        logits_BTV.transpose(1, 2),
        labels_BT,
        ignore_index=IGNORED,
        label_smoothing=LABEL_SMOOTHING,
        reduction="none",
    )
    return loss.sum(dim=1)


def smoothed_token_losses(logits_BV: Tensor, labels_BK: Tensor) -> Tensor:
    """Return the label-smoothed cross-entropy (B,K) of K alternatives to one token."""
    log_probs = F.log_softmax(logits_BV, dim=1)
    uniform = log_probs.mean(dim=1, keepdim=True)
    return -torch.lerp(log_probs.gather(1, labels_BK), uniform, LABEL_SMOOTHING)


def soft_cross_entropy(logits_BN: Tensor, targets_BN: Tensor) -> Tensor:
    """Return the cross-entropy to a target distribution, averaged over rows."""
    return -(F.log_softmax(logits_BN, dim=1) * targets_BN).sum(dim=1).mean()


def similarity(images: Tensor, texts_ND: Tensor) -> Tensor:
    """Return the similarity of each image (B,D), or of each of its queries (B,Q,D), to each text: (B,N) or (B,Q,N).

    Always in float32: rounded to bf16, many texts would have the same, and the temperature magnifies rounding.
    """
    with without_autocast(images.device):
        return images.float() @ texts_ND.float().t()


def best_query_similarity(queries_BQD: Tensor, texts_ND: Tensor) -> Tensor:
    """Return the similarity of each image's best query to each text: (B,N) (BLIP-2, section 3.1)."""
    return similarity(queries_BQD, texts_ND).max(dim=1).values


def contrastive_loss(i2t_BN: Tensor, t2i_BN: Tensor, targets_BN: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Return the mean cross-entropy of images' logits over all texts and of texts' over all images, to the same
    row-normalised targets.
    """
    loss_i2t = F.cross_entropy(i2t_BN, targets_BN, label_smoothing=label_smoothing)
    loss_t2i = F.cross_entropy(t2i_BN, targets_BN, label_smoothing=label_smoothing)
    return (loss_i2t + loss_t2i) / 2


def momentum_targets(sim_m_BN: Tensor, hard_BN: Tensor, alpha: float) -> Tensor:
    """Return soft labels: the momentum model's softmax with weight alpha, the hard (row-normalised) targets with weight
    1 - alpha (ALBEF, equation 6).
    """
    return alpha * sim_m_BN.softmax(dim=1) + (1 - alpha) * hard_BN


def same_id_targets(ids_B: Tensor, all_ids_N: Tensor) -> Tensor:
    """Return row-normalised targets that treat every pair with the same image id as positive."""
    positive = (ids_B[:, None] == all_ids_N[None, :]).float()
    return positive / positive.sum(dim=1, keepdim=True)


def draw_negatives(weights_BN: Tensor, is_positive_BN: Tensor) -> Tensor:
    """Draw one hard negative per row (B,), by weight, among the columns that are not positives.

    One batched draw, for which nothing waits. Where all negatives have weight 0 they are drawn uniformly. A row of
    positives only (a batch of one image) has no negative: any column is drawn, and the pair's label is wrong.
    """
    negative = ~is_positive_BN
    weights = weights_BN.masked_fill(is_positive_BN, 0.0)
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, negative.to(weights.dtype))
    weights = torch.where(negative.any(dim=1, keepdim=True), weights, torch.ones_like(weights))
    return draw(weights)


def negative_weights(logits_BN: Tensor, is_positive_BN: Tensor) -> Tensor:
    """Return the softmax over the negatives alone, whose proportions a very likely positive would blur; for
    `draw_negatives`.
    """
    return logits_BN.masked_fill(is_positive_BN, torch.finfo(logits_BN.dtype).min).softmax(dim=1)


def matching_loss(logits: Tensor, num_positive: int) -> Tensor:
    """Return the cross-entropy of matching logits (rows, 2), of which the first `num_positive` are of pairs."""
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[:num_positive] = 1
    return F.cross_entropy(logits, labels)
