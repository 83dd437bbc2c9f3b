"""The configuration that a checkpoint was trained with, as a layer between a model type's YAML and the user's settings.

Note: the file comes from elsewhere, so its configuration is data only. The `model` section and the processors are
used, as plain values with the same checks as a YAML's; `imports`, weight sources and URLs are not. Settings of the
machine (precision, recomputed activations) are not part of what was trained, and stay the type's.
"""

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lavis_lite.common.config.adapters import ADAPTER_KEYS
from lavis_lite.common.config.agreement import linked_section
from lavis_lite.common.config.files import Layer, merge_layers, resolve_key
from lavis_lite.common.config.schema import schema_of
from lavis_lite.common.config.sections import MODEL_KEYS, PROCESSOR_KEYS
from lavis_lite.common.errors import AdapterError, InputError
from lavis_lite.common.registry import RegistryError, registry
from lavis_lite.common.sources import download
from lavis_lite.common.sources.folders import read_settings

logger = logging.getLogger(__name__)

LANGUAGE_MODELS = ("opt_model", "t5_model", "llm_model")
"""Keys that name the language model; an architecture has at most one of them."""
MACHINE_KEYS = (
    *("vit_grad_ckpt", "vit_ckpt_layer", "use_grad_checkpoint", "llm_grad_checkpoint"),
    *("vit_precision", "llm_precision", "llm_device_map"),
)
"""Keys of a model section that stay the type's: how a machine computes, not what."""
WEIGHT_KEYS = (
    *("image_size", "vit_type", "vit", "vit_layer_norm_epsilon", "med", "tokenizer", "embed_dim"),
    *("vit_model", "vit_weights", "num_query_token", "cross_attention_freq", "qformer", "qformer_text_input"),
    *(*LANGUAGE_MODELS, "llm", *ADAPTER_KEYS),
)
"""Keys that a model of another architecture takes from a checkpoint: shapes, and the sources of frozen parts."""
SOURCES = ("tokenizer", "vit_weights", *LANGUAGE_MODELS)
MAX_LEVELS = 8


@dataclass(frozen=True)
class Trained:
    """The configuration in a file."""

    source: str
    arch: str
    model: dict[str, Any]
    model_type: str | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)
    mixed: tuple[str, ...] = ()
    """Kinds of processors in which its training sets differ."""
    is_whole: bool = True
    """Whether a key that is missing here was at its default in training."""

    @property
    def is_registered(self) -> bool:
        return self.arch in registry.list_models()

    @property
    def has_adapters(self) -> bool:
        return bool(self.model.get("llm_lora")) and self.is_registered


def read(source: str | Path) -> Trained | None:
    """Return the configuration in the checkpoint at `source`; None if it has none, as LAVIS's published files.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: the file is damaged, or its configuration has other than plain values.
    """
    if download.is_folder(source):
        arch, stored = read_settings(download.fetch_folder(source))
        model = {key: value for key, value in stored["model"].items() if key not in SOURCES}
        return None if arch is None else _trained(source, model | {"arch": arch}, stored, is_whole=False)
    from lavis_lite.common import checkpoint

    path = download.fetch(source)
    config = None if path.suffix == ".safetensors" else checkpoint.load(path, verify=False).get("config")
    section = config.get("model") if isinstance(config, Mapping) else None
    if config is None or not isinstance(section, Mapping) or not isinstance(section.get("arch"), str):
        return None
    return _trained(source, section, config, is_whole=True)


def _trained(source: str | Path, section: Mapping[str, Any], config: Mapping[str, Any], *, is_whole: bool) -> Trained:
    section = _plain(section, source=str(source))
    model = {key: value for key, value in section.items() if key not in (*MODEL_KEYS, *MACHINE_KEYS)}
    if isinstance(model.get("llm_lora"), dict):  # the adapters' weights are in the file
        model["llm_lora"] = {key: value for key, value in model["llm_lora"].items() if key != "adapter"}
    model_type = section["model_type"] if isinstance(section.get("model_type"), str) else None
    preprocess, mixed = processors_of(config, source=str(source))
    return Trained(str(source), section["arch"], model, model_type, linked_section(preprocess, model), mixed, is_whole)


