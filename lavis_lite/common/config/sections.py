"""The sections of a configuration, each checked against what reads it: model, processors, run and task, datasets."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lavis_lite.common.config import zoo
from lavis_lite.common.config.files import (
    ConfigError,
    Layer,
    load_with_bases,
    load_yaml,
    merge_layers,
    normalise,
    resolve,
)
from lavis_lite.common.config.run import DEAD_RUN_KEYS, RunConfig, RunConfigError
from lavis_lite.common.config.schema import (
    Checker,
    Parameter,
    Schema,
    schema_of,
)
from lavis_lite.common.registry import RegistryError, did_you_mean, registry

logger = logging.getLogger(__name__)

PROCESSOR_KEYS = ("vis_processor", "text_processor")
MODEL_KEYS: Schema = {
    "arch": Parameter(str),
    "model_type": Parameter(str | None),
    "init_vit": Parameter(str | None),
    "init_text": Parameter(str | None),
    "init_text_token_type": Parameter(bool),
    "pretrained": Parameter(str | None),
    "finetuned": Parameter(str | None),
    "load_pretrained": Parameter(bool),
    "load_finetuned": Parameter(bool),
    "checkpoint": Parameter(str | None),
}
_STOCK_BERT_FILES = ("med_config.json", "med_large_config.json", "bert_config.json")
BERT_TO_MED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_positions",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}


def model_layer(arch: str, model_type: str) -> Layer:
    """Return a model type's packaged YAML as a layer, with `model_type` set. KeyError with the nearest if unknown."""
    path = zoo.model_config_path(arch, model_type)
    layer = Layer(str(path), normalise(load_yaml(path), source=str(path)))
    layer.tree.setdefault("model", {}).update(arch=arch, model_type=model_type)
    return layer


def dataset_layers(name: str, kind: str) -> list[Layer]:
    """Return a dataset type's packaged YAML as layers, its `_base_` files first; the one section of each is `name`'s.

    Raises KeyError with the nearest names for an unknown name or type.
    """
    layers = []
    for layer in load_with_bases(zoo.dataset_config_path(name, kind)):
        sections = list(layer.tree.get("datasets", {}).values())
        if len(sections) != 1:
            raise ConfigError(f"{layer.source}: expected the section datasets.{name}, and no other")
        layers.append(Layer(layer.source, {"datasets": {name: sections[0]}}))
    return layers


def packaged_dataset(name: str, kind: str = "default") -> dict[str, Any]:
    """Return the section of a packaged dataset, its bases merged and its values resolved."""
    layers = dataset_layers(name, kind)
    return resolve(merge_layers(layers), layers)["datasets"][name]


def builder_name(name: str, section: Mapping[str, Any]) -> str:
    """Return the name of a dataset's builder: its `layout`, else its `builder`, else its own name."""
    return section.get("layout") or section.get("builder") or name


def model_arguments(section: Mapping[str, Any], checker: Checker) -> dict[str, Any]:
    """Check a `model` section against the architecture's constructor; LAVIS's `med_config_path` is read into `med`, and
    a folder of adapters into `llm_lora`.
    """
    section = dict(section)
    model_class = _looked_up(registry.get_model_class, section["arch"], checker, ("model", "arch"))
    med = _med_overrides(section.pop("med_config_path", None), checker)
    if med:
        section["med"] = med | (section.get("med") or {})
    schema, open_ended = schema_of(model_class)
    if "llm_lora" in schema and isinstance(section.get("llm_lora"), str):
        from lavis_lite.nn.lora import lora_settings

        section["llm_lora"] = lora_settings(section["llm_lora"])
    return checker.section(section, MODEL_KEYS | schema, ("model",), open_ended=open_ended)


