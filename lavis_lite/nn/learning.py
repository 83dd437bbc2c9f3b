"""Accuracies of contrast and matching within a batch, which their losses alone do not show.

With a feature queue `loss_itc` also falls where a model only separates the current batch from older entries, and the
`loss_itm` of a head that never answers "match" is not conspicuous. Nothing here waits for the device or draws random
numbers.

Letters: B samples of this rank, N of the current batch that they are compared with, D width of features.
"""

import torch
from torch import Tensor

ACCURACIES = ("acc_itc", "chance_itc", "acc_itm")
METRICS = (*ACCURACIES, "temp", "cos_image", "cos_text")
"""Entries of a model's output that are logged beside its losses.

`acc_itc` is the share of images and texts whose likeliest partner within the current batch is right, `chance_itc` that
share by guessing, `acc_itm` the mean of the matching head's accuracies on pairs and on non-pairs, `temp` the
temperature of the contrast, `cos_image` and `cos_text` the mean cosine of two images or texts of the batch.
"""

TEMPERATURE_LIMITS = (0.001, 0.5)
"""Bounds to which BLIP clamps the temperature."""


@torch.no_grad()
def contrast_metrics(
    i2t_BN: Tensor, t2i_BN: Tensor, positive_BN: Tensor, image_feat: Tensor, text_feat: Tensor, temp: Tensor
) -> dict[str, Tensor]:
    """Return the contrast's entries of `METRICS`. A batch of one has no cosines."""
    found = (top1_accuracy(i2t_BN, positive_BN) + top1_accuracy(t2i_BN, positive_BN)) / 2
    metrics = {"acc_itc": found, "chance_itc": positive_BN.float().mean(), "temp": temp.detach().clone()}
    if len(image_feat) > 1:
        metrics |= {"cos_image": mean_cosine(image_feat), "cos_text": mean_cosine(text_feat)}
    return metrics


def top1_accuracy(logits_BN: Tensor, positive_BN: Tensor) -> Tensor:
    """Return the share of rows whose largest column is a positive."""
    return positive_BN.gather(1, logits_BN.argmax(dim=1, keepdim=True)).float().mean()


def mean_cosine(features: Tensor) -> Tensor:
    """Return the mean cosine of two different rows of unit features (B,D), or (B,Q,D) query by query."""
    total, count = features.float().sum(dim=0).square().sum(dim=-1), len(features)
    return ((total - count) / (count * (count - 1))).mean()


@torch.no_grad()
def matching_accuracy(logits: Tensor, num_positive: int) -> Tensor:
    """Return the mean accuracy on the positives, which come first, and the negatives: 0.5 for a constant answer."""
    is_match = logits.argmax(dim=1).float()
    return (is_match[:num_positive].mean() + 1 - is_match[num_positive:].mean()) / 2
