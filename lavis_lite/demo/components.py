"""Gradio components that several tabs share, and how the page calls functions and shows their errors."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from lavis_lite.common.errors import InputError, UserError
from lavis_lite.demo.actions import MAX_TEXT, Actions, Upload
from lavis_lite.demo.code import Code
from lavis_lite.demo.models import Task
from lavis_lite.demo.settings import METHODS, TextSettings
from lavis_lite.inference.overlays import Overlay


def upload_of(payload: dict[str, Any] | None) -> Upload | None:
    """Return the file that a component's raw value names. Gradio has checked that it is an upload or an example."""
    if payload is None:
        return None
    path, name = payload.get("path"), payload.get("orig_name")
    if not isinstance(path, str):
        raise InputError("the upload has no file; try again")
    return Upload(Path(path), Path(name or path).name)


def on(
    triggers: Sequence[Callable[..., Any]],
    function: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
) -> None:
    """Call a function at events, with the raw values of inputs: images are opened by this package, not by Gradio, whose
    errors about broken files do not say what is wrong. A UserError is shown in the page.
    """

    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False, duration=20) from None
        except (torch.OutOfMemoryError, MemoryError) as error:
            message = "out of memory: choose fewer captions or beams, or a smaller image"
            raise gr.Error(message, print_exception=False) from error

    gr.on(list(triggers), call, list(inputs), list(outputs), preprocess=False, api_visibility="private")


def model_choice(actions: Actions, task: Task) -> gr.Dropdown:
    """Return the choice among the models that can do a task, hidden if there is one."""
    names = actions.models.names(task)
    return gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)


def image_upload(label: str = "Image", **options: Any) -> gr.Image:
    """Return an image to upload or paste."""
    return gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=280,
        elem_classes="photo",
        **options,
    )


def examples(paths: Sequence[Path], component: Any) -> None:
    """Offer images to click on."""
    gr.Examples([[str(path)] for path in paths], [component], label="Examples", api_visibility="private")


def gallery(title: str) -> gr.Gallery:
    """Return a gallery of pictures below its title."""
    gr.Markdown(f"**{title}**")
    return gr.Gallery(
        label=title, show_label=False, columns=3, object_fit="contain", interactive=False, elem_classes="pictures"
    )


def maps_panel() -> list[Any]:
    """Return a gallery for maps and the column that it is in, which is not shown without maps."""
    with gr.Column(visible=False) as column:
        maps = gallery("Where the model looked")
    return [maps, column]


def maps_values(maps: Sequence[Overlay]) -> list[Any]:
    """Return the values of `maps_panel`."""
    return [[(one.picture, one.label) for one in maps], gr.update(visible=bool(maps))]


def text_box(label: str, **options: Any) -> gr.Textbox:
    """Return a text field."""
    return gr.Textbox(label=label, max_length=options.pop("max_length", MAX_TEXT), **options)


def settings_panel() -> list[Any]:
    """Return the components of `TextSettings`, in the order of its fields."""
    with gr.Accordion("Settings", open=False):
        method = gr.Radio(list(METHODS), value=METHODS[0], label="How texts are written")
        with gr.Row():
            num_beams = gr.Slider(1, 10, value=3, step=1, label="Beams (beam search)")
            top_p = gr.Slider(0.05, 1.0, value=0.9, step=0.05, label="Share of the nucleus (sampling)")
            temperature = gr.Slider(0.1, 2.0, value=1.0, step=0.1, label="Temperature (sampling)")
        with gr.Row():
            min_length = gr.Slider(0, 100, value=0, step=1, label="Least tokens; 0: as the model's own")
            max_length = gr.Slider(0, 256, value=0, step=1, label="Most tokens; 0: as the model's own")
            seed = gr.Number(42, precision=0, minimum=0, maximum=2**32 - 1, label="Seed (sampling)")
    return [method, num_beams, top_p, temperature, min_length, max_length, seed]


def settings_of(values: Sequence[Any]) -> TextSettings:
    """Return the settings of the values of `settings_panel`."""
    method, num_beams, top_p, temperature, min_length, max_length, seed = values
    return TextSettings(
        method=method,
        num_beams=int(num_beams),
        top_p=float(top_p),
        temperature=float(temperature),
        min_length=int(min_length),
        max_length=int(max_length),
        seed=int(seed or 0),
    )


def code_panel() -> list[gr.Code]:
    """Return the fields of `Code`."""
    with gr.Accordion("Copy as code", open=False):
        python = gr.Code(
            language="python", label="Python", interactive=False, show_line_numbers=False, lines=1, wrap_lines=True
        )
        command = gr.Code(
            language="shell", label="Command line", interactive=False, show_line_numbers=False, lines=1, wrap_lines=True
        )
    return [python, command]


def code_values(code: Code) -> list[str]:
    """Return the values of `code_panel`."""
    return [code.python, code.command]
