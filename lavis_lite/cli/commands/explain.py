"""The command `explain`: where a model looked, as overlays on the image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavis_lite.cli.commands.common import LoadOptions, finish, with_options

if TYPE_CHECKING:
    from PIL import Image

    from lavis_lite.models.explain import Maps


@with_options(LoadOptions, model="blip_image_text_matching/base")
def explain(
    options: LoadOptions,
    *,
    image: Annotated[str | None, typer.Argument(help="an image: a path or URL", show_default=False)] = None,
    text: Annotated[
        str | None, typer.Option("--text", "-t", help="text to explain; without it what the model writes or answers")
    ] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="question to a model that answers")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="layer with cross-attention, from 0")] = None,
    out: Annotated[Path, typer.Option(help="overlays as .png or .html, or the maps as .npz")] = Path("explained.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output")] = False,
) -> None:
    """Show where a model looked (Grad-CAM).

    Of a matching model, why the text fits; of captions, one map per token; of answers, one per token of the question;
    of BLIP-2 one per query.
    """
    if image is None:
        raise typer.BadParameter("name an image")

    def execute() -> int:
        from lavis_lite.common.errors import ExistingFileError, InputError
        from lavis_lite.inference.inputs import load_image, one_item, open_source
        from lavis_lite.inference.pipelines import AskPipeline
        from lavis_lite.inference.results import check_folder
        from lavis_lite.models.explain import explain as explain_model

        if out.suffix not in (".png", ".html", ".npz"):
            raise InputError(f"--out {out}: the ending must be .png, .html or .npz")
        check_folder(out)
        if out.exists() and not overwrite:
            raise ExistingFileError(f"--out {out} exists already: --overwrite replaces it, --out names another")
        item = one_item(image)
        open_source(item, None)  # a broken file is found before the model is loaded
        loaded = options.load()
        samples: dict[str, Any] = {"image": load_image(item, loaded.process_image)[None].to(loaded.device)}
        if question is not None:
            samples["text_input"] = [AskPipeline(loaded).asked(question)]
        shown, maps = explain_model(loaded.model, samples, text=text, layer=layer)
        about = shown if question is None else f"{question} {shown}"
        write(out, open_source(item, loaded.process_image), maps, title=f"Where {options.model} looked", lead=about)
        typer.echo(f"{shown}\n{len(maps.labels)} maps: {out}")
        return 0

    finish(execute)


def write(out: Path, image: "Image.Image", maps: "Maps", *, title: str, lead: str) -> None:
    """Write the overlays of all maps and their mean, or the maps themselves."""
    import numpy as np

    from lavis_lite.cli.sheet import write_html, write_png
    from lavis_lite.common.checkpoint import atomic_write
    from lavis_lite.common.tiles import Tile
    from lavis_lite.inference.overlays import overlay, overlays, squashed

    if out.suffix == ".npz":
        atomic_write(out, lambda file: np.savez(file, labels=np.array(maps.labels), maps=maps.maps))
        return
    small = squashed(image)
    tiles = [Tile(title="image", images=[small]), Tile(title="mean of all", images=[overlay(small, maps.mean)])]
    for label, picture, share in overlays(small, maps):
        tiles.append(Tile(title=label, images=[picture], texts=[f"share of the largest: {share:.2f}"]))
    (write_html if out.suffix == ".html" else write_png)(tiles, out, title=title, lead=lead)


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("explain")(explain)
