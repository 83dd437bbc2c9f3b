"""The command `serve`: a model that answers requests in the form of OpenAI's chat completions."""

from dataclasses import dataclass
from typing import Annotated

import typer

from lavis_lite.cli.commands.common import LoadOptions, finish, with_options


@dataclass(kw_only=True)
class ServeOptions(LoadOptions):
    """The model that is served."""


@with_options(ServeOptions, model="blip_caption/base_coco")
def serve(
    options: ServeOptions,
    *,
    name: Annotated[str | None, typer.Option(help="name of the model in requests; default: --model")] = None,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0: all of this machine's")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at")] = 8000,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="also fetch images from http(s) URLs")] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="images that are computed together")] = 8,
    max_waiting: Annotated[int, typer.Option(min=1, help="requests that wait; further ones get the status 429")] = 64,
    max_mib: Annotated[int, typer.Option("--max-mib", min=1, help="MiB of a request")] = 20,
) -> None:
    """Serve a model by OpenAI's chat completions."""

    def execute() -> int:
        from lavis_lite.common.address import check_address, is_local
        from lavis_lite.common.errors import MissingPackageError

        check_address(host, port)  # before the model is loaded
        try:
            import uvicorn

            from lavis_lite.server.app import Limits, Server
        except ImportError as error:
            raise MissingPackageError(
                'serve needs starlette and uvicorn: `pip install "lavis-lite[server]"`'
            ) from error
        from lavis_lite.server.worker import Worker

        limits = Limits(max_bytes=max_mib * 2**20, allow_urls=allow_urls)
        with Worker(options.load(), max_waiting=max_waiting, max_batch=max_batch) as worker:
            app = Server(worker, name=name or options.model, limits=limits).app()
            limit = 2 * max_waiting + 16  # connections; also those that still send their bodies
            config = uvicorn.Config(
                app, host=host, port=port, log_level="warning", lifespan="off", limit_concurrency=limit
            )
            check_address(host, port)  # another program may have taken it meanwhile: uvicorn would exit with 3
            socket = config.bind_socket()
            socket.listen()  # who connects from now on is answered as soon as the server runs
            if not is_local(host):
                typer.echo(
                    "warning: everyone who reaches this machine can use the server; it has no password", err=True
                )
            shown = f"[{host}]" if ":" in host else host
            typer.echo(f"{name or options.model} is served at http://{shown}:{port}/v1  (Ctrl-C ends it)")
            uvicorn.Server(config).run(sockets=[socket])
        return 0

    finish(execute)


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)
