"""Fetching from a local web server: once, whole, checked, mirrored, offline."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lavis_lite import download

CONTENT = b"weights" * 1000


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT under /files/, half of it under /half/; counts requests on the server."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if not self.path.startswith(("/files/", "/half/")):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path.startswith("/files/") else CONTENT[: len(CONTENT) // 2])

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A web server on this machine, and a fresh cache."""
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    for name in ("LAVIS_LITE_OFFLINE", "LAVIS_LITE_MIRROR", "LAVIS_LITE_DATA", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def cached(tmp_path: Path) -> list[str]:
    """Names of whole and partial files in the cache, without locks."""
    folder = tmp_path / "cache" / "downloads"
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock"))


def test_downloads_once_and_checks(server: Any, tmp_path: Path) -> None:
    url = f"{server.url}/files/model%20a.pth?x=1"
    sums = {
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "md5": hashlib.md5(CONTENT).hexdigest(),
        "size": len(CONTENT),
    }
    path = download.fetch(url, **sums)
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-model a.pth")
    assert path.is_relative_to(tmp_path / "cache")
    assert download.fetch(url, **sums) == path
    assert len(server.requests) == 1
    assert cached(tmp_path) == [path.name]


def test_same_name_elsewhere_is_another_file(server: Any) -> None:
    assert download.fetch(f"{server.url}/files/a/x.pth") != download.fetch(f"{server.url}/files/b/x.pth")


def test_many_at_once_download_once(server: Any) -> None:
    url = f"{server.url}/files/x.pth"
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: download.fetch(url), range(8)))
    assert [path.read_bytes() for path in paths] == [CONTENT]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("path", "options", "error", "text"),
    [
        ("/files/x.pth", {"sha256": "0" * 64}, ValueError, "sha256"),
        ("/files/x.pth", {"md5": "0" * 32}, ValueError, "md5"),
        ("/files/x.pth", {"size": 5}, ValueError, "7000 bytes, not 5"),
        ("/half/x.pth", {}, ConnectionError, "x.pth"),
        ("/absent/x.pth", {}, ConnectionError, "LAVIS_LITE_MIRROR"),
    ],
)
def test_nothing_wrong_gets_into_the_cache(
    server: Any, tmp_path: Path, path: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        download.fetch(server.url + path, **options)
    assert cached(tmp_path) == []


def test_offline(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{server.url}/files/x.pth"
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"put the file at .*x\.pth") as caught:
        download.fetch(url)
    assert server.requests == []
    place = Path(str(caught.value).split("put the file at ")[1].split(", or unset")[0])
    place.parent.mkdir(parents=True)
    place.write_bytes(b"by hand")
    assert download.fetch(url) == place


def test_mirror(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "LAVIS_LITE_MIRROR", f"https://gone.example/=http://x/,https://dead.example/a={server.url}/files"
    )
    assert download.fetch("https://dead.example/a/x.pth").read_bytes() == CONTENT
    assert server.requests == ["/files/x.pth"]
    monkeypatch.setenv("LAVIS_LITE_MIRROR", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        download.fetch("https://dead.example/a/y.pth")


def test_local_files_pass_through(tmp_path: Path) -> None:
    file = tmp_path / "a file.pth"
    file.write_bytes(CONTENT)
    assert download.fetch(file) == file
    assert download.fetch(str(file), size=len(CONTENT)) == file
    assert download.fetch(file.as_uri()) == file
    with pytest.raises(ValueError, match="sha256"):
        download.fetch(file, sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        download.fetch(tmp_path / "absent.pth")


def test_roots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path))
    monkeypatch.delenv("LAVIS_LITE_DATA", raising=False)
    assert download.cache_dir() == tmp_path
    assert download.data_root() == tmp_path / "datasets"
    monkeypatch.setenv("LAVIS_LITE_DATA", str(tmp_path / "data"))
    assert download.data_root() == tmp_path / "data"
    monkeypatch.delenv("LAVIS_LITE_CACHE")
    assert download.cache_dir() == Path.home() / ".cache" / "lavis_lite"
