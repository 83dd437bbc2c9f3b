"""A running demo: models, private folder for uploads, server."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lavis_lite.common.address import LOCAL, check_address
from lavis_lite.common.errors import MissingFileError, MissingPackageError
from lavis_lite.demo.actions import Actions
from lavis_lite.demo.examples import NUM_SHOWN, write_examples
from lavis_lite.demo.models import DemoModels
from lavis_lite.inference.search import Progress

PORT = 7860
MAX_UPLOAD = 50 * 2**20
"""Bytes of an upload."""
MAX_WAITING = 32
"""Users whose click waits for the models; further ones are told to come back."""
EXAMPLES = "example images (shapes)"


def check_package() -> None:
    """Raise MissingPackageError if Gradio is not installed; it is told not to send anything before it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MissingPackageError('the demo needs gradio: `pip install "lavis-lite[demo]"`') from error


def check_folders(folders: Sequence[Path]) -> None:
    """Raise MissingFileError for a folder that is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise MissingFileError(f"--folder {folder}: no such folder")


@contextmanager
def running(
    models: DemoModels,
    *,
    folders: Sequence[Path] = (),
    host: str = LOCAL,
    port: int = PORT,
    progress: Progress | None = None,
) -> Iterator[str]:
    """Serve a demo until the context ends; yields its address. Uploads are deleted at the end.

    The features of `folders` are computed first, with `progress`.
    """
    check_package()
    check_address(host, port)
    check_folders(folders)
    with tempfile.TemporaryDirectory(prefix="lavis-lite-demo-") as private, _uploads_to(Path(private) / "uploads"):
        root = Path(private)
        from lavis_lite.demo.page import CSS, page, theme

        shown = write_examples(root / "examples")
        names = {str(folder): folder for folder in folders} | {EXAMPLES: root / "examples"}
        actions = Actions(models, names, index_storage={EXAMPLES: root / "index"})
        for model in models.names("embed"):
            for folder in folders:
                actions.index(model, str(folder), progress)
        blocks = page(actions, shown[:NUM_SHOWN])
        blocks.queue(max_size=MAX_WAITING, api_open=False)
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                max_file_size=MAX_UPLOAD,
                theme=theme(),
                css=CSS,
            )
            yield address
        finally:
            blocks.close(verbose=False)


@contextmanager
def _uploads_to(folder: Path) -> Iterator[None]:
    """Let Gradio keep its files in a folder; it reads this from the environment, at each upload."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before
