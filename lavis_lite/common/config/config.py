"""The configuration of a run: YAML files and options merged, checked and turned into plain values.

Merge order, later layers override: `RunConfig`'s defaults, configs/models/<arch>/<model_type>.yaml, what
`model.checkpoint` was trained with (trained.py), configs/datasets/<name>/<type>.yaml, the project's YAML (its `_base_`
files first), `--options`. Schemas are the constructors' signatures (schema.py).

Note: a dataset without processors takes the model type's `preprocess`; a dataset that names its `builder` may have any
name; `expected:` holds published values (expected.py).
"""

import argparse
import dataclasses
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lavis_lite.common.config import trained as trained_config
from lavis_lite.common.config import zoo
from lavis_lite.common.config.agreement import follow_model, linked, replaced_instructions
from lavis_lite.common.config.expected import Alternative, Expected, read_alternatives, read_expected
from lavis_lite.common.config.files import (
    ConfigError,
    Layer,
    load_with_bases,
    merge_layers,
    parse_options,
    resolve,
    resolve_key,
)
from lavis_lite.common.config.recipes import find_recipe
from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.config.schema import Checker, Parameter
from lavis_lite.common.config.sections import (
    PROCESSOR_KEYS,
    check_dataset,
    check_processors,
    check_run,
    model_arguments,
)
from lavis_lite.common.registry import RegistryError, did_you_mean, registry

logger = logging.getLogger(__name__)

__all__ = ["Config", "ConfigError", "RunConfig", "parser"]

SECTIONS = ("model", "preprocess", "datasets", "run", "imports", "expected", "alternatives")
RESUME_HELP = "auto: resume the newest job, or that of --job-id; or a checkpoint_last.pth or its folder"
DEFAULTS = Layer("defaults", {"run": {key: value for key, value in vars(RunConfig(task="")).items() if key != "task"}})