def check_processors(blocks: Mapping[str, Any], checker: Checker, path: tuple[str, ...]) -> None:
    """Check `vis_processor` and `text_processor`: blocks train and eval, each a registered name and its arguments."""
    for key in PROCESSOR_KEYS:
        splits = blocks.get(key) or {}
        if not isinstance(splits, Mapping):
            raise checker.error((*path, key), f"expected a mapping with the blocks train and eval, got {splits!r}")
        for split, block in splits.items():
            where = (*path, key, str(split))
            if split not in ("train", "eval"):
                raise checker.error(where, f"unknown key. {did_you_mean(split, ('train', 'eval'))}")
            if not isinstance(block, Mapping) or not isinstance(block.get("name"), str):
                raise checker.error(where, f"expected a mapping with the processor's name, got {block!r}")
            processor = _looked_up(registry.get_processor_class, block["name"], checker, (*where, "name"))
            schema, open_ended = schema_of(processor)
            checker.section(block, {"name": Parameter(str)} | schema, where, open_ended=open_ended)


def check_run(section: Mapping[str, Any], checker: Checker) -> tuple[RunConfig, dict[str, Any]]:
    dead = {key: why for key, why in DEAD_RUN_KEYS.items() if key in section}
    if dead:
        logger.info(
            "run keys of LAVIS that mean nothing here: %s", "; ".join(f"{k} ({why})" for k, why in dead.items())
        )
    section = {key: value for key, value in section.items() if key not in dead}
    if not isinstance(section.get("task"), str):
        raise checker.error(
            ("run", "task"), f"missing: it needs a task's name. {did_you_mean('', registry.list_tasks())}"
        )
    run_schema, _ = schema_of(RunConfig)
    task_class = _looked_up(registry.get_task_class, section["task"], checker, ("run", "task"))
    task_schema, open_ended = schema_of(task_class)
    values = checker.section(section, task_schema | run_schema, ("run",), open_ended=open_ended)
    for kind, key in (("runner", "runner"), ("lr_scheduler", "lr_sched")):
        if key in values:
            _looked_up(getattr(registry, f"get_{kind}_class"), values[key], checker, ("run", key))
    try:
        run = RunConfig(**{key: value for key, value in values.items() if key in run_schema})
    except RunConfigError as error:
        raise checker.error(("run", error.key), error.text) from None
    own = {key: value for key, value in values.items() if key in task_schema or key not in run_schema}
    return run, own


def check_dataset(
    name: str, body: Mapping[str, Any], preprocess: Mapping[str, Any], checker: Checker
) -> dict[str, Any]:
    """Check a dataset's section against its builder: its `layout`, its `builder`, or that of its own name; return its
    arguments and, if it is given, `builder`.
    """
    path = ("datasets", name)
    chosen = {"builder": body["builder"]} if body.get("builder") is not None else {}
    key = next((key for key in ("layout", "builder") if body.get(key)), None)
    where, advice = ((*path, key), "") if key else (path, " A name of your own needs the key builder.")
    builder = _looked_up(registry.get_builder_class, builder_name(name, body), checker, where, advice=advice)
    schema, open_ended = schema_of(builder)
    dead = {"type", "builder", "dataset_card"} - schema.keys()
    body = {key: value for key, value in body.items() if key not in dead}
    defaults = {key: preprocess[key] for key in PROCESSOR_KEYS if key in preprocess and key in schema}
    check_processors(body, checker, path)
    return chosen | checker.section(defaults | body, schema, path, open_ended=open_ended)


def _looked_up(
    get: Callable[[str], Any], name: Any, checker: Checker, path: tuple[str, ...], *, advice: str = ""
) -> Any:
    try:
        return get(name)
    except RegistryError as error:
        raise checker.error(path, f"{error}{advice}") from None


def _med_overrides(med_config_path: Any, checker: Checker) -> dict[str, Any]:
    """Translate LAVIS's `med_config_path`: its stock files are our defaults, any other is a BERT configuration."""
    where = ("model", "med_config_path")
    if med_config_path is None:
        return {}
    if not isinstance(med_config_path, str):
        raise checker.error(where, f"expected a path, got {med_config_path!r}")
    path = Path(med_config_path)
    if path.name in _STOCK_BERT_FILES:
        return {}
    try:
        bert = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise checker.error(where, f"cannot read {path} as JSON: {error}") from None
    if not isinstance(bert, dict):
        raise checker.error(where, f"{path}: expected a mapping of BERT's configuration, found a {type(bert).__name__}")
    return {ours: bert[key] for key, ours in BERT_TO_MED.items() if key in bert}
