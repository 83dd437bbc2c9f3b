"""Options that several commands share, and the run of a pipeline over many images."""

import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATHS",
        help="images, folders, patterns, URLs, lists (.txt) or tables (.csv, .tsv, .jsonl, .json, .parquet) of paths",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="file of results: .jsonl, .json, .csv, .tsv or .parquet; without it they are printed"),
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="architecture/type, checkpoint, Hugging Face folder or hub id")
]
Checkpoint = Annotated[str | None, typer.Option(help="weights in place of those of architecture/type")]
ModelOptions = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="a setting of the model; repeatable")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="images per batch; found automatically without it")]
Threads = Annotated[int, typer.Option("--num-threads", min=1, help="threads that read images")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")]


@dataclass(kw_only=True)
class LoadOptions:
    """Options of loading a command's model."""

    model: Model = ""
    checkpoint: Checkpoint = None
    option: ModelOptions = None
    device: Device = "auto"
    precision: Precision = "auto"

    def overrides(self) -> dict[str, Any]:
        """Return the settings of the model. Raises BadParameter for one without `=`."""
        import yaml

        given = [text.partition("=") for text in self.option or []]
        for name, equals, _ in given:
            if not equals or not name:
                raise typer.BadParameter(f"--option {name}: write KEY=VALUE")
        return {name: yaml.safe_load(value) for name, _, value in given}

    def load(self) -> Any:
        """Return the loaded model (`lavis_lite.inference.loading.Loaded`)."""
        from lavis_lite.inference.loading import load

        how = {"checkpoint": self.checkpoint, "device": self.device, "precision": self.precision}
        return load(self.model, **how, **self.overrides())  # type: ignore[arg-type]


@dataclass(kw_only=True)
class WritingOptions:
    """Options of generating a command's texts."""

    num_beams: Annotated[int | None, typer.Option(min=1, help="beams of the search")] = None
    sample: Annotated[bool, typer.Option("--sample", help="nucleus sampling in place of beam search")] = False
    top_p: Annotated[float | None, typer.Option(min=1e-6, max=1.0, help="share of the nucleus")] = None
    temperature: Annotated[float | None, typer.Option(min=1e-6, help="temperature of sampling")] = None
    seed: Annotated[int, typer.Option(help="seed of sampling")] = 42
    min_length: Annotated[int | None, typer.Option(min=0, help="tokens that a text has at least")] = None
    max_length: Annotated[int | None, typer.Option(min=1, help="tokens that a text has at most")] = None

    def writing(self) -> dict[str, Any]:
        """Return the settings of `generate` that were given."""
        names = ("num_beams", "top_p", "temperature", "min_length", "max_length")
        settings = given(**{name: value for name, value in vars(self).items() if name in names})
        return settings | ({"use_nucleus_sampling": True} if self.sample else {})


@dataclass(kw_only=True)
class ImageOptions(LoadOptions):
    """The images that a command reads, and how."""

    paths: Paths
    image_column: Annotated[str, typer.Option(help="column of a table with the images, or their paths")] = "image"
    batch_size: BatchSize = None
    num_threads: Threads = 4
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output")] = False


@dataclass(kw_only=True)
class ResumableOptions(ImageOptions):
    """Those of a command whose output is written as it is computed."""

    resume: Annotated[bool, typer.Option("--resume", help="continue an unfinished output")] = False

    def check_output(self, out: Path | None) -> None:
        """Raise BadParameter for options of an output without one."""
        if out is None and (self.resume or self.overwrite):
            raise typer.BadParameter("--resume and --overwrite are of an output: give --out")
        if self.resume and self.overwrite:
            raise typer.BadParameter("--resume keeps an output, --overwrite replaces it: give one of them")


@dataclass(kw_only=True)
class TextOptions(WritingOptions, ResumableOptions):
    """Those of a command that writes texts about images."""


def with_options(kind: type[Any], **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator: the command's first parameter, an instance of `kind`, becomes options of its fields.

    `defaults` replace those of the fields; fields without a default value are arguments.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        shared_hints = get_type_hints(kind, include_extras=True)
        own_hints = get_type_hints(function, include_extras=True)
        own: dict[str, Any] = function.__kwdefaults__ or {}
        shared = {
            one.name: defaults.get(one.name, Parameter.empty if one.default is MISSING else one.default)
            for one in fields(kind)
        }

        def command(**given: Any) -> None:
            options = kind(**{name: given.pop(name) for name in shared})
            function(options, **given)

        parameters = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=shared_hints[name])
            for name, default in sorted(shared.items(), key=lambda item: item[1] is not Parameter.empty)
        ]
        at = sum(parameter.default is Parameter.empty for parameter in parameters)  # own options come after arguments
        parameters[at:at] = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=own_hints[name])
            for name, default in own.items()
        ]
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def finish(execute: Callable[[], int | None]) -> None:
    """Run a command's work, with one line for an error, and end the process with its exit code."""
    from lavis_lite.cli.failures import exit_code

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = exit_code(execute, command=sys.argv)
    finally:
        signal.signal(signal.SIGTERM, before)
    raise typer.Exit(code)


def _terminate(*_: object) -> None:
    """End the process as SIGTERM does, but by an exception: what was computed is kept."""
    print("stopped by SIGTERM", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def given(**settings: Any) -> dict[str, Any]:
    """Return the settings that have a value."""
    return {name: value for name, value in settings.items() if value is not None}


def lines_of(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank. Raises MissingFileError."""
    from lavis_lite.common.errors import MissingFileError

    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
