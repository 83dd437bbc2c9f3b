"""The needs of a configuration beside its data: weights, tokenizer, language model, packages. Nothing is loaded."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from lavis_lite.common.config.adapters import ADAPTER, ADAPTER_KEYS
from lavis_lite.common.config.agreement import model_setting
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.trained import LANGUAGE_MODELS
from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.sources import download
from lavis_lite.common.sources.hub import cached_timm_weights, timm_config
from lavis_lite.common.sources.weights import TIMM
from lavis_lite.common.video_decoders import DECODERS
from lavis_lite.models.base import chosen_weights, starting_points
from lavis_lite.models.blip2.base import encoder_source
from lavis_lite.models.tokenizers import PACKAGED
from lavis_lite.nn.llm_sources import WEIGHT_FILES, packaged_names
from lavis_lite.tasks.base import setup_task
from lavis_lite.tasks.captioning import CaptionTask
from lavis_lite.tasks.metrics import caption_java

HUB = "https://huggingface.co/"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer.model", "spiece.model", "vocab.json")
WHOLE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, kw_only=True)
class Need:
    """One thing that a recipe needs."""

    kind: str
    """annotations, images, weights, tokenizer ..."""
    name: str
    is_there: bool
    place: str = ""
    """The path where it is, or where it is expected."""
    source: str = ""
    """Its address, or the command that installs it."""
    size: int | None = None
    """Bytes, as far as known."""


def model_needs(cfg: Config) -> Iterator[Need]:
    """Yield the sources of the model's weights, its tokenizer and its language model."""
    model = cfg.model
    chosen = chosen_weights(model)
    if chosen is not None:
        yield weights_need(f"model.{chosen[0]}", chosen[1])
    for argument, source in starting_points(model).items():
        if argument != "add_token_type":
            yield weights_need(f"model.init_{argument}", source)
    if cfg.run.resume_ckpt_path:
        yield weights_need("run.resume_ckpt_path", str(cfg.run.resume_ckpt_path))
    if (encoder := _encoder_need(model, chosen)) is not None:
        yield encoder
    if tokenizer := model_setting(model, "tokenizer"):
        yield _tokenizer_need(str(tokenizer))
    for key in LANGUAGE_MODELS:
        if source := model_setting(model, key):
            yield from _language_model_needs(key, str(source))
    adapter = (model_setting(model, "llm_lora") or {}).get(ADAPTER)
    if adapter:
        yield weights_need("model.llm_lora", str(adapter))


def weights_need(name: str, source: str) -> Need:
    """Return whether the weights at a source of `open_state` are on this machine."""
    if source.startswith(TIMM):
        return _timm_need(name, source)
    if download.is_url(source):
        return file_need("weights", name, download.cached_path(source), source=source)
    if download.is_folder(source):
        return _hub_need("weights", name, source, is_there=_has_weights)
    return file_need("weights", name, Path(source).expanduser())


def file_need(kind: str, name: str, path: Path, *, source: str = "", size: int | None = None) -> Need:
    """Return the need of a file; its size is that on disk if it is there."""
    is_there = path.exists()
    size = path.stat().st_size if path.is_file() else size
    return Need(kind=kind, name=name, is_there=is_there, place=str(path), source=source, size=size)


def _encoder_need(model: dict[str, Any], chosen: tuple[str, str] | None) -> Need | None:
    """Return the need of a BLIP-2 image encoder's weights; None if the model's weights have it.

    Those of a run have it if it was trained, and LAVIS's `pretrained` files never: it is frozen in pretraining.
    """
    name = model_setting(model, "vit_model")
    source = None if name is None else encoder_source(str(name), model_setting(model, "vit_weights"))
    if chosen is None:
        has_own = False
    elif download.is_folder(chosen[1]):
        has_own = True
    else:
        has_own = chosen[0] != "pretrained" and not model_setting(model, "freeze_vit")
    return None if source is None or has_own else weights_need("model.vit_model", source)


def _tokenizer_need(name: str) -> Need:
    if name in {path.name for path in PACKAGED.iterdir()}:
        return file_need("tokenizer", "model.tokenizer", PACKAGED / name)
    return _hub_need("tokenizer", "model.tokenizer", name, is_there=_has_tokenizer)


def _language_model_needs(key: str, source: str) -> Iterator[Need]:
    if source in packaged_names():
        return
    yield _hub_need("language model", f"model.{key}", source, is_there=_has_weights)
    yield _hub_need("tokenizer", f"model.{key}", source, is_there=_has_tokenizer)


