"""The models of a demo, and what each can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from PIL import Image

from lavis_lite.common.errors import InputError, InputTypeError, UnknownNameError
from lavis_lite.common.registry import did_you_mean
from lavis_lite.inference.loading import Loaded, load
from lavis_lite.inference.pipelines import PIPELINES, Pipeline
from lavis_lite.models.blip2.llm import Blip2LLM
from lavis_lite.models.image_text import ImageTextModel

Task = Literal["caption", "ask", "match", "embed", "chat"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True, kw_only=True)
class DemoModel:
    """A loaded model, with the names by which it was given."""

    name: str
    checkpoint: str | None
    loaded: Loaded

    def can(self, task: Task) -> bool:
        """Return whether the model has the interface that the task needs."""
        if task == "chat":
            return isinstance(self.loaded.model, Blip2LLM)
        return isinstance(self.loaded.model, PIPELINES[task].protocol)

    @property
    def compares_texts(self) -> bool:
        """Return whether it has a matching head whose maps explain a text."""
        return isinstance(self.loaded.model, ImageTextModel)

    def pipeline(self, task: Task) -> Any:
        """Return the pipeline of a task that is not `chat`."""
        kind: type[Pipeline] = PIPELINES[task]
        return kind(self.loaded, num_threads=1)


class DemoModels:
    """The models by name, in the order given."""

    def __init__(self, models: Sequence[DemoModel]) -> None:
        self.by_name = {model.name: model for model in models}
        for model in models:
            try:
                model.loaded.process_image(Image.new("RGB", (8, 8)))
            except InputTypeError as error:  # it reads features of another encoder
                raise InputError(f"--model {model.name}: the demo is of models that read images; {error}") from error
            if not any(model.can(task) for task in TASKS):
                kind = type(model.loaded.model).__name__
                raise InputError(
                    f"--model {model.name}: the demo has nothing for {kind}; it shows models that caption, answer, "
                    "match or embed"
                )

    def __getitem__(self, name: str) -> DemoModel:
        if name not in self.by_name:
            raise UnknownNameError(f"model {name!r} is not in this demo. {did_you_mean(name, self.by_name)}")
        return self.by_name[name]

    def names(self, task: Task) -> list[str]:
        """Return the names of the models that can do a task."""
        return [name for name, model in self.by_name.items() if model.can(task)]


def load_models(
    names: Sequence[str], *, checkpoint: str | None = None, device: str = "auto", precision: str = "auto"
) -> DemoModels:
    """Load models as `load` does; `checkpoint` is of one model only."""
    if checkpoint is not None and len(names) != 1:
        raise InputError(
            f"--checkpoint {checkpoint}: {len(names)} models are given; give one --model with it, or name checkpoints "
            "by --model"
        )
    return DemoModels(
        [
            DemoModel(
                name=name,
                checkpoint=checkpoint,
                loaded=load(name, checkpoint=checkpoint, device=device, precision=precision),
            )
            for name in dict.fromkeys(names)
        ]
    )
