"""Load a model, by architecture and type or from a Hugging Face folder, with the processors of its inputs.

Note: `checkpoint=` replaces the type's own weights, which are then not downloaded, and brings the settings that it was
trained with (`common/config/trained.py`). A type that names only `eval` processors uses them as `train` too (they are
deterministic), but not the other way round.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lavis_lite.common.config import trained as trained_config
from lavis_lite.common.config import zoo
from lavis_lite.common.config.agreement import preprocess_of
from lavis_lite.common.config.files import Layer, resolve
from lavis_lite.common.config.schema import Checker, as_read
from lavis_lite.common.config.sections import PROCESSOR_KEYS, check_processors, model_arguments
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import download
from lavis_lite.common.sources.folders import read_config, read_image_settings
from lavis_lite.models.base import BaseModel, build_model
from lavis_lite.models.blip.hf import BlipAdapter
from lavis_lite.models.blip2.hf import Blip2Adapter, Blip2LLMAdapter
from lavis_lite.models.hf import HFAdapter
from lavis_lite.models.placing import place

logger = logging.getLogger(__name__)

Processors = dict[str, Callable[[Any], Any]]
ADAPTERS: tuple[HFAdapter[Any], ...] = (BlipAdapter(), Blip2Adapter(), Blip2LLMAdapter())


def load_model(
    name: str,
    model_type: str,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    **overrides: Any,
) -> BaseModel:
    """Build a model and load its weights.

    `checkpoint` (a file or URL, a Hugging Face folder or hub id) is loaded instead of the type's own weights, with the
    settings that it was trained with; each that differs from the type's is logged. `overrides` replace keys of the
    model section, as `--options model.key=value` does. Raises KeyError for an unknown name or type (with the nearest
    ones), ValueError for an unknown or mistyped key and for weights that do not fit, FileNotFoundError for a missing
    file.
    """
    layers, tree = configured(name, model_type, checkpoint, overrides)
    return build(tree["model"], layers, is_eval=is_eval, device=device, checkpoint=checkpoint)


def load_preprocess(config: Mapping[str, Any]) -> tuple[Processors, Processors]:
    """Build the image and text processors of a model YAML's `preprocess` section.

    Its form: `{vis_processor: {train: {name: ...}, eval: {name: ...}}, text_processor: ...}`. Returns two
    dictionaries with the keys "train" and "eval", as in LAVIS. "train" falls back to the `eval` block; a processor
    that the section leaves out returns its input. Raises ValueError for an unknown name or argument.
    """
    section: Any = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)
    check_processors(section, Checker([Layer("preprocess", {"preprocess": section})]), ("preprocess",))
    vis, text = (_processors(section.get(key) or {}) for key in PROCESSOR_KEYS)
    return vis, text


def load_model_and_preprocess(
    name: str,
    model_type: str,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    **overrides: Any,
) -> tuple[BaseModel, Processors, Processors]:
    """Return `load_model`'s model, and its image and text processors, each a dictionary with "train" and "eval":
    those that the checkpoint was trained with, else the type's.

    Examples:
        >>> model, vis_processors, txt_processors = load_model_and_preprocess("blip_caption", "base_coco", is_eval=True)
        >>> model.generate({"image": vis_processors["eval"](raw_image).unsqueeze(0)})
    """
    layers, tree = configured(name, model_type, checkpoint, overrides)
    model = build(tree["model"], layers, is_eval=is_eval, device=device, checkpoint=checkpoint)
    return model, *load_preprocess(preprocess_of(tree["model"], tree.get("preprocess", {})))


def from_pretrained(
    source: str | Path,
    *,
    arch: str | None = None,
    model_class: type[BaseModel] | None = None,
    processors: bool = False,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    **overrides: Any,
) -> BaseModel | tuple[BaseModel, Processors, Processors]:
    """Build the model that a Hugging Face folder or hub id holds, or a checkpoint of train.py, and load its weights;
    with `processors` also return its image and text processors.

    A checkpoint says what it was trained as. For a folder the architecture is the usual one for transformers' class.
    `arch` names another with the same parts, `model_class` is one's class; `overrides` replace keys of the model
    section.

    Raises:
        FileNotFoundError: the file, the folder, its config.json or its weights are missing.
        ConnectionError: the hub cannot be reached.
        ValueError: a folder's class is none of ours, a file does not say what it was trained as, or an override is
            unknown or mistyped.
    """
    if arch is None and model_class is not None:  # of a base class there is none
        arch = next((name for name in registry.list_models() if registry.get_model_class(name) is model_class), None)
    layers, tree = described(source, arch, overrides)
    model = build(tree["model"], layers, is_eval=is_eval, device=device, checkpoint=source)
    if not processors:
        return model
    section = tree["model"]
    is_folder = download.is_folder(source)
    own = read_image_settings(download.fetch_folder(source), section["image_size"]) if is_folder else {}
    images = {"eval": {"name": "blip_image_eval", **own}}
    texts = {"eval": {"name": "blip_question" if section["arch"] == "blip_vqa" else "blip_caption"}}
    blocks = {"vis_processor": images, "text_processor": texts} | tree.get("preprocess", {})
    return model, *load_preprocess(preprocess_of(section, blocks))


def arch_in(source: str | Path, wanted: str | None = None) -> str:
    """Return the architecture of a folder or checkpoint: the one that is wanted, else the one that it names. ValueError
    if a folder's class has other parts, or a file does not say what it was trained as.
    """
    trained = trained_config.read(source)
    named = wanted or (None if trained is None else trained.arch)
    if download.is_folder(source):
        return _arch_of_folder(read_config(download.fetch_folder(source)), source=str(source), wanted=named)
    if trained is None or named is None:
        raise InputError(f"{source} does not say what it was trained as: use load_model(arch, type, checkpoint=...)")
    return named


def _arch_of_folder(config: Mapping[str, Any], *, source: str, wanted: str | None) -> str:
    """Return `wanted` if it has the parts of a config.json's class, else the default for class and language model."""
    name = next(iter(config.get("architectures") or ()), None)
    for adapter in ADAPTERS:
        archs = adapter.archs(name)
        if wanted is not None and archs and wanted not in archs:
            raise InputError(f"{source} is a {name}, which cannot be read as {wanted}; choose {' or '.join(archs)}")
        if archs:
            return wanted or adapter.default_arch(archs, config)
    known = [known for adapter in ADAPTERS for known in (*adapter.classes, *adapter.aliases)]
    kind = name or config.get("model_type")
    raise InputError(f"{source}: its config.json is of {kind}, and only {', '.join(known)} can be read")