@dataclass(kw_only=True)
class Config:
    """A checked configuration. All but `run` is plain dictionaries, lists and scalars."""

    model: dict[str, Any]
    """`arch`, `model_type`, the constructor's arguments, and the weight keys."""
    datasets: dict[str, dict[str, Any]]
    """Dataset name -> the builder's arguments, and `builder`, its name, if that is not the dataset's."""
    run: RunConfig
    task: dict[str, Any] = field(default_factory=dict)
    """The task's own fields, as far as given."""
    preprocess: dict[str, Any] = field(default_factory=dict)
    """The model type's `vis_processor` and `text_processor` blocks."""
    dataset_types: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Dataset name -> the `instructions` that follow from an explicit prompt; not in `to_dict`."""
    imports: list[str] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)
    """Published values of the recipe's metrics."""
    alternatives: list[Alternative] = field(default_factory=list)
    """Other readings of the protocol of these values."""
    source: str = ""
    """The project's YAML."""

    @classmethod
    def from_cli(cls, argv: Sequence[str] | None = None) -> "Config":
        """Read train.py's command line; see `parser`."""
        return cls.from_args(parser().parse_args(argv))

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Config":
        """Turn parsed command-line arguments into a configuration; flags override options.

        Only evaluate.py's arguments have `checkpoint`.
        """
        weights, resume, limit = vars(args).get("checkpoint"), args.resume, vars(args).get("limit")
        evaluates = "checkpoint" in args
        if evaluates and resume not in (None, "auto") and weights is not None:
            raise ConfigError(f"--resume {resume}: names weights, as --checkpoint does: give one of them")
        flags = [Layer("evaluate.py", {"run": {"evaluate": True}})] if evaluates else []
        if args.job_id is not None:
            flags.append(Layer("--job-id", {"run": {"job_id": args.job_id}}))
        if limit is not None:
            flags.append(Layer("--limit", {"run": {"limit": limit}}))
        if args.profile is not None:
            flags.append(Layer("--profile", {"run": {"profile": args.profile}}))
        if resume is not None:
            keys: dict[str, str | None] = {"resume": None, "resume_ckpt_path": resume}
            if resume == "auto":  # an evaluation keeps the weights that its file names
                keys = {"resume": "auto"} if evaluates else {"resume": "auto", "resume_ckpt_path": None}
            flags.append(Layer("--resume", {"run": keys}))
        return cls.from_file(args.cfg_path, args.options, checkpoint=weights, flags=flags)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        options: Sequence[str] = (),
        *,
        checkpoint: str | None = None,
        flags: Sequence[Layer] = (),
    ) -> "Config":
        """Read a project's YAML, or the recipe of a name, and `a.b=c` options. Raises ConfigError for any mistake,
        before anything is built.

        `checkpoint` names the weights, in place of `model.checkpoint` and `run.resume_ckpt_path`. `flags` are the
        last layers.
        """
        path = find_recipe(path)
        own = [*load_with_bases(path), *([parse_options(options)] if options else [])]
        if checkpoint is not None:
            if not checkpoint.strip():
                raise ConfigError(f"--checkpoint: expected a file, a folder, a URL or a hub id, got {checkpoint!r}")
            if (resumed := resolve_key(own, ("run", "resume_ckpt_path"))) is not None:
                logger.info("run.resume_ckpt_path %s is not read: --checkpoint names the weights", resumed)
            own.append(Layer("--checkpoint", {"model": {"checkpoint": checkpoint}, "run": {"resume_ckpt_path": None}}))
        own += flags
        return cls.from_layers(own, source=str(path))

    @classmethod
    def from_layers(cls, own: Sequence[Layer], *, source: str) -> "Config":
        """As `from_file`, of a project's layers: its files, options and flags; `source` is its file's name."""
        for file, key in ((layer.source, key) for layer in own for key in layer.tree if key not in SECTIONS):
            raise ConfigError(f"{file}: {key}: unknown section. {did_you_mean(key, SECTIONS)}")
        project = Checker(own)
        _import_user_modules(project)
        types, of_datasets = _dataset_layers(project)
        layers = [linked(layer) for layer in (*_model_layers(project), *of_datasets, *own)]
        return _checked(resolve([DEFAULTS, *layers]), Checker(layers), types, source=source)

    @property
    def run_cfg(self) -> Any:
        """The settings of the run and its task as LAVIS's tasks read them: `cfg.run_cfg.max_len`, or by `get`."""
        return OmegaConf.create(_plain(dataclasses.asdict(self.run) | self.task))

    @property
    def model_cfg(self) -> Any:
        """The model section, likewise."""
        return OmegaConf.create(_plain(self.model))

    @property
    def datasets_cfg(self) -> Any:
        """The datasets' sections, likewise."""
        return OmegaConf.create(_plain(self.datasets))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dictionaries, such that a YAML of it is read as the same configuration."""
        typed = {name: {"type": kind} for name, kind in self.dataset_types.items() if kind != "default"}
        datasets = {name: typed.get(name, {}) | body for name, body in self.datasets.items()}
        tree: dict[str, Any] = {"model": self.model, "preprocess": self.preprocess, "datasets": datasets}
        tree |= {"run": dataclasses.asdict(self.run) | self.task}
        tree |= {"imports": self.imports} if self.imports else {}
        for name, entries in (("expected", self.expected), ("alternatives", self.alternatives)):
            tree |= {name: [entry.to_dict() for entry in entries]} if entries else {}
        return _plain(tree)

    def to_yaml(self) -> str:
        """Return `to_dict` as YAML."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def parser(*, prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of train.py's command line."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog=prog, description=description, formatter_class=raw)
    p.add_argument(
        "--cfg-path", required=True, metavar="YAML", help="the configuration: a file, or the name of a recipe"
    )
    text = "settings that override the file's, e.g. run.max_epoch=3; LAVIS's name is --cfg-options"
    p.add_argument("--options", "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=text)
    p.add_argument("--job-id", metavar="NAME", help="folder of the run in run.output_dir (default: the time)")
    p.add_argument("--resume", metavar="auto|PATH", help=RESUME_HELP)
    text = "profile N steps, or batches of an evaluation: a table and a trace in the job's folder (run.profile)"
    p.add_argument("--profile", type=int, metavar="N", help=text)
    p.add_argument("--dry-run", action="store_true", help="check everything, count parameters and samples, run no step")
    text = "with --dry-run of a training: its memory and expected rate on a GPU such as H100 or 4090"
    p.add_argument("--gpu", metavar="NAME", help=text)
    return p


def _checked(tree: dict[str, Any], checker: Checker, types: dict[str, str], *, source: str) -> Config:
    run, task = check_run(tree.get("run", {}), checker, arch=tree["model"].get("arch"))
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
        for name in (vars(run)[key] or {}).keys() - datasets.keys():
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
        expected=read_expected(tree.get("expected"), checker),
        alternatives=read_alternatives(tree.get("alternatives"), checker),
        source=source,
    )


