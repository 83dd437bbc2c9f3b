"""What a checkpoint was trained as: the configuration in the file, laid between a model type's YAML and the user's own.

Surprising: the file comes from elsewhere, so that its configuration is data only. Of it are taken the `model` section
and the processors, as plain values that pass the same checks as a YAML's; `imports`, weight sources and URLs are not.
Where it ran (precision, recomputed activations) is not what it was trained as, and stays the type's.
"""

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_lite.common.config.agreement import linked_section
from lavis_lite.common.config.files import Layer, merge_layers, resolve_key
from lavis_lite.common.config.schema import Parameter, schema_of
from lavis_lite.common.config.sections import MODEL_KEYS, PROCESSOR_KEYS
from lavis_lite.common.errors import AdapterError, InputError
from lavis_lite.common.registry import RegistryError, registry
from lavis_lite.common.sources import download
from lavis_lite.common.sources.folders import read_settings

logger = logging.getLogger(__name__)

LANGUAGE_MODELS = ("opt_model", "t5_model", "llm_model")
"""Keys that name the language model; an architecture has one of them, or none."""
HOW_IT_RAN = (
    *("vit_grad_ckpt", "vit_ckpt_layer", "use_grad_checkpoint", "llm_grad_checkpoint"),
    *("vit_precision", "llm_precision"),
)
"""Keys of a model section that stay the type's: they say how a machine computes, not what."""
OF_THE_WEIGHTS = (
    *("image_size", "vit_type", "vit", "vit_layer_norm_epsilon", "med", "tokenizer", "embed_dim"),
    *("vit_model", "vit_weights", "num_query_token", "cross_attention_freq", "qformer", "qformer_text_input"),
    *(*LANGUAGE_MODELS, "llm", "llm_lora"),
)
"""Keys that a model of another architecture takes from a checkpoint: shapes, and what its frozen parts were."""
SOURCES = ("tokenizer", "vit_weights", *LANGUAGE_MODELS)
MOST_NESTED = 8
CHECKPOINT_ORIGIN = "config of "
"""How the source of a checkpoint's layer begins."""


@dataclass(frozen=True)
class Trained:
    """What a file says of itself; `is_whole` if what it does not say was at its default."""

    source: str
    arch: str
    model: dict[str, Any]
    model_type: str | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)
    mixed: tuple[str, ...] = ()
    """Kinds of processors of which its training sets had different ones."""
    is_whole: bool = True


def read(source: str | Path) -> Trained | None:
    """Return what the checkpoint at `source` was trained as, or None if it does not say, as LAVIS's published files.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: the file is damaged, or its configuration holds other than plain values.
    """
    if download.is_folder(source):
        arch, stored = read_settings(download.fetch_folder(source))
        model = {key: value for key, value in stored["model"].items() if key not in SOURCES}
        return None if arch is None else _trained(source, model | {"arch": arch}, stored, is_whole=False)
    from lavis_lite.common import checkpoint

    path = download.fetch(source)
    config = None if path.suffix == ".safetensors" else checkpoint.load(path, verify=False).get("config")
    section = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(section, Mapping) or not isinstance(section.get("arch"), str):
        return None
    return _trained(source, section, config, is_whole=True)


def _trained(source: str | Path, section: Mapping[str, Any], config: Mapping[str, Any], *, is_whole: bool) -> Trained:
    section = _plain(section, source=str(source))
    model = {key: value for key, value in section.items() if key not in (*MODEL_KEYS, *HOW_IT_RAN)}
    if isinstance(model.get("llm_lora"), dict):  # the adapters' weights are the file's own
        model["llm_lora"] = {key: value for key, value in model["llm_lora"].items() if key != "adapter"}
    kind = section.get("model_type")
    preprocess, mixed = processors_of(config, source=str(source))
    return Trained(
        str(source),
        section["arch"],
        model,
        model_type=kind if isinstance(kind, str) else None,
        preprocess=linked_section(preprocess, model),
        mixed=mixed,
        is_whole=is_whole,
    )


