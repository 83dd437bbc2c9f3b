"""YAML files as layers of plain dictionaries: loading, `_base_` inheritance, merging, and which file a key came from.

Surprising: inside a processor block, another `name` replaces the block instead of being merged into it (the old
processor's arguments would be unknown to the new one); a dataset without a body (`shapes_vqa:`) means its defaults, and
`false` takes an inherited dataset out.
"""

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import InputError

KeyPath = tuple[str, ...]
MAX_BYTES = 2**20
"""Size of a YAML file; ours have some thousand bytes."""
MAX_DEPTH = 32
"""Levels of mappings and lists in a YAML file or option."""


class ConfigError(InputError):
    """A mistake in a configuration: says which file, which key, and what would be right."""


@dataclass(frozen=True)
class Layer:
    """One source of settings: a file, or the command line's `--options`."""

    source: str
    tree: dict[str, Any]
    raw: dict[KeyPath, str] = field(default_factory=dict)
    """The options' values as they were typed, before YAML read `001` as a number."""


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file as a plain dictionary, interpolations (`${...}`) left as they are.

    Raises ConfigError, naming file and line, for what is missing, empty, no mapping, or not YAML (a repeated key too).
    """
    from omegaconf import OmegaConf

    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: the file is larger than the {MAX_BYTES:,} bytes that a configuration may have")
    with reading_yaml(str(path)):
        tree = OmegaConf.to_container(OmegaConf.load(io.StringIO(content.decode("utf-8-sig"))), resolve=False)
        check_depth(tree)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'run:', found a {type(tree).__name__}")
    if not tree:
        raise ConfigError(f"{path}: the file is empty")
    return tree


@contextlib.contextmanager
def reading_yaml(where: str, *, has_lines: bool = True) -> Iterator[None]:
    """Turn what PyYAML and OmegaConf raise about a text into a ConfigError that begins with `where`."""
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and has_lines else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply: at most {MAX_DEPTH} levels") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{where}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # PyYAML converts numbers and tagged values (`!!int x`) with Python's own functions, unchecked.
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"{where}: not valid YAML: a number or tagged value cannot be converted ({type(error).__name__}: {reason})"
        ) from None


def check_depth(value: Any, *, left: int = MAX_DEPTH) -> None:
    """Raise RecursionError for mappings and lists in more than `MAX_DEPTH` levels."""
    if isinstance(value, dict | list):
        if not left:
            raise RecursionError
        for item in value.values() if isinstance(value, dict) else value:
            check_depth(item, left=left - 1)


def load_with_bases(path: Path, *, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """Return the file's layers, its `_base_` files (a path or a list, relative to the file) first.

    Raises ConfigError for a base that is missing or leads back to itself.
    """
    here = path.resolve()
    if here in chain:
        circle = " -> ".join(str(p) for p in (*chain[chain.index(here) :], here))
        raise ConfigError(f"{path}: _base_ goes round in a circle: {circle}")
    tree = load_yaml(path)
    bases = tree.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: _base_: expected a path or a list of paths, got {bases!r}")
    layers: list[Layer] = []
    for base in bases:
        base_path = path.parent / base
        if not base_path.is_file():
            raise ConfigError(
                f"{path}: _base_: there is no {base_path} (paths are relative to the file that names them)"
            )
        layers += load_with_bases(base_path, chain=(*chain, here))
    return [*layers, Layer(str(path), normalise(tree, source=str(path)))]


def normalise(tree: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Give sections and datasets without a body an empty one; raise ConfigError for one that is no mapping."""
    tree = dict(tree)
    for section in ("model", "preprocess", "datasets", "run"):
        if section not in tree:
            continue
        body = {} if tree[section] is None else tree[section]
        if not isinstance(body, dict):
            raise ConfigError(f"{source}: {section}: expected a mapping of keys to values, got {body!r}")
        tree[section] = body
    if "datasets" in tree:
        for name in tree["datasets"]:
            if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
                raise ConfigError(
                    f"{source}: datasets.{name}: results are filed under it: expected a name of letters, digits, _ "
                    f"and -, got {name!r}"
                )
        tree["datasets"] = {name: {} if body in (None, True) else body for name, body in tree["datasets"].items()}
        for name, body in tree["datasets"].items():
            if body is not False and not isinstance(body, dict):
                raise ConfigError(
                    f"{source}: datasets.{name}: expected a mapping, or false to leave it out, got {body!r}"
                )
    return tree