def _hub_need(kind: str, name: str, source: str, *, is_there: Any) -> Need:
    """Return the need of a folder on this machine, or of a repository of the hub in its cache."""
    try:
        folder = download.local_folder(source)
    except MissingFileError:
        return Need(kind=kind, name=name, is_there=False, place=str(Path(source).expanduser()))
    if folder is not None:
        return Need(kind=kind, name=name, is_there=is_there(str(folder)), place=str(folder))
    place = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")
    return Need(kind=kind, name=name, is_there=is_there(source), place=str(place), source=HUB + source)


def _timm_need(name: str, source: str) -> Need:
    model = source.removeprefix(TIMM)
    if ":" in model:  # hf_hub:owner/name
        return _hub_need("weights", name, model.rpartition(":")[2], is_there=_has_weights)
    file = cached_timm_weights(timm_config(model))
    if file is None:
        return Need(kind="weights", name=name, is_there=False, place=constants.HF_HUB_CACHE, source=source)
    return file_need("weights", name, file)


def _has_tokenizer(source: str) -> bool:
    return any(_found(source, file) for file in TOKENIZER_FILES)


def _has_weights(source: str) -> bool:
    """Return whether a folder, or a cached repository, has weights: one file, or all files of an index."""
    if Path(source).is_dir():
        return any(path for pattern in WEIGHT_FILES for path in Path(source).glob(pattern))
    if any(_found(source, file) for file in WHOLE_WEIGHTS):
        return True
    return any(_has_shards(source, index) for name in INDICES if (index := _found(source, name)) is not None)


def _has_shards(source: str, index: Path) -> bool:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(shards) and all(_found(source, str(shard)) is not None for shard in shards)


def _found(source: str, file: str) -> Path | None:
    """Return a file of a folder, or of a repository in the hub's cache."""
    if Path(source).is_dir():
        return Path(source, file) if Path(source, file).is_file() else None
    try:
        found = huggingface_hub.try_to_load_from_cache(source, file)
    except ValueError:  # no name of a repository
        return None
    return Path(found) if isinstance(found, str) else None


def package_needs(cfg: Config, *, has_videos: bool, has_tables: bool = False) -> Iterator[Need]:
    """Yield the optional packages and programs that the recipe uses."""
    if has_tables:
        yield _package("datasets", "reading tables and the hub", "pip install lavis-lite[data]")
    if has_videos:
        name = next(filter(importlib.util.find_spec, DECODERS), next(iter(DECODERS)))
        yield _package(name, "reading videos", f"pip install {name}")
    for key in ADAPTER_KEYS:
        if model_setting(cfg.model, key):
            yield _package("peft", f"model.{key}", "pip install peft")
    if model_setting(cfg.model, "llm_quantization"):
        yield _package("bitsandbytes", "model.llm_quantization", "pip install bitsandbytes")
        yield _package("accelerate", "model.llm_quantization", "pip install accelerate")
    if model_setting(cfg.model, "llm_device_map"):
        yield _package("accelerate", "model.llm_device_map", "pip install accelerate")
    if model_setting(cfg.model, "apply_lemmatizer"):
        yield _package("spacy", "model.apply_lemmatizer", "pip install spacy")
        yield _package("en_core_web_sm", "model.apply_lemmatizer", "python -m spacy download en_core_web_sm")
    task = setup_task(cfg)
    if isinstance(task, CaptionTask) and task.report_metric and (cfg.run.valid_splits or cfg.run.test_splits):
        yield from _metric_needs(task.metrics)
        if task.annotation_file:
            yield replace(weights_need("run.annotation_file", task.annotation_file), kind="references")


def _package(module: str, why: str, command: str) -> Need:
    spec = importlib.util.find_spec(module)
    place = "" if spec is None or spec.origin is None else str(Path(spec.origin).parent)
    return Need(kind="package", name=f"{module} ({why})", is_there=spec is not None, place=place, source=command)


def _metric_needs(metrics: Sequence[str]) -> Iterator[Need]:
    java = caption_java.find_java()
    users = [name.upper() for name in metrics if name in ("meteor", "spice")]
    name = f"java ({', '.join(['the PTB tokenizer', *users])})"
    yield Need(
        kind="program", name=name, is_there=java is not None, place=java or "", source="a Java runtime, 8 or later"
    )
    if "spice" in metrics:
        try:
            library = caption_java.folder() / "spice" / "lib"
        except InputError:
            return
        for file in caption_java.SPICE_MODELS:
            yield file_need("program", "SPICE", library / file, source="Stanford CoreNLP 3.6.0")