def _plain(value: Any, *, source: str, depth: int = 0) -> Any:
    """Return nested mappings, lists and scalars as they are. ValueError for anything else, and for `${`, which would be
    resolved here: what a run saves is resolved already.
    """
    is_text = isinstance(value, str)
    if depth > MOST_NESTED or (is_text and "${" in value):
        what = f"{value!r}" if is_text else f"more than {MOST_NESTED} levels"
        raise InputError(f"{source}: its config holds {what}, which no run of train.py saves: the file is not trusted")
    if isinstance(value, Mapping):
        return {str(key): _plain(one, source=source, depth=depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, source=source, depth=depth + 1) for one in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise InputError(f"{source}: its config holds a {type(value).__name__}, not a plain value: the file is damaged")


def processors_of(config: Mapping[str, Any], *, source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the processors that a configuration trains with: those of its datasets where all have the same, else its
    `preprocess`; and the kinds (`vis_processor`, `text_processor`) of which they have different ones.
    """
    sections = {key: config.get(key) for key in ("preprocess", "datasets")}
    parts = {key: section if isinstance(section, Mapping) else {} for key, section in sections.items()}
    blocks = _blocks(parts["preprocess"], source=source)
    own = [_blocks(body, source=source) for body in parts["datasets"].values() if isinstance(body, Mapping)]
    mixed = []
    for key in PROCESSOR_KEYS:
        given = [body[key] for body in own if body.get(key)]
        if given and all(one == given[0] for one in given):
            blocks[key] = blocks.get(key, {}) | given[0]
        elif given:
            mixed.append(key)
    return blocks, tuple(mixed)


def _blocks(section: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The processors that a section names."""
    named = {key: section[key] for key in PROCESSOR_KEYS if isinstance(section.get(key), Mapping)}
    return _plain(named, source=source)


def lay_under(layers: Sequence[Layer], trained: Trained | None, *, level: int = logging.WARNING) -> list[Layer]:
    """Return the layers of a configuration (a model type's first, the user's own after it) with what the checkpoint
    was trained as between them.

    Every difference from the type is logged at `level`, and every value that the user's own replaces as INFO. All of
    the configuration counts for a model of the same architecture; for another one, what its weights need.
    """
    if trained is None:
        return list(layers)
    tree = merge_layers(layers)
    arch = tree["model"]["arch"]
    try:
        schema, open_ended = schema_of(registry.get_model_class(arch))
    except RegistryError:
        return list(layers)  # told with its place, where the section is checked
    _check_adapters(trained, arch, tree["model"])
    is_same = trained.arch == arch
    base, own = layers[0], list(layers[1:])
    stated = base.tree.get("model", {})
    given = _known(trained, schema, open_ended=open_ended) if is_same else _shared(trained, arch, stated)
    left = {key: value for key, value in stated.items() if key not in given}
    if is_same and trained.is_whole:
        left = {key: value for key, value in left.items() if key in (*MODEL_KEYS, *HOW_IT_RAN) or key not in schema}
    usual = base.tree.get("preprocess", {})
    blocks = trained.preprocess
    if not is_same:  # another task has other texts, and the type its own images
        blocks = {key: value for key, value in blocks.items() if key == "vis_processor" and not usual}
    kept = {key: value for key, value in usual.items() if key not in blocks}
    below = Layer(base.source, base.tree | {"model": left} | ({"preprocess": kept} if usual else {}))
    inserted = Layer(
        f"{CHECKPOINT_ORIGIN}{trained.source}", {"model": given} | ({"preprocess": blocks} if blocks else {})
    )
    _check_sources(trained, given, base, own)
    if not is_same:
        taken = ", ".join(sorted(given)) or "nothing"
        logger.info(f"{trained.source} is a checkpoint of {trained.arch}; {arch} takes {taken} from its configuration")
    for key in trained.mixed if blocks else ():
        logger.log(level, f"{trained.source}: its training sets had different {key}s; that of its model type is taken")
    _tell_differences(trained, base, [below, inserted], own, level=level)
    return [below, inserted, *own]


def _check_adapters(trained: Trained, arch: str, section: Mapping[str, Any]) -> None:
    """Raise AdapterError if adapters were trained in a language model of which the architecture has no place."""
    if trained.model.get("llm_lora") and trained.arch in registry.list_models():
        was, now = _language_model(trained.arch, trained.model), _language_model(arch, section)
        if was.keys() != now.keys():
            raise AdapterError(_other_model(trained, arch, section))


@contextlib.contextmanager
def fitting_adapters(section: Mapping[str, Any], source: str | None) -> Iterator[None]:
    """Inside, an error about adapters says which language model the weights at `source` were trained with, if the model
    of `section` has another one.
    """
    try:
        yield
    except AdapterError as error:
        trained = None if source is None else read(source)
        if trained is None or not trained.model.get("llm_lora") or trained.arch not in registry.list_models():
            raise
        if _language_model(trained.arch, trained.model) == _language_model(section["arch"], section):
            raise
        raise AdapterError(f"{_other_model(trained, section['arch'], section)} ({error})") from error


def _other_model(trained: Trained, arch: str, section: Mapping[str, Any]) -> str:
    """Return the message about adapters of another language model."""
    was, now = _in_words(trained.arch, trained.model), _in_words(arch, section)
    return (
        f"{trained.source} was trained as {was} with adapters (model.llm_lora), and this model is {now}: adapters fit "
        f"no other language model than their own; load the checkpoint as {was}, or name one of this model"
    )


def _in_words(arch: str, section: Mapping[str, Any]) -> str:
    named = [f"{key}={value}" for key, value in _language_model(arch, section).items()]
    return f"{arch} ({', '.join(named) or 'no language model'})"


def _language_model(arch: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key that names the language model, and its name; empty for an architecture without one."""
    whole = _defaults(arch) | section
    return {key: whole[key] for key in LANGUAGE_MODELS if key in _defaults(arch)}


def _known(trained: Trained, schema: Mapping[str, Parameter], *, open_ended: bool) -> dict[str, Any]:
    """The keys that the architecture has; the others, of another version, are logged."""
    for key, value in trained.model.items():
        if key not in schema and not open_ended:
            logger.warning(f"{trained.source}: its config has model.{key}={value!r}, which is unknown here: left out")
    return {key: value for key, value in trained.model.items() if key in schema or open_ended}


def _shared(trained: Trained, arch: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the weights that both architectures have, as the file gives them; what it does not say was at the
    default of its architecture.
    """
    own = _defaults(arch)
    known = trained.is_whole and trained.arch in registry.list_models()
    usual = {key: value for key, value in _defaults(trained.arch).items() if key in own} if known else {}
    missed = {key: value for key, value in usual.items() if key in stated or value != own[key]}
    both = missed | trained.model
    return {key: both[key] for key in OF_THE_WEIGHTS if key in both and key in own}


def _defaults(arch: str) -> dict[str, Any]:
    """The constructor's arguments with their defaults."""
    return {name: one.default for name, one in inspect.signature(registry.get_model_class(arch)).parameters.items()}


def _check_sources(trained: Trained, given: Mapping[str, Any], base: Layer, own: Sequence[Layer]) -> None:
    """ValueError for a URL that the file names and neither the type nor the user does: it would be fetched."""
    stated, usual = merge_layers(own).get("model", {}), base.tree.get("model", {})
    for key in given.keys() & set(SOURCES) - stated.keys():
        if download.is_url(str(given[key])) and given[key] != usual.get(key):
            raise InputError(
                f"{trained.source}: its config takes model.{key} from {given[key]}, which a file must not decide: if "
                f"you trust the address, give {key} yourself"
            )


def _tell_differences(
    trained: Trained, base: Layer, trained_as: Sequence[Layer], own: Sequence[Layer], *, level: int
) -> None:
    """Log each key where type and checkpoint differ, and each where the user's own value replaces the checkpoint's."""
    usual, there, final = (_flat(part) for part in ([base], trained_as, [*trained_as, *own]))
    given, stated = (_flat(part, resolved=False).keys() for part in (trained_as[1:], own))
    for key in sorted(there.keys() & given):
        value = there[key]
        if key in stated and final[key] != value:
            logger.info(f"{trained.source}: {key}={final[key]!r}, as given; it was trained with {value!r}")
        elif key not in stated and usual.get(key) != value:
            instead = f"; the type has {usual[key]!r}" if key in usual else ""
            logger.log(level, f"{trained.source}: {key}={value!r}, as it was trained{instead}")
    for key in sorted(usual.keys() - there.keys() - stated):
        logger.log(level, f"{trained.source}: {key} is left out, as it was in training; the type has {usual[key]!r}")


def _flat(layers: Sequence[Layer], *, resolved: bool = True) -> dict[str, Any]:
    """Each key of the model section, and each processor block, under its dotted name; what a block has of the model is
    left as it is written.
    """
    tree = merge_layers(layers)
    sections = {
        key: resolve_key(tree, (key,), layers) if resolved else tree.get(key) for key in ("model", "preprocess")
    }
    model = sections["model"] or {}
    flat = {f"model.{key}": value for key, value in model.items() if key not in MODEL_KEYS}
    for key, blocks in linked_section(sections["preprocess"] or {}, model).items():
        flat |= {f"preprocess.{key}.{split}": block for split, block in blocks.items()}
    return flat
