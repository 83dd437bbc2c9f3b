"""The command `search`: images of a folder by a text or by another image."""

from pathlib import Path
from typing import Annotated

import typer

from lavis_lite.cli.commands.common import BatchSize, LoadOptions, Threads, finish, with_options


@with_options(LoadOptions, model="blip_retrieval/coco")
def search(
    options: LoadOptions,
    *,
    folder: Annotated[Path | None, typer.Argument(help="folder of images", show_default=False)] = None,
    text: Annotated[str | None, typer.Argument(help="what to look for", show_default=False)] = None,
    image: Annotated[Path | None, typer.Option(help="look for images like this one")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="number of images to list")] = 10,
    rerank: Annotated[int, typer.Option(min=0, help="candidates that the matching head ranks anew (texts only)")] = 0,
    index: Annotated[Path | None, typer.Option(help="folder of the index; in the cache without it")] = None,
    batch_size: BatchSize = None,
    num_threads: Threads = 4,
) -> None:
    """Find images of a folder by a text or an image.

    The folder's features are computed once and kept; new and changed files are added at the next search.
    """
    if folder is None or (text is None) == (image is None):
        raise typer.BadParameter("give a folder, and a text or --image")
    if rerank and image is not None:
        raise typer.BadParameter("--rerank is of texts: the matching head compares images with texts")

    def execute() -> int:
        from lavis_lite.cli.commands.progress import progress
        from lavis_lite.datasets.image import open_image
        from lavis_lite.inference.inputs import find_items
        from lavis_lite.inference.pipelines import EmbedPipeline
        from lavis_lite.inference.search import ImageIndex

        find_items([folder])
        if image is not None:
            open_image(image)  # a missing folder or broken image is found before the model is loaded
        EmbedPipeline.check_model(options.model)
        pipeline = EmbedPipeline(options.load(), batch_size=batch_size, num_threads=num_threads)
        found = ImageIndex(folder, pipeline, storage=index)
        found.update(progress)
        hits = found.by_text(str(text), k=k, rerank=rerank) if image is None else found.by_image(image, k=k)
        for hit in hits:
            typer.echo(f"{hit.score:.4f}\t{hit.image}")
        return 0

    finish(execute)


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("search")(search)
