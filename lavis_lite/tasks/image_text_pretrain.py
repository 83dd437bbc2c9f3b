"""Pretraining: losses only. Evaluation averages the loss, its parts, and the accuracies of contrast and matching within
a batch over the samples of the split.

Note: hard negatives are drawn at random. Evaluation draws with a fixed seed and restores torch's generators, so the
same weights give the same losses and training is not affected. Contrast and negatives stay within the rank's own batch,
also in models that train with all ranks': ranks have different numbers of batches and would wait for one another.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from lavis_lite.common import dist
from lavis_lite.common.registry import registry
from lavis_lite.datasets.protocols import EvalDataset, Samples
from lavis_lite.nn.learning import ACCURACIES
from lavis_lite.tasks.base import BaseTask, EvalLoader, Metrics
from lavis_lite.tasks.results import Result, per_sample

EVALUATION_SEED = 0


@registry.register_task("image_text_pretrain")
@dataclass(kw_only=True)
class ImageTextPretrainTask(BaseTask):
    """Image-text pretraining. `agg_metrics` is minus the mean loss."""

    sample_keys: ClassVar[tuple[str, ...]] = ("text_input", "instance_id")

    def evaluate(self, model: nn.Module, loader: EvalLoader, *, split: str, result_dir: Path) -> Metrics:
        """Return the mean losses over the split."""
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(EVALUATION_SEED)
            return super().evaluate(model, loader, split=split, result_dir=result_dir)

    def valid_step(self, model: nn.Module, samples: Samples) -> list[Result]:
        """Return the batch's mean losses and accuracies for each of its samples, so batches count by their size."""
        with dist.single_process():
            output = model(samples)
        size = len(samples["text_input"])
        names = [name for name in output if name.startswith("loss") or name in ACCURACIES]
        return per_sample(samples, **{name: [float(output[name])] * size for name in names})

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Return each loss and accuracy averaged over the samples."""
        names = [name for name in results[0] if name != "instance_id"]
        means = {name: sum(result[name] for result in results) / len(results) for name in names}
        return {**means, "agg_metrics": -means["loss"]}
