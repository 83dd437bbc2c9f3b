"""The command `chat`: questions about images in the terminal."""

from typing import Annotated

import typer

from lavis_lite.cli.commands.common import LoadOptions, finish, with_options

HELP = "/image FILE takes another image, /clear forgets the questions so far, /quit ends (as Ctrl-D does)"


@with_options(LoadOptions, model="blip2_t5_instruct/flant5xl")
def chat(
    options: LoadOptions,
    *,
    image: Annotated[str | None, typer.Argument(help="an image: a path or URL", show_default=False)] = None,
    rounds: Annotated[int, typer.Option(min=0, help="earlier questions and answers that each question follows")] = 3,
    num_beams: Annotated[int | None, typer.Option(help="beams of the search")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens that an answer has at most")] = None,
) -> None:
    """Ask questions about an image in the terminal."""
    if image is None:
        raise typer.BadParameter("name an image")

    def execute() -> None:
        from lavis_lite.cli.commands.common import given
        from lavis_lite.inference.chat import Conversation

        conversation = Conversation(
            options.load(), num_rounds=rounds, **given(num_beams=num_beams, max_length=max_length)
        )
        conversation.look_at(image)
        typer.echo(HELP, err=True)
        while (line := _read()) is not None:
            if line == "/quit":
                break
            _respond(conversation, line)

    finish(execute)


def _respond(conversation: "Conversation", line: str) -> None:  # type: ignore[name-defined]  # noqa: F821
    from lavis_lite.common.errors import UserError

    command, _, rest = line.partition(" ")
    try:
        if command == "/image":
            conversation.look_at(rest.strip())
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
