"""The command `report`: a page about a run, or about all runs of a folder."""

from pathlib import Path
from typing import Annotated

import typer

from lavis_lite.cli.commands.common import finish


def report(
    run: Annotated[Path, typer.Argument(help="a job's folder, or a folder of several jobs", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="the page to write; default: report.html in the folder")] = None,
    samples: Annotated[int, typer.Option(min=1, help="predictions of each split, drawn at random")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="seed of the draw")] = 0,
) -> None:
    """Write a page with curves, metrics and predictions of a run."""

    def execute() -> None:
        from lavis_lite.common.errors import InputError
        from lavis_lite.report.jobs import find_jobs
        from lavis_lite.report.page import NAME, write_report

        if out is not None and out.suffix not in (".html", ".htm"):
            raise InputError(f"--out {out}: the ending must be .html")
        path = out or run / NAME
        jobs = find_jobs(run)
        typer.echo(write_report(jobs, path, samples=samples, seed=seed))

    finish(execute)


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)
