"""Pictures that a system's packages install: where they are, and records and images made of them once.

A folder below the data root holds `<split>.json` for each split and, unless the package's own files serve, `images/`.
It is written under another name and renamed as a whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from lavis_lite.common.errors import MissingFileError, WriteError
from lavis_lite.common.records import Record

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
Splits = Mapping[str, Sequence[Record]]


def found_root(given: str, defaults: Iterable[str], needed: Sequence[str], *, name: str, advice: str) -> Path:
    """Return the folder of a package: the `given` one or the first default that has all `needed` files.

    Raises MissingFileError with how to get the package.
    """
    places = [Path(place).expanduser() for place in ([given] if given else defaults)]
    for place in places:
        if all((place / file).exists() for file in needed):
            return place
    where = " or ".join(map(str, places))
    raise MissingFileError(f"{name}: no {needed[0]} in {where}: {advice}; or name its folder in package_root")


def made_once(target: Path, make: Callable[[Path], Splits]) -> Path:
    """Return the target folder; `make` writes images into a new folder and returns the records of each split."""
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                _make(target, make)
    except OSError as error:
        raise WriteError(f"{target} could not be written: {error}") from error
    return target


def _make(target: Path, make: Callable[[Path], Splits]) -> None:
    logger.info(f"preparing {target}")
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        for split, records in make(aside).items():
            text = json.dumps(records, ensure_ascii=False)
            (aside / f"{split}.json").write_text(text, encoding="utf-8")
        aside.chmod(0o755)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def in_order(keys: Iterable[str]) -> list[str]:
    """Return different keys in an order that looks random and depends on nothing else."""
    return sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).hexdigest())


def split_of_keys(keys: Iterable[str], *, num_test: int, num_val: int) -> dict[str, str]:
    """Return the split of each key: of all in order, the first `num_test` are for testing, the next for validation."""
    bounds = ((0, "test"), (num_test, "val"), (num_test + num_val, "train"))
    return {
        key: next(name for start, name in reversed(bounds) if place >= start)
        for place, key in enumerate(in_order(keys))
    }
