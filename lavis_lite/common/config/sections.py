"""The sections of a configuration, each checked against what reads it: model, processors, run and task, datasets."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lavis_lite.common.config.adapters import lora_settings
from lavis_lite.common.config.run import IGNORED_LAVIS_KEYS, LAVIS_TASK_KEYS, RunConfig
from lavis_lite.common.config.schema import Checker, Parameter, Schema, schema_of
from lavis_lite.common.errors import SettingError, UserError
from lavis_lite.common.registry import RegistryError, did_you_mean, registry
from lavis_lite.common.sources.folders import read_json_mapping

logger = logging.getLogger(__name__)

PROCESSOR_KEYS = ("vis_processor", "text_processor")
MODEL_KEYS: Schema = {
    "arch": Parameter(str),
    **dict.fromkeys(("model_type", "init_vit", "init_text"), Parameter(str | None)),
    **dict.fromkeys(("pretrained", "finetuned", "checkpoint"), Parameter(str | None)),
    **dict.fromkeys(("init_text_token_type", "load_pretrained", "load_finetuned"), Parameter(bool)),
    "cache_features": Parameter(str | bool | None),  # a folder for the tokens of a frozen image encoder
}
"""Keys of every model section besides the constructor's arguments."""
LAVIS_PROCESSOR_KEYS = ("prompt", "min_scale", "max_scale", "n_frms", "full_video")
"""Arguments of processors that LAVIS's recipes also give to processors that do not read them."""
LAVIS_MODALITIES, LAVIS_FOLDERS = ("pc_processor", "audio_processor"), ("pc", "audio")
"""Keys of a dataset, and of its `build_info`, for modalities that are not here."""
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


def model_arguments(section: Mapping[str, Any], checker: Checker) -> dict[str, Any]:
    """Return a `model` section checked against the architecture's constructor.

    LAVIS's `med_config_path` is read into `med`, and a folder of adapters into `llm_lora`.
    """
    section = dict(section)
    model_class = _looked_up(registry.get_model_class, section["arch"], checker, ("model", "arch"))
    med = _med_overrides(section.pop("med_config_path", None), checker)
    if med:
        section["med"] = med | (section.get("med") or {})
    schema, open_ended = schema_of(model_class)
    if "llm_lora" in schema and isinstance(section.get("llm_lora"), str):
        section["llm_lora"] = lora_settings(section["llm_lora"])
    return checker.section(section, MODEL_KEYS | schema, ("model",), open_ended=open_ended)


def check_processors(blocks: Mapping[str, Any], checker: Checker, path: tuple[str, ...]) -> None:
    """Check `vis_processor` and `text_processor`: blocks `train` and `eval` of a registered name and its arguments."""
    for key in PROCESSOR_KEYS:
        splits = checker.value(blocks.get(key) or {}, dict[str, Any], (*path, key))
        checker.section(splits, dict.fromkeys(("train", "eval"), Parameter(dict[str, Any])), (*path, key))
        for split, block in splits.items():
            where = (*path, key, split)
            processor = _looked_up(registry.get_processor_class, block.get("name"), checker, (*where, "name"))
            schema, open_ended = schema_of(processor)
            checker.section(block, {"name": Parameter(str)} | schema, where, open_ended=open_ended)