def parse_options(options: Sequence[str]) -> Layer:
    """Read `a.b=c` (LAVIS's `a.b c` pairs too) into a layer; values are YAML, so lists and mappings work as well."""
    if options and "=" not in options[0]:
        if len(options) % 2:
            raise ConfigError(f"--options: expected key=value, or pairs of key and value, got {' '.join(options)!r}")
        options = [f"{key}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]
    tree: dict[str, Any] = {}
    raw: dict[KeyPath, str] = {}
    for option in options:
        if any("\ud800" <= character <= "\udfff" for character in option):
            raise ConfigError(f"--options: {option!r} is not UTF-8 text")
        key, equals, text = option.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"--options: expected key=value such as run.max_epoch=3, got {option!r}")
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"--options: {option!r} sets a key inside {part!r}, which another option made a plain value"
                )
        node[path[-1]] = _parse_value(text, option=option)
        raw[path] = text
    return Layer("--options", normalise(tree, source="--options"), raw)


def _parse_value(text: str, *, option: str) -> Any:
    from omegaconf import OmegaConf

    shown = option if len(option) < 100 else f"{option[:100]}..."
    try:
        with reading_yaml(f"--options: the value of {shown!r}", has_lines=False):
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
            check_depth(value)
    except ConfigError as error:
        raise ConfigError(f"{error}; {quoting(option)}") from None
    return text if text.strip() == value else value  # with its spaces, which keys that refer to this one see too


def quoting(option: str) -> str:
    """Return how to write an option whose value is text that YAML would read as something else."""
    key, _, text = option.partition("=")
    if len(option) >= 100:
        return f"a text is quoted twice, for the shell and for YAML: '{key[:100]}=\"...\"'"
    quoted = shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")
    return f"a text is quoted twice, for the shell and for YAML: {quoted}"


def merge(base: dict[str, Any], over: dict[str, Any], *, inside_processor: bool = False) -> dict[str, Any]:
    """Return `base` with `over` laid on it: mappings are merged key by key, everything else (lists too) is replaced."""
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
    """Merge all layers, the last one winning, and drop the datasets that were set to false."""
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = merge(tree, layer.tree)
    if "datasets" in tree:
        tree["datasets"] = {name: body for name, body in tree["datasets"].items() if body is not False}
    return tree


def resolve(tree: dict[str, Any], layers: Sequence[Layer]) -> dict[str, Any]:
    """Resolve every `${...}`; ConfigError naming the key if one cannot be, or if a value was left as `???`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _unresolved(error, layers) from None


def resolve_key(tree: dict[str, Any], path: KeyPath, layers: Sequence[Layer]) -> Any:
    """Return the resolved value at `path`, or None if there is none; other keys may need what is not merged yet."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = OmegaConf.select(OmegaConf.create(tree), ".".join(path))
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise _unresolved(error, layers) from None


def _unresolved(error: Any, layers: Sequence[Layer]) -> ConfigError:
    key = tuple(str(error.full_key or "").split("."))
    text = str(error.msg or error).strip().splitlines()[0]
    return ConfigError(f"{origin(layers, key)}: {'.'.join(key)}: {text}")


def origin(layers: Sequence[Layer], path: KeyPath) -> str:
    """Return the source of the last layer that sets the key at `path`; if none does, of the one that gets nearest."""
    best, depth = layers[-1].source if layers else "defaults", 0
    for layer in layers:
        reached, node = 0, layer.tree
        for part in path:
            if not isinstance(node, dict) or part not in node:
                break
            node, reached = node[part], reached + 1
        if reached and reached >= depth:
            best, depth = layer.source, reached
    return best
