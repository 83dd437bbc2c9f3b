"""One run's configuration: YAML files and options merged, checked and turned into plain values.

Merge order, the last one winning: `RunConfig`'s defaults, configs/models/<arch>/<model_type>.yaml, what
`model.checkpoint` was trained as (trained_config.py), configs/datasets/<name>/<type>.yaml, the project's YAML (its
`_base_` files first), `--options`. Schemas are the constructors' own signatures (config_schema.py).
Surprising: a dataset that names no processors takes the model type's `preprocess`; one that names its `builder` may be
called anything; `expected:` is free data, the result that a recipe has been seen to reach.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from lavis_lite.common.config import trained as trained_config
from lavis_lite.common.config import zoo
from lavis_lite.common.config.agreement import follow_model, linked
from lavis_lite.common.config.files import (
    ConfigError,
    Layer,
    load_with_bases,
    merge,
    merge_layers,
    origin,
    parse_options,
    resolve,
    resolve_key,
)
from lavis_lite.common.config.prompts import replaced_instructions
from lavis_lite.common.config.run import RunConfig, RunConfigError
from lavis_lite.common.config.schema import Checker, Parameter
from lavis_lite.common.config.sections import (
    PROCESSOR_KEYS,
    check_dataset,
    check_processors,
    check_run,
    dataset_layers,
    model_arguments,
    model_layer,
)
from lavis_lite.common.registry import RegistryError, did_you_mean

logger = logging.getLogger(__name__)

__all__ = ["Config", "ConfigError", "RunConfig", "parser"]

RUN_DEFAULTS = {f.name: getattr(RunConfig(task=""), f.name) for f in dataclasses.fields(RunConfig) if f.name != "task"}
SECTIONS = ("model", "preprocess", "datasets", "run", "imports", "expected")


@dataclass(kw_only=True)
class Config:
    """A checked configuration. Everything but `run` is plain dictionaries, lists and scalars."""

    model: dict[str, Any]
    """`arch`, `model_type`, the constructor's arguments, and the weight keys."""
    datasets: dict[str, dict[str, Any]]
    """Dataset name -> the builder's arguments, and `builder`, its name, where that is not the dataset's."""
    run: RunConfig
    task: dict[str, Any] = field(default_factory=dict)
    """The task's own fields, as far as given."""
    preprocess: dict[str, Any] = field(default_factory=dict)
    """The model type's `vis_processor` and `text_processor` blocks."""
    dataset_types: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Dataset name -> the `instructions` that an explicit prompt makes of its own; follows from the other fields."""
    imports: list[str] = field(default_factory=list)
    expected: Any = None
    source: str = ""
    """The project's YAML."""

    @classmethod
    def from_cli(cls, argv: Sequence[str] | None = None) -> "Config":
        """Read train.py's command line; see `parser`."""
        return cls.from_args(parser().parse_args(argv))

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Config":
        """Turn parsed command-line arguments into a configuration; its flags count as options given last."""
        options, weights = [*args.options, *args.cfg_options], getattr(args, "checkpoint", None)
        if hasattr(args, "checkpoint") and args.resume is not None and (args.resume == "auto" or weights is not None):
            raise ConfigError(
                f"--resume {args.resume}: an evaluation resumes nothing; name its weights by --checkpoint"
            )
        cfg = cls.from_file(args.cfg_path, options, checkpoint=weights)
        if weights is not None and cfg.run.resume_ckpt_path is not None:
            logger.info("run.resume_ckpt_path %s is not read: --checkpoint names the weights", cfg.run.resume_ckpt_path)
            cfg.run = dataclasses.replace(cfg.run, resume_ckpt_path=None)
        if args.job_id is not None:
            cfg.run = replace_run(cfg.run, origin="--job-id", job_id=args.job_id)
        if args.resume is not None:
            auto = args.resume == "auto"
            cfg.run = dataclasses.replace(
                cfg.run, resume="auto" if auto else None, resume_ckpt_path=None if auto else args.resume
            )
        return cfg

    @classmethod
    def from_file(cls, path: str | Path, options: Sequence[str] = (), *, checkpoint: str | None = None) -> "Config":
        """Read a project's YAML and `a.b=c` options. Raises ConfigError for any mistake, before anything is built."""
        own_layers = load_with_bases(Path(path))
        if options:
            own_layers.append(parse_options(options))
        if checkpoint is not None:
            if not checkpoint.strip():
                raise ConfigError(f"--checkpoint: expected a file, a folder, a URL or a hub id, got {checkpoint!r}")
            own_layers.append(Layer("--checkpoint", {"model": {"checkpoint": checkpoint}}))
        _check_sections(own_layers)
        own = merge_layers(own_layers)
        _import_user_modules(resolve_key(own, ("imports",), own_layers), own_layers)
        builders = {name: name for name in own.get("datasets", {})} | _dataset_keys(own, own_layers, "builder")
        types = _dataset_types(own, own_layers, builders)
        layers = [*_model_layers(own, own_layers), *_dataset_layers(types, builders), *own_layers]
        layers = [linked(layer) for layer in layers]
        tree = resolve(merge({"run": RUN_DEFAULTS}, merge_layers(layers)), layers)
        raw = {path: text for layer in layers for path, text in layer.raw.items()}
        return _checked(tree, Checker(layers, raw), types, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dictionaries, such that a YAML of it is read as the same configuration."""
        typed = {name: {"type": kind} for name, kind in self.dataset_types.items() if kind != "default"}
        datasets = {name: typed.get(name, {}) | body for name, body in self.datasets.items()}
        tree: dict[str, Any] = {"model": self.model, "preprocess": self.preprocess, "datasets": datasets}
        tree |= {"run": dataclasses.asdict(self.run) | self.task}
        tree |= {"imports": self.imports} if self.imports else {}
        tree |= {"expected": self.expected} if self.expected is not None else {}
        return _plain(tree)

    def to_yaml(self) -> str:
        """Return `to_dict` as YAML."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def parser(*, prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of train.py's command line."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog=prog, description=description, formatter_class=raw)
    p.add_argument("--cfg-path", required=True, metavar="YAML", help="the project's configuration")
    settings = {"nargs": "+", "action": "extend", "default": [], "metavar": "KEY=VALUE"}
    p.add_argument("--options", **settings, help="settings that win over the file's, e.g. run.max_epoch=3")
    p.add_argument("--cfg-options", **settings, help="the same, under LAVIS's name")
    p.add_argument("--job-id", metavar="NAME", help="folder of the run below run.output_dir (default: the time)")
    p.add_argument("--resume", metavar="auto|PATH", help="auto: go on with the newest job; or a checkpoint_last.pth")
    p.add_argument("--dry-run", action="store_true", help="check everything, count parameters and samples, run no step")
    return p