def check_run(
    section: Mapping[str, Any], checker: Checker, *, arch: str | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the run's settings and those of its task, both checked; with `defaults: lavis` those of `arch` too.

    Keys of LAVIS without effect are logged.
    """
    ignored = [key for key in IGNORED_LAVIS_KEYS if key in section]
    if ignored:
        logger.info(f"ignored run keys of LAVIS: {', '.join(ignored)}")
    section = {key: value for key, value in section.items() if key not in ignored}
    if not isinstance(section.get("task"), str):
        names = did_you_mean("", registry.list_tasks())
        raise checker.error(("run", "task"), f"missing: it needs a task's name. {names}")
    run_schema, _ = schema_of(RunConfig)
    task_class = _looked_up(registry.get_task_class, section["task"], checker, ("run", "task"))
    task_schema, open_ended = schema_of(task_class)
    unread = [key for key in LAVIS_TASK_KEYS if key in section and key not in task_schema and not open_ended]
    if unread:
        logger.info(f"run.task: {section['task']} does not read {', '.join(unread)}: no effect, as in LAVIS")
        section = {key: value for key, value in section.items() if key not in unread}
    if section.get("defaults") == "lavis":
        section = task_class.lavis_defaults(arch) | section
    values = checker.section(section, task_schema | run_schema, ("run",), open_ended=open_ended)
    for key, get in (("runner", registry.get_runner_class), ("lr_sched", registry.get_lr_scheduler_class)):
        if key in values:
            _looked_up(get, values[key], checker, ("run", key))
    try:
        run = RunConfig(**{key: value for key, value in values.items() if key in run_schema})
    except SettingError as error:
        raise checker.error(tuple(error.name.split(".")), error.problem) from None
    own = {key: value for key, value in values.items() if key in task_schema or key not in run_schema}
    return run, own


def builder_name(name: str, section: Mapping[str, Any]) -> str:
    """Return the name of a dataset's builder: its `layout`, else its `builder`, else its own name."""
    return section.get("layout") or section.get("builder") or name


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
    ignored = {"type", "builder", "dataset_card", *LAVIS_MODALITIES} - schema.keys()
    body = without_unread({key: value for key, value in body.items() if key not in ignored}, ".".join(path))
    defaults = {key: preprocess[key] for key in PROCESSOR_KEYS if key in preprocess and key in schema}
    check_processors(body, checker, path)
    return chosen | checker.section(defaults | body, schema, path, open_ended=open_ended)


def without_unread(body: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a dataset's section without keys that LAVIS's recipes give and its code does not read; log them.

    These are arguments of one processor that a recipe gives to another, and folders of further modalities.
    """
    body, unread = dict(body), []
    for kind in (kind for kind in PROCESSOR_KEYS if isinstance(body.get(kind), Mapping)):
        body[kind] = dict(body[kind])
        for split, block in body[kind].items():
            if not isinstance(block, Mapping) or block.get("name") not in registry.list_processors():
                continue  # an error of `check_processors`
            schema, open_ended = schema_of(registry.get_processor_class(block["name"]))
            keys = [key for key in LAVIS_PROCESSOR_KEYS if key in block and key not in schema and not open_ended]
            body[kind][split] = {key: value for key, value in block.items() if key not in keys}
            unread += [f"{kind}.{split}.{key}" for key in keys]
    if isinstance(body.get("build_info"), Mapping):
        unread += [f"build_info.{key}" for key in LAVIS_FOLDERS if key in body["build_info"]]
        body["build_info"] = {key: value for key, value in body["build_info"].items() if key not in LAVIS_FOLDERS}
    if unread:
        logger.info(f"{where}: {', '.join(unread)} of LAVIS have no effect")
    return body


def _looked_up(
    get: Callable[[str], Any], name: Any, checker: Checker, path: tuple[str, ...], *, advice: str = ""
) -> Any:
    if not isinstance(name, str):
        raise checker.error(path, f"expected a name, got {name!r}")
    try:
        return get(name)
    except RegistryError as error:
        raise checker.error(path, f"{error}{advice}") from None


def _med_overrides(med_config_path: Any, checker: Checker) -> dict[str, Any]:
    """Return the `med` settings of LAVIS's `med_config_path`: none for its stock files, which are our defaults."""
    if med_config_path is None or Path(str(med_config_path)).name in _STOCK_BERT_FILES:
        return {}
    try:
        bert = read_json_mapping(Path(str(med_config_path)))
    except UserError as error:
        raise checker.error(("model", "med_config_path"), str(error)) from None
    return {ours: bert[key] for key, ours in BERT_TO_MED.items() if key in bert}
