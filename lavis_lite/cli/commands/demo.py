"""The command `demo`: a page in the browser that tries models."""

import threading
from pathlib import Path
from typing import Annotated

import typer

from lavis_lite.cli.commands.common import Checkpoint, Device, Precision, finish

DEFAULTS = ("blip_caption/base_coco", "blip_vqa/vqav2", "blip_image_text_matching/base")


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="architecture/type, checkpoint, Hugging Face folder or hub id; repeatable "
            f"[default: {', '.join(DEFAULTS)}]",
            show_default=False,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    folder: Annotated[
        list[Path] | None, typer.Option(help="folder of images that can be searched; repeatable", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0: all of this machine's")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at")] = 7860,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Try models in the browser.

    The page has a tab for each thing that the models can do: caption, ask, chat, match, search, compare.
    """

    def execute() -> int:
        from lavis_lite.cli.commands.progress import progress
        from lavis_lite.common.address import check_address, is_local
        from lavis_lite.demo.models import load_models
        from lavis_lite.demo.serve import check_folders, check_package, running

        check_address(host, port)  # before models are loaded, which takes a minute
        check_package()
        check_folders(folder or [])
        models = load_models(model or DEFAULTS, checkpoint=checkpoint, device=device, precision=precision)
        with running(models, folders=folder or [], host=host, port=port, progress=progress) as address:
            if not is_local(host):
                typer.echo("warning: everyone who reaches this machine can use the page; it has no password", err=True)
            typer.echo(f"the demo is at {address}  (Ctrl-C ends it)")
            threading.Event().wait()
        return 0

    finish(execute)


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)