def _plain(value: Any, *, source: str, depth: int = 0) -> Any:
    """Return nested mappings, lists and scalars as they are.

    Raises InputError for anything else, and for `${`, which would be resolved here: a run saves resolved values.
    """
    if depth > MAX_LEVELS or (isinstance(value, str) and "${" in value):
        problem = f"its config holds '${{' or more than {MAX_LEVELS} levels, which train.py never saves"
        raise InputError(f"{source}: {problem}: the file is not trusted: {value!r}")
    if isinstance(value, Mapping):
        return {str(key): _plain(one, source=source, depth=depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, source=source, depth=depth + 1) for one in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise InputError(f"{source}: its config holds a {type(value).__name__}, not a plain value: the file is damaged")


def processors_of(config: Mapping[str, Any], *, source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the processors of a training's datasets where these agree, else those of its `preprocess` section.

    The second value is the kinds (`vis_processor`, `text_processor`) in which the datasets differ.
    """
    datasets = config.get("datasets")
    bodies = datasets.values() if isinstance(datasets, Mapping) else ()
    sections = [one if isinstance(one, Mapping) else {} for one in (config.get("preprocess"), *bodies)]
    named = [{key: one[key] for key in PROCESSOR_KEYS if isinstance(one.get(key), Mapping)} for one in sections]
    blocks, *own = (_plain(one, source=source) for one in named)
    mixed = []
    for key in PROCESSOR_KEYS:
        given = [body[key] for body in own if body.get(key)]
        if given and all(one == given[0] for one in given):
            blocks[key] = blocks.get(key, {}) | given[0]
        elif given:
            mixed.append(key)
    return blocks, tuple(mixed)


def lay_under(
    packaged: Sequence[Layer], own: Sequence[Layer], trained: Trained | None, *, level: int = logging.WARNING
) -> list[Layer]:
    """Return the layers of a model type followed by the configuration that the checkpoint was trained with.

    A key that both have is removed from the type's layers. `own` are the user's layers, which override the result.
    Every difference from the type is logged at `level`, and every value that the user overrides as INFO. A model of the
    same architecture takes the whole configuration; another one takes what the weights need.
    """
    if trained is None:
        return list(packaged)
    tree = merge_layers([*packaged, *own])
    arch = tree["model"]["arch"]
    try:
        schema, open_ended = schema_of(registry.get_model_class(arch))
    except RegistryError:
        return list(packaged)  # the check of the section reports it, with its origin
    if trained.has_adapters:
        was, now = _language_model(trained.arch, trained.model), _language_model(arch, tree["model"])
        if was.keys() != now.keys():
            raise AdapterError(_other_language_model(trained, arch, tree["model"]))
    of_type = merge_layers(packaged)
    stated, preset = of_type.get("model", {}), of_type.get("preprocess", {})
    blocks = trained.preprocess
    is_same = trained.arch == arch
    if is_same:
        given = {key: value for key, value in trained.model.items() if key in schema or open_ended}
        for key in sorted(trained.model.keys() - given.keys()):
            unknown = f"model.{key}={trained.model[key]!r}"
            logger.warning(f"{trained.source}: its config has {unknown}, which is unknown here: left out")
    else:
        given = _shared(trained, arch, stated)
        # another task has other texts, and its type states the images
        blocks = {key: value for key, value in blocks.items() if key == "vis_processor" and not preset}
    for key in given.keys() & set(SOURCES) - merge_layers(own).get("model", {}).keys():
        if download.is_url(str(given[key])) and given[key] != stated.get(key):  # it would be fetched
            problem = f"its config takes model.{key} from {given[key]}, which a file must not decide"
            raise InputError(f"{trained.source}: {problem}: if you trust the address, give {key} yourself")
    replaced = set(given)
    if is_same and trained.is_whole:
        replaced |= {key for key in stated if key in schema and key not in (*MODEL_KEYS, *MACHINE_KEYS)}
    below = [_without(layer, replaced, blocks.keys()) for layer in packaged]
    sections = {"model": given} | ({"preprocess": blocks} if blocks else {})
    inserted = Layer(f"config of {trained.source}", sections, is_trained=True)
    if not is_same:
        taken = ", ".join(sorted(given)) or "nothing"
        logger.info(f"{trained.source} is a checkpoint of {trained.arch}; {arch} takes {taken} from its configuration")
    for key in trained.mixed if blocks else ():
        logger.log(level, f"{trained.source}: its training sets had different {key}s; that of its model type is taken")
    _log_differences(trained, packaged, [*below, inserted], own, level=level)
    if "run" not in tree or tree["run"].get("evaluate"):
        _warn_of_prompt(trained, arch, [*below, inserted, *own])
    return [*below, inserted]


def _warn_of_prompt(trained: Trained, arch: str, layers: Sequence[Layer]) -> None:
    """Warn if captions will begin with a prompt that no caption of the training had, as those of `blip_pretrain`.

    A frozen language model, which was trained on other texts, may have any prompt.
    """
    defaults = _defaults(arch)
    begins = registry.get_model_class(arch).prompt_begins_captions and not defaults.keys() & set(LANGUAGE_MODELS)
    if not begins or not trained.is_registered or "text_processor" in trained.mixed:
        return
    if registry.get_model_class(trained.arch).prompt_begins_captions:
        return
    given = resolve_key(layers, ("model", "prompt"))
    prompt = defaults["prompt"] if given is None else given
    of_texts = Layer("", {"model": trained.model, "preprocess": trained.preprocess})
    read = resolve_key([of_texts], ("preprocess", "text_processor", "train", "prompt"))
    if str(prompt).strip() and str(prompt).strip() != str(read or "").strip():
        begun = f"with {read!r}" if read else "without a prompt"
        problem = f"captions begin with {prompt!r}, but {trained.source} ({trained.arch}) was trained on texts {begun}"
        logger.warning(f"model.prompt: {problem}: set model.prompt={read or ''!r}")


def _without(layer: Layer, model_keys: Collection[str], preprocess_keys: Collection[str]) -> Layer:
    """Return a layer without some keys of its `model` and `preprocess` sections."""
    left = {"model": model_keys, "preprocess": preprocess_keys}
    sections = {
        name: {key: value for key, value in layer.tree[name].items() if key not in keys}
        for name, keys in left.items()
        if name in layer.tree
    }
    return replace(layer, tree=layer.tree | sections)


def _shared(trained: Trained, arch: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the weights that both architectures have, as in training.

    A key that the file does not state had the default of its architecture.
    """
    own = _defaults(arch)
    defaults = _defaults(trained.arch) if trained.is_whole and trained.is_registered else {}
    unstated = {key: value for key, value in defaults.items() if key in own and (key in stated or value != own[key])}
    trained_with = unstated | trained.model
    return {key: trained_with[key] for key in WEIGHT_KEYS if key in trained_with and key in own}


def _defaults(arch: str) -> dict[str, Any]:
    """Return the constructor's arguments with their defaults."""
    return {name: parameter.default for name, parameter in schema_of(registry.get_model_class(arch))[0].items()}


def _log_differences(
    trained: Trained, packaged: Sequence[Layer], below: Sequence[Layer], own: Sequence[Layer], *, level: int
) -> None:
    """Log each key in which type and checkpoint differ, and each in which the user's value replaces the checkpoint's.

    `below` are the layers that `lay_under` returns, the checkpoint's last.
    """
    of_type, there, final = (_flat(part) for part in (packaged, below, [*below, *own]))
    given, stated = (_flat(part, resolved=False).keys() for part in (below[-1:], own))
    for key in sorted(there.keys() & given):
        value = there[key]
        if key in stated and final[key] != value:
            logger.info(f"{trained.source}: {key}={final[key]!r}, as given; it was trained with {value!r}")
        elif key not in stated and of_type.get(key) != value:
            instead = f"; the type has {of_type[key]!r}" if key in of_type else ""
            logger.log(level, f"{trained.source}: {key}={value!r}, as it was trained{instead}")
    for key in sorted(of_type.keys() - there.keys() - stated):
        logger.log(level, f"{trained.source}: {key} is left out, as in training; the type has {of_type[key]!r}")


def _flat(layers: Sequence[Layer], *, resolved: bool = True) -> dict[str, Any]:
    """Return each key of the model section, and each processor block, under its dotted name.

    References of a block to the model are not resolved.
    """
    tree = merge_layers(layers)
    model, preprocess = (
        (resolve_key(layers, (key,)) if resolved else tree.get(key)) or {} for key in ("model", "preprocess")
    )
    flat = {f"model.{key}": value for key, value in model.items() if key not in MODEL_KEYS}
    for key, blocks in linked_section(preprocess, model).items():
        flat |= {f"preprocess.{key}.{split}": block for split, block in blocks.items()}
    return flat


# Adapters of another language model


@contextlib.contextmanager
def fitting_adapters(section: Mapping[str, Any], source: str | None) -> Iterator[None]:
    """Extend errors about adapters by the language model that the weights at `source` were trained with.

    An error stays as it is if the model of `section` has that language model.
    """
    try:
        yield
    except AdapterError as error:
        trained, arch = None if source is None else read(source), section["arch"]
        if trained is None or not trained.has_adapters:
            raise
        if _language_model(trained.arch, trained.model) == _language_model(arch, section):
            raise
        raise AdapterError(f"{_other_language_model(trained, arch, section)} ({error})") from error


def _other_language_model(trained: Trained, arch: str, section: Mapping[str, Any]) -> str:
    was, now = (
        f"{name} ({', '.join(f'{k}={v}' for k, v in _language_model(name, own).items()) or 'no language model'})"
        for name, own in ((trained.arch, trained.model), (arch, section))
    )
    return (
        f"{trained.source} was trained as {was} with adapters (model.llm_lora), and this model is {now}: adapters fit "
        f"no other language model than their own; load the checkpoint as {was}, or name one of this model"
    )


def _language_model(arch: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key that names the language model, and its name; {} for an architecture without one."""
    defaults = _defaults(arch)
    return {key: section.get(key, defaults[key]) for key in LANGUAGE_MODELS if key in defaults}
