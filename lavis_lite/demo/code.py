"""Copy as code: the Python and the command line that do what the page did."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lavis_lite.demo.models import DemoModel

FLAGS = {"use_nucleus_sampling": "sample"}
"""Options of the command line with other names than the settings."""


class Code(NamedTuple):
    """The same in both forms."""

    python: str
    command: str

    def then(self, other: Code) -> Code:
        """Return the code of both, one after the other."""
        return Code(f"{self.python}\n\n{other.python}", f"{self.command}\n{other.command}")


def command_line(command: str, positional: Sequence[str], model: DemoModel, options: Mapping[str, Any]) -> str:
    """Return `lavis-lite COMMAND ...`; options of None or False are left out, of a list repeated."""
    words = ["--model", model.name]
    words += ["--checkpoint", model.checkpoint] if model.checkpoint is not None else []
    for name, value in options.items():
        flag = f"-{name}" if len(name) == 1 else "--" + FLAGS.get(name, name).replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            for one in map(str, value if isinstance(value, list | tuple) else [value]):
                words += [f"{flag}={one}"] if one.startswith("-") else [flag, one]
    end = ["--", *positional] if any(word.startswith("-") for word in positional) else []
    return shlex.join(["lavis-lite", command, *([] if end else positional), *words, *end])


def python_call(
    task: str, model: DemoModel, image: str, settings: Mapping[str, Any], *, result: str, seed: int | None = None
) -> str:
    """Return the call of a pipeline with one image, which prints `result`, an expression with `found`."""
    given = "".join(f", {name}={value!r}" for name, value in settings.items() if value is not None)
    lines = [
        *([] if seed is None else ["import torch"]),
        "from lavis_lite import pipeline",
        "",
        f"{task} = pipeline({task!r}, {_model(model)})",
        *([] if seed is None else [f"torch.manual_seed({seed})"]),
        f"found = {task}({image!r}{given})",
        f"print({result})",
    ]
    return "\n".join(lines)


def search_code(model: DemoModel, folder: str, *, text: str | None, image: str | None, k: int, rerank: int) -> Code:
    """Return the code of a search by a text or an image."""
    find = f"index.by_image({image!r}, k={k})" if text is None else f"index.by_text({text!r}, k={k}, rerank={rerank})"
    python = "\n".join(
        [
            "from lavis_lite import pipeline",
            "from lavis_lite.inference.search import ImageIndex",
            "",
            f"index = ImageIndex({folder!r}, pipeline('embed', {_model(model)}))",
            "index.update()",
            f"for hit in {find}:",
            "    print(hit.score, hit.image)",
        ]
    )
    positional = [folder] if text is None else [folder, text]
    options = {"k": k, "image": image, "rerank": rerank or None}
    return Code(python, command_line("search", positional, model, options))


def chat_code(
    model: DemoModel,
    source: str,
    questions: Sequence[str],
    *,
    num_rounds: int,
    settings: Mapping[str, Any],
    video: Mapping[str, int],
) -> Code:
    """Return the code of a conversation; `video` has `num_frames` if it is about one."""
    given = "".join(f", {name}={value!r}" for name, value in settings.items())
    name = "" if model.checkpoint is None else f", checkpoint={model.checkpoint!r}"
    python = "\n".join(
        [
            "from lavis_lite.inference.chat import Conversation",
            "from lavis_lite.inference.loading import load",
            "",
            f"chat = Conversation(load({model.name!r}{name}), num_rounds={num_rounds}{given})",
            f"chat.look_at({source!r}{''.join(f', {key}={value}' for key, value in video.items())})",
            *[f"print(chat.ask({question!r}))" for question in questions],
        ]
    )
    return Code(python, command_line("chat", [source], model, {"rounds": num_rounds, **video, **settings}))


def explain_code(
    model: DemoModel, image: str, text: str, *, question: str | None = None, asked: str | None = None
) -> Code:
    """Return the code of the maps of a text: one that is compared with an image, a caption, or the answer to a
    question, which the model reads as `asked`.
    """
    samples = "'image': image" if asked is None else f"'image': image, 'text_input': [{asked!r}]"
    python = "\n".join(
        [
            "from lavis_lite.inference.inputs import Item, load_image",
            "from lavis_lite.inference.loading import load",
            "from lavis_lite.models.explain import explain",
            "",
            f"loaded = load({_model(model).removeprefix('model=')})",
            f"image = load_image(Item(name={image!r}, image={image!r}), loaded.process_image)[None].to(loaded.device)",
            f"text, maps = explain(loaded.model, {{{samples}}}, text={text!r})",
            "print(maps.labels, maps.maps.shape)",
        ]
    )
    return Code(
        python, command_line("explain", [image], model, {"question": question, "text": text, "out": "explained.png"})
    )


def _model(model: DemoModel) -> str:
    checkpoint = "" if model.checkpoint is None else f", checkpoint={model.checkpoint!r}"
    return f"model={model.name!r}{checkpoint}"
