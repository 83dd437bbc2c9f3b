"""Services that a run's numbers and pictures go to besides its folder: `run.tracker`. None is imported unless named.

Their own settings are environment variables: WANDB_PROJECT, MLFLOW_TRACKING_URI, TRACKIO_DIR ...
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from lavis_lite.common.errors import MissingPackageError

PROJECT = "lavis_lite"
MAX_VALUE, MAX_PARAMETERS = 500, 100
"""MLflow's limits: characters of a parameter, parameters of a call."""
Pictures = Sequence[tuple[Image.Image, str]]


class Tracker(Protocol):
    """Takes scalars and pictures by step."""

    def write(self, scalars: Mapping[str, float], *, step: int) -> None: ...
    def write_images(self, name: str, pictures: Pictures, *, step: int) -> None: ...
    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases, or Trackio, which has the same functions."""

    def __init__(self, package: Any, job_dir: Path, config: Mapping[str, Any], **settings: Any) -> None:
        self.package = package
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        package.init(project=project, name=job_dir.name, config=dict(config), **settings)

    def write(self, scalars: Mapping[str, float], *, step: int) -> None:
        self.package.log(dict(scalars), step=step)

    def write_images(self, name: str, pictures: Pictures, *, step: int) -> None:
        images = [self.package.Image(image, caption=text) for image, text in pictures]
        self.package.log({f"{name}/{number}": image for number, image in enumerate(images)}, step=step)

    def close(self) -> None:
        self.package.finish()


class MlflowTracker:
    """MLflow: the configuration as parameters and as a file."""

    def __init__(self, package: Any, job_dir: Path, config: Mapping[str, Any]) -> None:
        self.package = package
        package.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        package.start_run(run_name=job_dir.name)
        values = [(key, str(value)[:MAX_VALUE]) for key, value in _flat(config)]
        for start in range(0, len(values), MAX_PARAMETERS):
            package.log_params(dict(values[start : start + MAX_PARAMETERS]))
        package.log_dict(dict(config), "config.yaml")

    def write(self, scalars: Mapping[str, float], *, step: int) -> None:
        self.package.log_metrics(dict(scalars), step=step)

    def write_images(self, name: str, pictures: Pictures, *, step: int) -> None:
        for number, (image, _) in enumerate(pictures):
            self.package.log_image(image, artifact_file=f"{name}/step{step}_{number}.png")

    def close(self) -> None:
        self.package.end_run()


def _wandb(package: Any, job_dir: Path, config: Mapping[str, Any]) -> Tracker:
    return WandbTracker(package, job_dir, config, dir=str(job_dir))


TRACKERS: dict[str, Callable[[Any, Path, Mapping[str, Any]], Tracker]] = {
    "wandb": _wandb,
    "mlflow": MlflowTracker,
    "trackio": WandbTracker,
}


def find_packages(names: Sequence[str]) -> dict[str, Any]:
    """Return the packages of trackers. Raises MissingPackageError."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.import_module(name)
        except ImportError as error:
            advice = f"`pip install 'lavis-lite[{name}]'`, or leave it out"
            raise MissingPackageError(f"run.tracker: {name}: the package is not installed: {advice}") from error
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
