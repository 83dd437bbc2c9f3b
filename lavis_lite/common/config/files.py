"""YAML files and options as layers of plain dictionaries: loading, `_base_` inheritance, merging, origin of a key.

Note: inside a processor block, another `name` replaces the block instead of merging with it, since the old processor's
arguments would be unknown to the new one. A dataset without a body (`shapes_vqa:`) has its default settings; `false`
removes an inherited dataset.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import InputError, did_you_mean

KeyPath = tuple[str, ...]
MAX_BYTES = 2**20
"""Size of a YAML file; packaged ones have some thousand bytes."""
MAX_DEPTH = 32
"""Levels of mappings and lists in a YAML file or option."""
_CONVERSION = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""Errors of Python's functions with which PyYAML converts numbers and tagged values (`!!int x`), unchecked."""


class ConfigError(InputError):
    """A mistake in a configuration; the message names the file, the key and the correction."""


@dataclass(frozen=True)
class Layer:
    """One source of settings: a file, a checkpoint's configuration, or the command line's `--options`."""

    source: str
    """The file's path, or the flag of the command line (`--options`)."""
    tree: dict[str, Any]
    raw: dict[KeyPath, str] = field(default_factory=dict)
    """Values of options as typed, before YAML reads `001` as a number."""
    is_trained: bool = False
    """Whether this is the configuration that a checkpoint was trained with."""

    @property
    def is_file(self) -> bool:
        return not self.source.startswith("--")


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file as a plain dictionary, interpolations (`${...}`) unresolved.

    Raises ConfigError, naming file and line, for a missing or empty file and for invalid YAML (a repeated key too).
    """
    from omegaconf import OmegaConf

    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        beside = [*path.parent.glob("*.yaml")] if isinstance(error, FileNotFoundError) else []
        advice = f". {did_you_mean(path.name, [file.name for file in beside])}" if beside else ""
        raise ConfigError(f"{path}: cannot be read: {error.strerror}{advice}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: the file is larger than the {MAX_BYTES:,} bytes that a configuration may have")
    with reading_yaml(str(path)):
        tree = plain(OmegaConf.load(io.StringIO(content.decode("utf-8-sig"))))
        check_depth(tree)
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'run:', found {tree!r}")
    return tree


def plain(config: Any, *, resolved: bool = False) -> Any:
    """Return OmegaConf's container as dictionaries and lists; any other value as it is."""
    from omegaconf import OmegaConf

    is_container = OmegaConf.is_config(config)
    return OmegaConf.to_container(config, resolve=resolved, throw_on_missing=resolved) if is_container else config