def replace_run(run: RunConfig, *, origin: str, **changes: Any) -> RunConfig:
    """Return `run` with some keys changed; ConfigError naming `origin` if a value makes no sense."""
    try:
        return dataclasses.replace(run, **changes)
    except RunConfigError as error:
        raise ConfigError(f"{origin}: {error.text}") from None


def _checked(tree: dict[str, Any], checker: Checker, types: dict[str, str], *, source: str) -> Config:
    run, task = check_run(tree.get("run", {}), checker)
    model = model_arguments(tree["model"], checker)
    preprocess = tree.get("preprocess", {})
    checker.section(preprocess, {key: Parameter(dict[str, Any]) for key in PROCESSOR_KEYS}, ("preprocess",))
    check_processors(preprocess, checker, ("preprocess",))
    preprocess = follow_model(preprocess, model, checker, ("preprocess",))
    datasets = {
        name: follow_model(check_dataset(name, body, preprocess, checker), model, checker, ("datasets", name))
        for name, body in tree.get("datasets", {}).items()
    }
    for key in ("train_dataset_ratios", "train_dataset_factors"):
        for name in getattr(run, key) or {}:
            if name not in datasets:
                raise checker.error(("run", key, name), f"no such dataset here. {did_you_mean(name, datasets)}")
    return Config(
        model=model,
        datasets=datasets,
        run=run,
        task=task,
        preprocess=preprocess,
        dataset_types=types,
        prompts=replaced_instructions(task, model, datasets, types, checker),
        imports=tree.get("imports") or [],
        expected=tree.get("expected"),
        source=source,
    )


