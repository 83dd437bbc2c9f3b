"""The command `chat`: questions about images in the terminal."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lavis_lite.cli.commands.common import (
    LoadOptions,
    WritingOptions,
    finish,
    with_options,
)

if TYPE_CHECKING:
    from lavis_lite.inference.chat import Conversation

HELP = "/image FILE takes another image or video, /clear forgets the questions so far, /quit ends (as Ctrl-D does)"


@dataclass(kw_only=True)
class ChatOptions(WritingOptions, LoadOptions):
    """Options of loading the model and of its answers."""


@with_options(ChatOptions, model="blip2_t5_instruct/flant5xl")
def chat(
    options: ChatOptions,
    *,
    image: Annotated[str | None, typer.Argument(help="an image or video: a path or URL", show_default=False)] = None,
    rounds: Annotated[int, typer.Option(min=0, help="earlier questions and answers that each question follows")] = 3,
    num_frames: Annotated[int | None, typer.Option(min=1, help="frames of a video  [default: 4]")] = None,
) -> None:
    """Ask questions about an image or a video in the terminal."""
    if image is None:
        raise typer.BadParameter("name an image")
    settings = options.writing() | ({"seed": options.seed} if options.sample else {})

    def execute() -> None:
        from lavis_lite.cli.commands.common import given
        from lavis_lite.inference.chat import Conversation
        from lavis_lite.inference.inputs import VIDEOS, one_item, open_source

        if Path(image).suffix.lower() not in VIDEOS:
            open_source(one_item(image), None)  # a broken file is found before the model is loaded
        frames = given(num_frames=num_frames)
        conversation = Conversation(options.load(), num_rounds=rounds, **settings)
        conversation.look_at(image, **frames)
        typer.echo(HELP, err=True)
        while (line := _read()) is not None:
            if line == "/quit":
                break
            _respond(conversation, line, frames)

    finish(execute)


def _respond(conversation: "Conversation", line: str, frames: dict[str, int]) -> None:
    from lavis_lite.common.errors import UserError

    command, _, rest = line.partition(" ")
    try:
        if command == "/image":
            conversation.look_at(rest.strip(), **frames)
        elif command == "/clear":
            conversation.clear()
        elif command.startswith("/"):
            typer.echo(HELP, err=True)
        elif line:
            typer.echo(conversation.ask(line))
    except UserError as error:
        typer.echo(f"error: {error}", err=True)


def _read() -> str | None:
    """Return a line of input, None at its end."""
    try:
        return input("> ").strip()
    except EOFError:
        typer.echo(err=True)
        return None


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat")(chat)