def described(source: str | Path, arch: str | None, overrides: Mapping[str, Any]) -> tuple[list[Layer], dict[str, Any]]:
    """Return the layers, and the resolved configuration, of a folder, or of a checkpoint without a named type, from
    which it cannot differ by mistake: differences are logged as INFO.
    """
    _check_named(source, "source")
    trained, own = trained_config.read(source), _overrides(overrides)
    arch = arch_in(source, arch)
    if download.is_folder(source):
        folder = download.fetch_folder(source)
        stored = trained if trained is not None and trained.arch == arch else None
        built = registry.get_model_class(arch).hf.section(read_config(folder), folder, arch=arch)
        section = ({} if stored is None else stored.model) | {"model_type": None} | built
        preprocess = {} if stored is None else {"preprocess": stored.preprocess}
        layers = [Layer(str(folder), {"model": section} | preprocess), own]
        return layers, resolve(layers)
    packaged = [Layer("defaults", {"model": {"arch": arch, "model_type": None}})]
    if trained is not None and arch == trained.arch and trained.model_type in zoo.model_zoo.types(arch):
        packaged = zoo.model_layers(arch, trained.model_type)
    layers = [*trained_config.lay_under(packaged, [own], trained, level=logging.INFO), own]
    return layers, resolve(layers)


def configured(
    name: str,
    model_type: str,
    checkpoint: str | Path | None,
    overrides: Mapping[str, Any],
    *,
    level: int = logging.WARNING,
) -> tuple[list[Layer], dict[str, Any]]:
    """Return the layers of a model's configuration, and its sections `model` and `preprocess`, resolved: those of the
    type, of what the checkpoint was trained as, and the overrides; `level` as in `trained_config.lay_under`.
    """
    layers, own = zoo.model_layers(name, model_type), _overrides(overrides)
    if checkpoint is not None:
        _check_named(checkpoint, "checkpoint")
        layers = trained_config.lay_under(layers, [own], trained_config.read(checkpoint), level=level)
    layers = [*layers, own]
    return layers, resolve(layers)


def _check_named(source: Any, argument: str) -> None:
    """Raise InputError for a value that cannot name weights, such as the text of an unset environment variable."""
    if not isinstance(source, str | Path) or not str(source).strip():
        raise InputError(f"{argument}: expected a file, a folder, a URL or a hub id, got {source!r}")


def _overrides(overrides: Mapping[str, Any]) -> Layer:
    """Return keyword arguments as the last layer of a configuration; paths become text, as in a YAML."""
    fixed = sorted(overrides.keys() & {"arch", "model_type", "checkpoint"})
    if fixed:
        raise InputError(f"{', '.join(fixed)} cannot be overridden: use the argument of that name")
    values = {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    return Layer("keyword argument", {"model": values} if values else {})


def build(
    section: Mapping[str, Any],
    layers: list[Layer],
    *,
    is_eval: bool,
    device: str | torch.device,
    checkpoint: str | Path | None,
) -> BaseModel:
    """Check a model section against its architecture, build it and load its weights, or those of the checkpoint."""
    arguments = model_arguments(section, Checker(layers))
    if checkpoint is not None:
        arguments["checkpoint"] = str(checkpoint)
    model = place(build_model(registry.get_model_class(arguments["arch"]), arguments, device=device), device)
    if not any(arguments.get(key) for key in ("checkpoint", "finetuned", "pretrained")):
        logger.warning("%s/%s has no weights to load: they are random", arguments["arch"], arguments["model_type"])
    return model.train(not is_eval)


def _processors(blocks: Mapping[str, Any]) -> Processors:
    classes = {split: registry.get_processor_class(block["name"]) for split, block in blocks.items()}
    built = {split: classes[split].from_config(as_read(classes[split], block)) for split, block in blocks.items()}
    unchanged = built.get("eval", _unchanged)
    return built if blocks.keys() == {"train"} else {"train": unchanged, "eval": unchanged, **built}


def _unchanged(item: Any) -> Any:
    return item