@contextlib.contextmanager
def reading_yaml(where: str, *, has_lines: bool = True) -> Iterator[None]:
    """Turn errors of PyYAML and OmegaConf about a text into a ConfigError that begins with `where`."""
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and has_lines else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply: at most {MAX_DEPTH} levels") from None
    except (*_CONVERSION, OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise ConfigError(f"{where}: not valid YAML: {reason}") from None


def check_depth(value: Any, *, left: int = MAX_DEPTH) -> None:
    """Raise RecursionError for mappings and lists in more than `MAX_DEPTH` levels."""
    if isinstance(value, dict | list):
        if not left:
            raise RecursionError
        for item in value.values() if isinstance(value, dict) else value:
            check_depth(item, left=left - 1)


def load_with_bases(path: Path, *, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """Return the file's layers: its `_base_` files (a path or a list, relative to the file) first, itself last.

    Raises ConfigError for a missing or circular base.
    """
    here = path.resolve()
    if here in chain:
        circle = " -> ".join(str(p) for p in (*chain[chain.index(here) :], here))
        raise ConfigError(f"{path}: _base_: the files inherit in a circle: {circle}")
    tree = load_yaml(path)
    bases = tree.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: _base_: expected a path or a list of paths, got {bases!r}")
    layers: list[Layer] = []
    for base in bases:
        base_path = path.parent / base
        if not base_path.is_file():
            raise ConfigError(f"{path}: _base_: {base_path} does not exist; paths are relative to {path.parent}")
        layers += load_with_bases(base_path, chain=(*chain, here))
    return [*layers, Layer(str(path), normalise(tree, source=str(path)))]


def normalise(tree: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Return the tree with `{}` for empty sections and datasets; ConfigError for one that is not a mapping."""
    tree = dict(tree)
    for section in tree.keys() & {"model", "preprocess", "datasets", "run"}:
        tree[section] = {} if tree[section] is None else tree[section]
        if not isinstance(tree[section], dict):
            raise ConfigError(f"{source}: {section}: expected a mapping of keys to values, got {tree[section]!r}")
    for name, body in tree.get("datasets", {}).items():
        where = f"{source}: datasets.{name}"
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"{where}: expected a name of letters, digits, _ and -, which files can have")
        if body is not None and not isinstance(body, bool | dict):
            raise ConfigError(f"{where}: expected a mapping, or false to leave it out, got {body!r}")
    if "datasets" in tree:
        tree["datasets"] = {name: {} if body in (None, True) else body for name, body in tree["datasets"].items()}
    return tree


def parse_options(options: Sequence[str]) -> Layer:
    """Read `a.b=c` options (or LAVIS's `a.b c` pairs) into a layer; values are YAML, lists and mappings included."""
    from omegaconf import OmegaConf

    if options and "=" not in options[0]:
        if len(options) % 2:
            raise ConfigError(f"--options: expected key=value, or pairs of key and value, got {' '.join(options)!r}")
        options = [f"{key}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]
    tree: dict[str, Any] = {}
    raw: dict[KeyPath, str] = {}
    for option in options:
        key, equals, text = option.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"--options: expected key=value such as run.max_epoch=3, got {option!r}")
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--options: {option!r} sets a key of {part!r}, which another option sets to a value")
        with reading_yaml(f"--options: the value of {option[:100]!r} (quote a text for YAML too)", has_lines=False):
            value = plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
            check_depth(value)
        node[path[-1]] = text if text.strip() == value else value  # with its spaces, for keys that refer to this one
        raw[path] = text
    return Layer("--options", normalise(tree, source="--options"), raw)


def merge(base: dict[str, Any], over: dict[str, Any], *, inside_processor: bool = False) -> dict[str, Any]:
    """Return `base` overridden by `over`: mappings merge key by key; any other value, lists too, is replaced."""
    if inside_processor and "name" in base and "name" in over and base["name"] != over["name"]:
        return dict(over)
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            within = inside_processor or str(key).endswith("_processor")
            result[key] = merge(result[key], value, inside_processor=within)
        else:
            result[key] = value
    return result


def merge_layers(layers: Sequence[Layer]) -> dict[str, Any]:
    """Merge all layers, later ones override, and drop the datasets that are false."""
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = merge(tree, layer.tree)
    if "datasets" in tree:
        tree["datasets"] = {name: body for name, body in tree["datasets"].items() if body is not False}
    return tree


def resolve(layers: Sequence[Layer]) -> dict[str, Any]:
    """Merge all layers and resolve every `${...}`; ConfigError about a key for which that fails, or that is `???`."""
    return resolve_key(layers, ())


def resolve_key(layers: Sequence[Layer], path: KeyPath) -> Any:
    """Return the resolved value at `path` of the merged layers, or None; the other keys are not resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.create(merge_layers(layers))
        return plain(OmegaConf.select(tree, ".".join(path)) if path else tree, resolved=True)
    except OmegaConfBaseException as error:
        key = tuple(str(error.full_key or "").split("."))
        text = str(error.msg or error).strip().splitlines()[0]
        raise ConfigError(f"{origin(layers, key)}: {'.'.join(key)}: {text}") from None


def layer_of(layers: Sequence[Layer], path: KeyPath) -> Layer | None:
    """Return the last layer that sets the key at `path`.

    If none does, return the last file that sets most of the key's parents: there the key can be added.
    """
    best, depth = next((layer for layer in reversed(layers) if layer.is_file), None), 0
    for layer in layers:
        reached, node = 0, layer.tree
        for part in path:
            if not isinstance(node, dict) or part not in node:
                break
            node, reached = node[part], reached + 1
        is_set = reached == len(path) or not isinstance(node, dict)  # a list's items are not keys
        if reached >= max(depth, 1) and (is_set or layer.is_file):
            best, depth = layer, reached
    return best


def origin(layers: Sequence[Layer], path: KeyPath) -> str:
    """Return the source of `layer_of`."""
    layer = layer_of(layers, path)
    return "defaults" if layer is None else layer.source
