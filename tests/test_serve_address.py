"""`lavis-lite serve`: an address that another program takes while the model is loaded."""

import socket
from collections.abc import Iterator

import pytest
from ports import free_port
from typer.testing import CliRunner

from lavis_lite.cli.app import app
from lavis_lite.inference import loading


@pytest.fixture
def other() -> Iterator[socket.socket]:
    """A socket of another program, not bound yet."""
    with socket.socket() as taken:
        yield taken


def test_a_port_that_is_taken_meanwhile_is_a_users_mistake(
    other: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, load = free_port(), loading.load

    def loads_slowly(model: str, **options: object) -> loading.Loaded:
        other.bind(("127.0.0.1", port))
        other.listen()
        return load(model, device="cpu")

    monkeypatch.setattr(loading, "load", loads_slowly)
    result = CliRunner().invoke(app, ["serve", "--model", "blip_vqa/tiny", "--port", str(port)])
    assert result.exit_code == 2, result.output
    assert f"--port {port}: no server can be started there" in result.output
