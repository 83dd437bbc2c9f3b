"""Everything that a training changes, as it is saved and restored, so that a resumed run continues exactly."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lavis_lite.common import checkpoint, checkpoint_parts, dist, sharding
from lavis_lite.common.logger import MetricLogger
from lavis_lite.common.rng import restore_rng_state, rng_state, seed_rank
from lavis_lite.models.base import BaseModel
from lavis_lite.runners.learning import LearningWatch
from lavis_lite.runners.loaders import TrainLoader
from lavis_lite.runners.streaming import merged_positions

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Model, optimizer, position and running means of a training. `step` and `epoch` count what is done: updates, and
    (inner) epochs with their validation.
    """

    model: BaseModel
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    scaler: torch.amp.GradScaler
    loader: TrainLoader
    watch: LearningWatch
    device: torch.device
    metrics: MetricLogger = field(default_factory=MetricLogger)
    by_dataset: MetricLogger = field(default_factory=MetricLogger)
    """The mean loss of each training set, where each step's samples are of one."""
    step: int = 0
    epoch: int = 0
    best_metric: float | None = None
    best_epoch: int | None = None

    @property
    def position(self) -> dict[str, Any]:
        """The progress in a checkpoint: `step`, `epoch`, and the best validation so far."""
        return {"step": self.step, "epoch": self.epoch, "best": {"metric": self.best_metric, "epoch": self.best_epoch}}

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters that the optimizer updates."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def save(self, *, whole: bool = True) -> dict[str, Any]:
        """Return the state in types that a `weights_only` load accepts; every rank must call it. Model and optimizer
        are gathered on rank 0, or with `whole=False` each rank's own shards.
        """
        gathered = sharding.whole if whole else dict
        rank = {"rng": rng_state(self.device), "seen": self.loader.seen, "unreadable": self.loader.unreadable}
        if self.loader.streams:
            rank["streams"] = {name: stream.state_dict() for name, stream in self.loader.streams.items()}
        return {
            "model": gathered(self.model.checkpoint_state_dict()),
            "optimizer": gathered(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            **self.position,
            "metrics": [self.metrics.state_dict(), self.by_dataset.state_dict()],
            "learning": self.watch.state_dict(),
            "ranks": dist.gather_objects([rank]),
        }

    def restore(self, saved: Mapping[str, Any], *, seed: int, source: Path) -> None:
        """Take up what `save` returned and `source` holds; hyperparameters stay this run's."""
        saved = checkpoint_parts.read(saved, source, like=self._named(saved["optimizer"]["state"]))
        checkpoint.load_into(self.model, checkpoint.find_state_dict(saved, source=str(source)), source=source)
        apply_hyperparameters(self.optimizer, saved["optimizer"])
        if saved["scaler"]:  # empty if the checkpoint's precision needed none
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.epoch = saved["step"], saved["epoch"]
        self.best_metric, self.best_epoch = saved["best"]["metric"], saved["best"]["epoch"]
        for metrics, means in zip((self.metrics, self.by_dataset), saved["metrics"], strict=True):
            metrics.load_state_dict(means)
        self.watch.step = self.step
        if "learning" in saved:  # not in older checkpoints
            self.watch.load_state_dict(saved["learning"])
        self._restore_rank(saved["ranks"], seed=seed, source=source)

    def _named(self, moments: Mapping[int, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the tensors that are divided among the ranks as those of a checkpoint are to be, by their names there:
        the model's, and for an optimizer's values the parameter.
        """
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        keys = {f"optimizer.state.{number}.{key}": number for number, values in moments.items() for key in values}
        return named | {name: self.parameters[number] for name, number in keys.items()}

    def _restore_rank(self, ranks: Sequence[Mapping[str, Any]], *, seed: int, source: Path) -> None:
        """Restore this rank's generators, counts and positions in streams; with another number of ranks, seed the
        generators anew and say so, and divide the rest.
        """
        world = dist.world_size()
        for name, stream in self.loader.streams.items():
            stream.load_state_dict(merged_positions([rank["streams"][name] for rank in ranks]))
        if len(ranks) == world:
            mine = ranks[dist.rank()]
            restore_rng_state(mine["rng"], self.device)
            self.loader.seen, self.loader.unreadable = mine["seen"], mine["unreadable"]
            return
        seen, unreadable = (sum(rank[key] for rank in ranks) for key in ("seen", "unreadable"))
        self.loader.seen, self.loader.unreadable = seen // world, (unreadable + dist.rank()) // world
        counts = f"{len(ranks)} processes, this run has {world}"
        logger.warning(f"{source} was written by {counts}: random numbers (dropout) will differ, not the data's order")
        seed_rank(seed, step=self.step)


def apply_hyperparameters(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state and keep this run's hyperparameters (betas, weight decay ...) instead of the saved."""
    kept = ("params", "lr")  # the rate is set at each step
    own = [{key: value for key, value in group.items() if key not in kept} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {number: _divided(parameters[number], values) for number, values in state["state"].items()}
    optimizer.load_state_dict({**state, "state": moments})
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _divided(parameter: torch.Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer's values of a parameter, those of its shape divided as it is."""
    return {
        name: sharding.like(parameter, value) if value.shape == parameter.shape else value
        for name, value in values.items()
    }
