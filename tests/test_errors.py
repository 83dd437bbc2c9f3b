"""One base class for what a user can correct: only that becomes a single line, everything else keeps its traceback."""

import ast
import errno
from pathlib import Path

import pytest

import lavis_lite
from lavis_lite.cli import failures
from lavis_lite.common import errors
from lavis_lite.common.config.config import ConfigError

PACKAGE = Path(lavis_lite.__file__).parent
BUILT_IN = {
    "ValueError",
    "TypeError",
    "KeyError",
    "FileNotFoundError",
    "OSError",
    "ImportError",
    "ConnectionError",
    "FileExistsError",
}


def raised_names(path: Path) -> set[str]:
    """Names of the classes that the file's raise statements call."""
    calls = [node.exc for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Raise)]
    return {call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_deliberate_errors_derive_from_user_error(path: Path):
    assert raised_names(path) & BUILT_IN == set()


def failing(error: Exception):
    def execute() -> None:
        raise error

    return execute


@pytest.mark.parametrize(
    "error",
    [errors.InputError("a"), errors.MissingFileError("a"), errors.UnknownNameError("a"), OSError(errno.ENOSPC, "a")],
)
def test_what_the_user_can_correct_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]):
    assert failures.exit_code(failing(error)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a"), KeyError("a"), TypeError("a"), OSError("a"), ZeroDivisionError()])
def test_anything_else_keeps_its_traceback(error: Exception):
    with pytest.raises(type(error)):
        failures.exit_code(failing(error))


def test_errors_are_also_the_built_in_ones():
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.MissingFileError, FileNotFoundError)
    assert str(errors.UnknownNameError("no model 'x'")) == "no model 'x'"
    assert issubclass(ConfigError, errors.UserError)