def _check_sections(layers: Sequence[Layer]) -> None:
    for layer in layers:
        for key in layer.tree:
            if key not in SECTIONS:
                raise ConfigError(f"{layer.source}: {key}: unknown section. {did_you_mean(key, SECTIONS)}")


def _import_user_modules(names: Any, layers: Sequence[Layer]) -> None:
    """Import the modules that `imports` lists, so that they register their classes; the working folder is searched."""
    if names is None:
        return
    where = f"{origin(layers, ('imports',))}: imports"
    if not isinstance(names, list) or not all(map(_is_module_name, names)):
        raise ConfigError(f"{where}: expected a list of module names such as my_project.models, got {names!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            places = f"it is looked up on PYTHONPATH and in {Path.cwd()}"
            raise ConfigError(f"{where}: cannot import {name!r}: {error}; {places}") from None


def _is_module_name(name: Any) -> bool:
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def _model_layers(tree: dict[str, Any], layers: Sequence[Layer]) -> list[Layer]:
    """The model type's layer, and what the checkpoint that is named was trained as."""
    base, checkpoint = _model_layer_of(tree, layers), resolve_key(tree, ("model", "checkpoint"), layers)
    if not isinstance(checkpoint, str):
        return [base]
    own = [base, Layer("defaults", {"run": RUN_DEFAULTS}), *layers]
    laid = trained_config.lay_under(own, trained_config.read(checkpoint), level=logging.INFO)
    return laid[: 1 + len(laid) - len(own)]


def _model_layer_of(tree: dict[str, Any], layers: Sequence[Layer]) -> Layer:
    arch, model_type = (resolve_key(tree, ("model", key), layers) for key in ("arch", "model_type"))
    if not isinstance(arch, str):
        where = f"{origin(layers, ('model', 'arch'))}: model.arch"
        raise ConfigError(f"{where}: missing: it needs an architecture. {did_you_mean('', zoo.model_zoo.names())}")
    if model_type is None and arch in zoo.model_zoo:
        where = f"{origin(layers, ('model', 'model_type'))}: model.model_type"
        raise ConfigError(f"{where}: missing: it needs a type of {arch}. {did_you_mean('', zoo.model_zoo.types(arch))}")
    if arch in zoo.model_zoo:
        try:
            return model_layer(arch, str(model_type))
        except RegistryError as error:
            raise ConfigError(f"{origin(layers, ('model', 'model_type'))}: model.model_type: {error}") from None
    return Layer(f"{arch}'s defaults", {})  # a user's own architecture: its constructor has the defaults


def _dataset_keys(tree: dict[str, Any], layers: Sequence[Layer], key: str) -> dict[str, str]:
    """The name that each dataset has under `key`; datasets that say nothing are left out."""
    found = {name: resolve_key(tree, ("datasets", name, key), layers) for name in tree.get("datasets", {})}
    for name, value in found.items():
        if not isinstance(value, str | None):
            where = f"{origin(layers, ('datasets', name, key))}: datasets.{name}.{key}"
            raise ConfigError(f"{where}: expected a name, got {value!r}")
    return {name: value for name, value in found.items() if value is not None}


def _dataset_types(tree: dict[str, Any], layers: Sequence[Layer], builders: Mapping[str, str]) -> dict[str, str]:
    types = dict.fromkeys(builders, "default") | _dataset_keys(tree, layers, "type")
    for name, kind in types.items():
        known = zoo.dataset_zoo.types(builders[name])
        if known and kind not in known:
            where = f"{origin(layers, ('datasets', name, 'type'))}: datasets.{name}.type"
            raise ConfigError(f"{where}: {builders[name]} has no type {kind!r}. {did_you_mean(kind, known)}")
    return types


def _dataset_layers(types: Mapping[str, str], builders: Mapping[str, str]) -> list[Layer]:
    found = []
    for name, builder in builders.items():
        if builder in zoo.dataset_zoo:  # else a user's own dataset: its builder has the defaults
            layers = dataset_layers(builder, types[name])
            found += [Layer(layer.source, {"datasets": {name: layer.tree["datasets"][builder]}}) for layer in layers]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
