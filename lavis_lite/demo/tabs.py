"""The tabs of the page: each builds its components and connects them with an action."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lavis_lite.demo.actions import MAX_HITS, MAX_TEXT, MAX_TEXTS, Actions, Session
from lavis_lite.demo.components import (
    code_panel,
    code_values,
    examples,
    gallery,
    image_upload,
    maps_panel,
    maps_values,
    model_choice,
    on,
    settings_of,
    settings_panel,
    text_box,
    upload_of,
)
from lavis_lite.demo.examples import QUESTION, TEXT
from lavis_lite.inference.chat import NUM_FRAMES


def caption_tab(actions: Actions, shown: Sequence[Path]) -> None:
    """Captions of an image."""
    with gr.Row():
        with gr.Column():
            model = model_choice(actions, "caption")
            image = image_upload()
            examples(shown, image)
            prompt = text_box("Prompt", placeholder="optional: how the caption begins")
            count = gr.Slider(1, 5, value=1, step=1, label="Number of captions")
            with_map = gr.Checkbox(False, label="Show where the model looked for the first caption")
            settings = settings_panel()
            button = gr.Button("Caption", variant="primary")
        with gr.Column():
            captions = gr.Textbox(label="Captions", lines=3, interactive=False, buttons=["copy"])
            maps = maps_panel()
            code = code_panel()

    def run(model: str, image: Any, prompt: str, count: float, with_map: bool, *values: Any) -> list[Any]:
        found, made = actions.caption(model, upload_of(image), prompt, int(count), settings_of(values), with_map)
        return ["\n".join(found.texts), *maps_values(found.maps), *code_values(made)]

    inputs = [model, image, prompt, count, with_map, *settings]
    on([button.click, prompt.submit], run, inputs, [captions, *maps, *code])


def ask_tab(actions: Actions, shown: Sequence[Path]) -> None:
    """The answer to a question."""
    with gr.Row():
        with gr.Column():
            model = model_choice(actions, "ask")
            image = image_upload()
            examples(shown, image)
            question = text_box("Question", value=QUESTION)
            with_map = gr.Checkbox(False, label="Show where the model looked for the answer")
            settings = settings_panel()
            button = gr.Button("Ask", variant="primary")
        with gr.Column():
            answer = gr.Textbox(label="Answer", interactive=False, buttons=["copy"])
            maps = maps_panel()
            code = code_panel()

    def run(model: str, image: Any, question: str, with_map: bool, *values: Any) -> list[Any]:
        found, made = actions.ask(model, upload_of(image), question, settings_of(values), with_map)
        return [*found.texts, *maps_values(found.maps), *code_values(made)]

    on([button.click, question.submit], run, [model, image, question, with_map, *settings], [answer, *maps, *code])


def match_tab(actions: Actions, shown: Sequence[Path]) -> None:
    """Scores of texts, and the map of the best."""
    with gr.Row():
        with gr.Column():
            model = model_choice(actions, "match")
            image = image_upload()
            examples(shown, image)
            lines = text_box(
                "Texts, one per line", lines=3, value=f"{TEXT}\na blue cross", max_length=MAX_TEXT * MAX_TEXTS
            )
            with_map = gr.Checkbox(True, label="Show where the model looked for the best text")
            button = gr.Button("Compare with the image", variant="primary")
        with gr.Column():
            scores = gr.Dataframe(
                headers=["text", "itm", "itc"],
                column_widths=["60%", "20%", "20%"],
                interactive=False,
                label="Scores",
                wrap=True,
            )
            gr.Markdown("itm: the probability of a match; itc: the cosine similarity")
            maps = maps_panel()
            code = code_panel()

    def run(model: str, image: Any, lines: str, with_map: bool) -> list[Any]:
        found, made = actions.match(model, upload_of(image), lines, with_map)
        rows = [[one["text"], _number(one.get("itm")), _number(one.get("itc"))] for one in found.scores]
        return [rows, *maps_values(found.maps), *code_values(made)]

    on([button.click], run, [model, image, lines, with_map], [scores, *maps, *code])


def search_tab(actions: Actions, shown: Sequence[Path]) -> None:
    """Images of a folder by a text or an image."""
    with gr.Row():
        with gr.Column():
            model = model_choice(actions, "embed")
            folder = gr.Dropdown(
                list(actions.folders),
                value=next(iter(actions.folders)),
                label="Folder",
                visible=len(actions.folders) > 1,
            )
            text = text_box("What to look for", value=TEXT)
            with gr.Accordion("Or an image like this one (used if no text is written)", open=False):
                image = image_upload()
                examples(shown, image)
            with gr.Row():
                count = gr.Slider(1, MAX_HITS, value=9, step=1, label="Images")
                rerank = gr.Slider(0, MAX_HITS, value=0, step=1, label="Ranked anew (itm)")
            button = gr.Button("Search", variant="primary")
        with gr.Column():
            found = gallery("Found")
            code = code_panel()

    def run(model: str, folder: str, text: str, image: Any, count: float, rerank: float) -> list[Any]:
        hits, made = actions.search(model, folder, text, upload_of(image), int(count), int(rerank))
        return [[(hit.picture, f"{hit.score:.3f} {hit.name}") for hit in hits], *code_values(made)]

    on([button.click, text.submit], run, [model, folder, text, image, count, rerank], [found, *code])


def chat_tab(actions: Actions, shown: Sequence[Path]) -> None:
    """A conversation about an image or a video."""
    session = gr.State(None, time_to_live=3600)
    with gr.Row():
        with gr.Column():
            model = model_choice(actions, "chat")
            kind = gr.Radio(["image", "video"], value="image", label="About")
            image = image_upload()
            video = gr.Video(label="Video", sources=["upload"], visible=False, height=280)
            examples(shown, image)
        with gr.Column():
            log = gr.Chatbot(
                label="Conversation",
                show_label=False,
                height=320,
                buttons=["copy_all"],
                placeholder="Upload an image or a video, and ask about it",
            )
            message = text_box("Instruction or question", placeholder="What is in the picture?")
            with gr.Row():
                send = gr.Button("Send", variant="primary")
                clear = gr.Button("Begin anew")
            rounds = gr.Slider(0, 10, value=3, step=1, label="Earlier questions that each one follows")
            frames = gr.Slider(1, 32, value=NUM_FRAMES, step=1, label="Frames of the video", visible=False)
            settings = settings_panel()
            code = code_panel()

    def run(
        session: Session | None, model: str, kind: str, image: Any, video: Any, message: str, *values: Any
    ) -> list[Any]:
        rounds, frames, *rest = values
        is_video = kind == "video"
        session, made = actions.chat(
            session,
            model,
            upload_of(video if is_video else image),
            message,
            num_rounds=int(rounds),
            num_frames=int(frames) if is_video else None,
            settings=settings_of(rest),
        )
        return [session, _messages(session), "", *code_values(made)]

    on(
        [send.click, message.submit],
        run,
        [session, model, kind, image, video, message, rounds, frames, *settings],
        [session, log, message, *code],
    )
    on([clear.click], lambda: [None, []], [], [session, log])

    def show(kind: str) -> list[Any]:
        return [gr.update(visible=kind == "image"), *[gr.update(visible=kind == "video")] * 2]

    on([kind.change], show, [kind], [image, video, frames])


def compare_tab(actions: Actions, shown: Sequence[Path]) -> None:
    """Two models side by side."""
    captioners, answerers = actions.models.names("caption"), actions.models.names("ask")
    names = list(dict.fromkeys([*captioners, *answerers]))
    pair = captioners if len(captioners) > 1 else answerers
    with gr.Row():
        with gr.Column():
            image = image_upload()
            examples(shown, image)
        with gr.Column():
            question = text_box(
                "Question",
                placeholder="without one both write a caption",
                value=QUESTION if pair == answerers else "",
            )
            settings = settings_panel()
            button = gr.Button("Compare", variant="primary")
    with gr.Row():
        with gr.Column():
            first = gr.Dropdown(names, value=pair[0], label="First model")
            first_text = gr.Textbox(label="It says", interactive=False)
        with gr.Column():
            second = gr.Dropdown(names, value=pair[1], label="Second model")
            second_text = gr.Textbox(label="It says", interactive=False)

    def run(first: str, second: str, image: Any, question: str, *values: Any) -> list[str]:
        sides = actions.compare([first, second], upload_of(image), question, settings_of(values))
        return [f"{side.text}\n({side.seconds:.2f} s)" for side in sides]

    on([button.click, question.submit], run, [first, second, image, question, *settings], [first_text, second_text])


def _messages(session: Session) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for question, answer in session.conversation.rounds
        for role, text in (("user", question), ("assistant", answer))
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