def _import_user_modules(project: Checker) -> None:
    """Import the modules that `imports` lists, which register their classes; the working folder is searched too."""
    names = resolve_key(project.layers, ("imports",))
    if names is None:
        return
    if not isinstance(names, list) or not all(re.fullmatch(r"\w+(\.\w+)*", str(name)) for name in names):
        raise project.error(("imports",), f"expected a list of module names such as my_project.models, got {names!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            import_module(str(name))
        except ModuleNotFoundError as error:
            places = f"it is looked up on PYTHONPATH and in {Path.cwd()}"
            raise project.error(("imports",), f"cannot import {name!r}: {error}; {places}") from None


def _model_layers(project: Checker) -> list[Layer]:
    """Return the layers of the model type, and the configuration of the checkpoint that is named."""
    arch, model_type, checkpoint = (
        resolve_key(project.layers, ("model", key)) for key in ("arch", "model_type", "checkpoint")
    )
    if not isinstance(arch, str):
        text = f"missing: it needs an architecture. {did_you_mean('', zoo.model_zoo.names())}"
        raise project.error(("model", "arch"), text)
    own_yaml = own_layers("model", arch, "PRETRAINED_MODEL_CONFIG_DICT", model_type)
    packaged = own_yaml or [Layer(f"{arch}'s defaults", {})]  # a user's: its constructor has the defaults
    if arch in zoo.model_zoo:
        if model_type is None:
            types = did_you_mean("", zoo.model_zoo.types(arch))
            raise project.error(("model", "model_type"), f"missing: it needs a type of {arch}. {types}")
        try:
            packaged = zoo.model_layers(arch, str(model_type))
        except RegistryError as error:
            raise project.error(("model", "model_type"), str(error)) from None
    if not isinstance(checkpoint, str):
        return packaged
    own = [DEFAULTS, *project.layers]
    return trained_config.lay_under(packaged, own, trained_config.read(checkpoint), level=logging.INFO)


def _dataset_layers(project: Checker) -> tuple[dict[str, str], list[Layer]]:
    """Return the type of each dataset, and the layers of these types.

    A user's dataset has no layer: its builder has the defaults.
    """
    types: dict[str, str] = {}
    layers: list[Layer] = []
    for name in merge_layers(project.layers).get("datasets", {}):
        builder = _dataset_key(project, name, "builder") or name
        dataset_type = types[name] = _dataset_key(project, name, "type") or "default"
        known = zoo.dataset_zoo.types(builder)
        if known and dataset_type not in known:
            text = f"{builder} has no type {dataset_type!r}. {did_you_mean(dataset_type, known)}"
            raise project.error(("datasets", name, "type"), text)
        found = zoo.dataset_layers(name, builder, dataset_type) if known else []
        layers += found or own_layers("builder", builder, "DATASET_CONFIG_DICT", dataset_type)
    return types, layers


def own_layers(kind: str, name: str, table: str, type_name: Any) -> list[Layer]:
    """Return the layers of the YAML that a user's class names for a type in its `table`, as in LAVIS; none without one.

    The path is relative to the working folder, or else to the file of the class.
    """
    own = registry.tables[kind].items.get(name)
    tables = [vars(owner)[table] for owner in own.__mro__ if table in vars(owner)] if isinstance(own, type) else []
    path = tables[0].get(type_name) if tables else None
    if path is None:
        return []
    beside = Path(str(vars(sys.modules[own.__module__]).get("__file__", ""))).parent / path
    return load_with_bases(Path(path) if Path(path).is_file() or not beside.is_file() else beside)


def _dataset_key(project: Checker, name: str, key: str) -> str | None:
    value = resolve_key(project.layers, ("datasets", name, key))
    if not isinstance(value, str | None):
        raise project.error(("datasets", name, key), f"expected a name, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
