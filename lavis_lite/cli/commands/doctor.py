"""The command `doctor`: versions, devices, programs, optional packages and folders, and what is missing for what."""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import typer

from lavis_lite.cli.commands.common import finish

PACKAGES = ("torch", "torchvision", "transformers", "timm", "numpy", "pillow", "huggingface_hub", "safetensors")
OPTIONAL = {
    "decord": "videos",
    "av": "videos (extra `video`)",
    "pycocoevalcap": "caption metrics",
    "peft": "LoRA (extra `lora`)",
    "bitsandbytes": "4 and 8 bit language models (extra `quantization`)",
    "spacy": "lemmatised answers (extra `lemmatizer`)",
    "datasets": "parquet, arrow and datasets of the hub (extra `data`)",
    "webdataset": "streams of shards (extra `shards`)",
    "open_clip_torch": "CLIP as a ranker of captions (extra `clip`)",
    "resvg_py": "OpenMoji's drawings (extra `pictures`)",
    "opencv-python-headless": "faster RandAugment (extra `opencv`)",
    "gradio": "the demo (extra `demo`)",
    "uvicorn": "`lavis-lite serve` (extra `server`)",
    "wandb": "run.tracker: wandb (extra `wandb`)",
    "mlflow": "run.tracker: mlflow (extra `mlflow`)",
    "trackio": "run.tracker: trackio (extra `trackio`)",
    "lmms_eval": "lmms-eval's benchmarks (extra `lmms-eval`)",
}


class Line(NamedTuple):
    """One finding: what, its state, and what is missing without it."""

    name: str
    state: str
    note: str = ""


def doctor() -> None:
    """Report versions, devices and what is missing."""
    finish(report)


def report() -> None:
    """Print all findings."""
    from lavis_lite.cli.data.table import table

    for title, find in SECTIONS.items():
        typer.echo(f"{title}")
        for line in table(Line._fields, find())[1:]:
            typer.echo(f"  {line}")


def packages() -> list[Line]:
    """Return the versions of Python and of the packages that are needed."""
    return [Line("python", platform.python_version()), *(Line(name, _version(name) or "MISSING") for name in PACKAGES)]


def optional() -> list[Line]:
    """Return the versions of optional packages, and what they are for."""
    return [Line(name, _version(name) or "not installed", use) for name, use in OPTIONAL.items()]


def devices() -> list[Line]:
    """Return the accelerators and the processor, with what they compute in by default."""
    import torch

    from lavis_lite.common.precision import resolve_precision

    def precision(name: str) -> str:
        return str(resolve_precision("auto", torch.device(name))).removeprefix("torch.")

    cpu = Line(
        "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads", f"precision auto: {precision('cpu')}"
    )
    lines = [cpu]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        lines.append(Line(f"cuda:{number}", memory, f"precision auto: {precision(f'cuda:{number}')}"))
    return (
        lines if len(lines) > 1 else [*lines, Line("cuda", "none", "full-size models take minutes per batch on a CPU")]
    )


def programs() -> list[Line]:
    """Return the programs that metrics need."""
    java = shutil.which("java")
    if java is None:
        return [Line("java", "MISSING", "METEOR, SPICE and PTB's tokenizer; CIDEr is then only approximate")]
    found = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    return [Line("java", (found.stderr or found.stdout).splitlines()[0], "METEOR, SPICE and PTB's tokenizer")]


def folders() -> list[Line]:
    """Return the folders of data and downloads, with their free space."""
    from lavis_lite.common.sources import download

    return [
        Line("data", str(download.data_root()), f"LAVIS_LITE_DATA; {_free(download.data_root())}"),
        Line("cache", str(download.cache_dir()), f"LAVIS_LITE_CACHE; {_free(download.cache_dir())}"),
    ]


def network() -> list[Line]:
    """Return whether the hub can be reached, within three seconds."""
    import urllib.request

    if os.environ.get("LAVIS_LITE_OFFLINE") or os.environ.get("HF_HUB_OFFLINE"):
        return [Line("hub", "not asked", "LAVIS_LITE_OFFLINE or HF_HUB_OFFLINE is set")]
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(address, timeout=3):
            return [Line("hub", f"{address} answers")]
    except OSError as error:
        return [Line("hub", f"{address} cannot be reached", str(error))]


SECTIONS: dict[str, Callable[[], list[Line]]] = {
    "packages": packages,
    "optional packages": optional,
    "devices": devices,
    "programs": programs,
    "folders": folders,
    "network": network,
}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _free(path: Path) -> str:
    """Return the free space where a folder is, or will be."""
    there = next(one for one in (path, *path.absolute().parents) if one.is_dir())
    return f"{shutil.disk_usage(there).free / 1e9:.0f} GB free" + ("" if path.is_dir() else ", not made yet")


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)
