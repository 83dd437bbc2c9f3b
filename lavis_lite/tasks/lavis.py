"""LAVIS's base class of tasks, for tasks that are written after its tutorial: `setup_task`, `valid_step` that returns
results of any form, and `after_evaluation`.
"""

from pathlib import Path
from typing import Any

from torch import nn

from lavis_lite.common import dist
from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.protocols import EvalDataset, Samples
from lavis_lite.tasks import base
from lavis_lite.tasks.results import Result, write_json


class BaseTask(base.BaseTask):
    """A task as in LAVIS: `after_evaluation` returns the metrics of all ranks' results."""

    _result_dir = Path()

    @classmethod
    def setup_task(cls, cfg: Config) -> base.BaseTask:
        """Return the task; subclasses read `cfg.run_cfg`."""
        return cls()

    def evaluate(self, model: nn.Module, loader: base.EvalLoader, *, split: str, result_dir: Path) -> base.Metrics:
        """Return what `after_evaluation` does on rank 0, on every rank.

        Raises InputError for metrics without `agg_metrics`.
        """
        model, self._result_dir = base.unwrap(model), Path(result_dir)
        registry.register_path("result_dir", str(result_dir))
        registry.register_path("output_dir", str(self._result_dir.parent))
        results: list[Any] = []
        with base.evaluating(model):
            for samples in loader:
                with base.naming_missing_keys(samples, model):
                    results += self.valid_step(model, samples)
        results = dist.gather_objects(results)

        def score() -> base.Metrics:
            metrics = self.after_evaluation(val_result=results, split_name=split, epoch=0)
            if not isinstance(metrics, dict) or "agg_metrics" not in metrics:
                name = f"{type(self).__name__}.after_evaluation"
                raise InputError(f"{name}: must return a dict with agg_metrics, got {metrics!r}")
            return metrics

        return dist.on_main(score)

    def valid_step(self, model: Any, samples: Samples) -> list[Any]:
        """Return a list of results of a batch."""
        raise NotImplementedError(f"{type(self).__name__} does not define valid_step")

    def after_evaluation(self, val_result: list[Any], split_name: str, epoch: int, **kwargs: Any) -> base.Metrics:
        """Return the metrics of all results, with `agg_metrics`. Called on rank 0 only; subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} does not define after_evaluation")

    def save_result(
        self, result: list[Result], result_dir: str | Path | None, filename: str, remove_duplicate: str = ""
    ) -> str:
        """Write results as `<filename>.json` and return its path; of those that agree in a field the first one only.

        `result_dir` None is the folder of the run's results.
        """
        if remove_duplicate:
            result = list({entry[remove_duplicate]: entry for entry in reversed(result)}.values())[::-1]
        return str(write_json(Path(result_dir or self._result_dir) / f"{filename}.json", result))

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> base.Metrics:
        """Not used: `after_evaluation` takes its place."""
        raise NotImplementedError(f"{type(self).__name__} scores by after_evaluation")
