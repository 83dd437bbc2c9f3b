"""Pretraining: losses only. Evaluation is the mean of the loss, its parts and the accuracies of contrast and matching
within a batch over the split, sample by sample.

Surprising: hard negatives are drawn at random, so evaluation uses a generator of its own with a fixed seed; the same
weights give the same losses, and training goes on as if there had been no evaluation. Contrast and
negatives are with the rank's own batch, also in models that train with all ranks': the ranks' shares are uneven, and
waiting for one another they would hang.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavis_lite.common import dist
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.nn.learning import ACCURACIES
from lavis_lite.tasks.base import BaseTask, Metrics, Samples
from lavis_lite.tasks.results import Result, per_sample

EVALUATION_SEED = 0


@registry.register_task("image_text_pretrain")
@dataclass(kw_only=True)
class ImageTextPretrainTask(BaseTask):
    """Image-text pretraining. `agg_metrics` is minus the mean loss."""

    def check(self, model_class: type, dataset: Any, batch: Samples, *, split: str) -> None:
        """Raise for a split without image-text pairs."""
        if batch:
            check_pairs(batch)

    def evaluate(self, model: nn.Module, loader: Iterable[Samples], *, split: str, result_dir: Path) -> Metrics:
        """Mean losses over the split; torch's generators are left as they were."""
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(EVALUATION_SEED)
            return super().evaluate(model, loader, split=split, result_dir=result_dir)

    def valid_step(self, model: nn.Module, samples: Samples) -> list[Result]:
        """The batch's mean losses and accuracies for each of its samples, so that batches count by their size."""
        check_pairs(samples)
        with dist.alone():
            output = model(samples)
        size = len(samples["text_input"])
        wanted = [name for name in output if name.startswith("loss") or name in ACCURACIES]
        return per_sample(samples, **{name: [float(output[name])] * size for name in wanted})

    def score(self, results: list[Result], *, dataset: Any, split: str, result_dir: Path) -> Metrics:
        """`loss`, each `loss_*` and the accuracies, averaged over the samples; `agg_metrics` is `-loss`."""
        names = [name for name in results[0] if name.startswith("loss") or name in ACCURACIES]
        means = {name: sum(result[name] for result in results) / len(results) for name in names}
        return {**means, "agg_metrics": -means["loss"]}


def check_pairs(batch: Samples) -> None:
    """Raise ValueError if the batch has no texts."""
    if "text_input" not in batch:
        raise InputError(
            "the batch has no 'text_input': losses need image-text pairs, and this split is laid out for "
            "captioning or retrieval. Validate on a split of a pairs dataset, or leave run.valid_splits empty."
        )
