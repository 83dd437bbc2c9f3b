"""Fetching from a local web server: once, whole, checked, resumed, mirrored, offline."""

import base64
import hashlib
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lavis_lite.common.sources import download
from lavis_lite.models import load_model

CONTENT = b"weights" * 1000


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT under /files/; under /cut/ with a version, but never more than `server.portion` bytes at once;
    under /half/ half of it, and no version. Notes requests and their ranges on the server.
    """

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.ranges.append(self.headers["Range"])
        if not self.path.startswith(("/files/", "/half/", "/cut/")):
            self.send_error(404)
            return
        is_cut = self.path.startswith("/cut/")
        start = 0
        if is_cut and self.headers["Range"] and self.headers["If-Range"] == self.server.version:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        if is_cut:
            self.send_header("ETag", self.server.version)
        self.end_headers()
        stop = {"/file": len(CONTENT), "/half": len(CONTENT) // 2, "/cut/": start + self.server.portion}[self.path[:5]]
        self.wfile.write(CONTENT[start:stop])

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A web server on this machine, and a fresh cache."""
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    for name in ("LAVIS_LITE_OFFLINE", "LAVIS_LITE_MIRROR", "LAVIS_LITE_DATA", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.ranges, server.headers = [], [], {}
    server.version, server.portion = '"1"', 3000
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def cached(tmp_path: Path) -> list[str]:
    """Names of whole and partial files in the cache, without locks."""
    folder = tmp_path / "cache" / "downloads"
    return sorted(entry.name for entry in folder.glob("*") if not entry.name.endswith(".lock"))


def test_downloads_once_and_checks(server: Any, tmp_path: Path) -> None:
    url = f"{server.url}/files/model%20a.pth?x=1"
    md5 = hashlib.md5(CONTENT).hexdigest()
    path = download.fetch(url, md5=md5)
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-model_a.pth")
    assert path.is_relative_to(tmp_path / "cache")
    assert download.fetch(url, md5=md5) == path
    assert len(server.requests) == 1
    assert cached(tmp_path) == [path.name]


HOSTILE = [
    "x%2f..%2f..%2f..%2fsite-packages%2fzz.pth",
    "x%2F..%2F..%2F..%2Fzz.pth",
    "..%2f..%2fzz.pth",
    "%2fetc%2fzz.pth",
    "x%5c..%5c..%5czz.pth",
    "x%00.pth",
    "%2e%2e/",
    "..",
    "%",
    "%ff%fe%0a%1b[31m.pth",
    "a" * 300 + ".pth",
    "a." + "b" * 300,
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_url_is_cached_outside_the_cache(server: Any, tmp_path: Path, name: str) -> None:
    """The server and whoever writes the URL choose the name; a .pth in site-packages would be run."""
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    path = download.fetch(f"{server.url}/files/{name}")
    assert path.read_bytes() == CONTENT
    assert path.resolve().parent == (tmp_path / "cache" / "downloads").resolve()
    assert re.fullmatch(r"[0-9a-f]{8}-[A-Za-z0-9._-]{1,100}", path.name)
    assert path.suffix == ".pth" or not name.endswith(".pth")
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert download.fetch(f"{server.url}/files/{name}") == path
    assert len(server.requests) == 1


def test_a_hostile_url_through_the_library(server: Any, tmp_path: Path) -> None:
    target = tmp_path / "site-packages"
    target.mkdir()
    with pytest.raises(ValueError, match=r"zz\.pth"):
        load_model("blip_caption", "tiny", checkpoint=f"{server.url}/files/x%2f..%2f..%2f..%2fsite-packages%2fzz.pth")
    assert not list(target.iterdir())
    assert len(list((tmp_path / "cache" / "downloads").glob("*.pth"))) == 1


@pytest.mark.parametrize("url", ["http://[::1/x.pth", "http://host/a b.pth", "http://host/ä.pth", "http://host/\ud83d"])
def test_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises((ValueError, ConnectionError), match="http://"):
        download.fetch(url)


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
        ("/files/x.pth", {"md5": "0" * 32}, ValueError, "md5"),
        ("/files/x.pth#sha256=" + "0" * 64, {}, ValueError, "sha256"),
        ("/files/x.pth#sha256=12", {}, ValueError, "sha256=12 is not 64"),
        ("/absent/x.pth", {}, ConnectionError, "LAVIS_LITE_MIRROR"),
    ],
)
def test_nothing_wrong_gets_into_the_cache(
    server: Any, tmp_path: Path, path: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        download.fetch(server.url + path, **options)
    assert cached(tmp_path) == []


def test_resumes_within_a_call(server: Any, tmp_path: Path) -> None:
    path = download.fetch(f"{server.url}/cut/x.pth#sha256={hashlib.sha256(CONTENT).hexdigest()}")
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=3000-", "bytes=6000-"]
    assert cached(tmp_path) == [path.name]


def test_resumes_in_the_next_call(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    url = f"{server.url}/cut/x.pth"
    with pytest.raises(ConnectionError, match=r"3,000 of 7,000 bytes.*3,000 bytes"):
        download.fetch(url)
    assert not any(name.endswith(".pth") for name in cached(tmp_path))
    server.portion = 7000
    assert download.fetch(url).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=3000-"]


def test_another_file_at_the_same_address_starts_anew(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    url = f"{server.url}/cut/x.pth"
    with pytest.raises(ConnectionError):
        download.fetch(url)
    (partial,) = (path for path in (tmp_path / "cache" / "downloads").iterdir() if path.name.endswith(".part"))
    partial.write_bytes(b"old" * 1000)
    server.version, server.portion = '"2"', 7000
    assert download.fetch(url).read_bytes() == CONTENT


def test_a_whole_partial_file_is_fetched_again(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{server.url}/cut/x.pth"
    folder = tmp_path / "cache" / "downloads"
    folder.mkdir(parents=True)
    name = download._cache_name(url)
    (folder / f".{name}.part").write_bytes(b"x" * len(CONTENT))
    (folder / f".{name}.part.tag").write_text(server.version)
    assert download.fetch(url).read_bytes() == CONTENT
    assert cached(tmp_path) == [name]


def test_partial_file_without_version_is_not_resumed(server: Any, tmp_path: Path) -> None:
    url = f"{server.url}/half/x.pth"
    for _ in range(2):
        with pytest.raises(ConnectionError, match="3,500 of 7,000 bytes"):
            download.fetch(url)
    assert set(server.ranges) == {None}
    assert not any(name.endswith(".pth") for name in cached(tmp_path))


def test_a_checksum_in_the_url_and_one_from_the_server(server: Any, tmp_path: Path) -> None:
    url = f"{server.url}/files/x.pth"
    path = download.fetch(f"{url}#sha256={hashlib.sha256(CONTENT).hexdigest()}")
    assert download.fetch(url) == path
    right = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    server.headers = {"x-goog-hash": f"crc32c=AAAAAA==,md5={right}"}
    download.fetch(f"{server.url}/files/y.pth")
    server.headers = {"x-goog-hash": f"crc32c=AAAAAA==,md5={base64.b64encode(bytes(16)).decode()}"}
    with pytest.raises(ValueError, match="md5"):
        download.fetch(f"{server.url}/files/z.pth")
    assert len(cached(tmp_path)) == 2


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    (tmp_path / "output" / "job").mkdir(parents=True)
    assert download.is_folder("owner/some-model-2.7b")
    assert download.is_folder("output/job")
    for source in ("output/x.pth", "https://host/owner", "a/b/c", "/owner/name", "owner"):
        assert not download.is_folder(source)
    assert download.fetch_folder("output/job") == Path("output/job")
    with pytest.raises(FileNotFoundError, match="LAVIS_LITE_OFFLINE"):
        download.fetch_folder("owner/some-model-2.7b")


def test_a_hub_id_is_fetched_without_what_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, allow_patterns[-1], local_files_only))
        if allow_patterns[-1].endswith(".bin"):
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.delenv("LAVIS_LITE_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert download.fetch_folder("owner/name") == tmp_path
    assert asked == [("owner/name", "*.safetensors", False), ("owner/name", "pytorch_model*.bin", False)]


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
    assert download.fetch(str(file), md5=hashlib.md5(CONTENT).hexdigest()) == file
    assert download.fetch(file.as_uri()) == file
    with pytest.raises(ValueError, match="md5"):
        download.fetch(file, md5="0" * 32)
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


def test_the_log_has_the_progress_of_a_download(
    server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(download, "PROGRESS", 0)
    monkeypatch.setattr(download, "CHUNK", len(CONTENT) // 2)
    with caplog.at_level("INFO", logger=download.__name__):
        download.fetch(f"{server.url}/files/x.pth")
    lines = [record.getMessage() for record in caplog.records if "MiB/s" in record.getMessage()]
    assert [line.split(", ")[1] for line in lines] == ["50%", "100%"]


def test_one_of_many_files_is_fetched_without_a_lock_file(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "images/a.jpg"
    download.fetch_unlocked(f"{server.url}/files/a.jpg", target)
    assert [path.name for path in target.parent.iterdir()] == ["a.jpg"]
    assert target.read_bytes() == CONTENT
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="LAVIS_LITE_OFFLINE"):
        download.fetch_unlocked(f"{server.url}/files/b.jpg", tmp_path / "images/b.jpg")
