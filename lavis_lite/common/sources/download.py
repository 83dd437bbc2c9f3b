"""Download files once into the cache, under a lock, with resume and checksums; find local folders and hub ids.

Settings come from the environment, since they belong to the machine and not to a run:
LAVIS_LITE_CACHE (default ~/.cache/lavis_lite), LAVIS_LITE_DATA (data sets; default <cache>/datasets),
LAVIS_LITE_OFFLINE=1 (no network access), LAVIS_LITE_MIRROR="old-prefix=new-prefix[,...]" (rewrite URLs).
Note: a URL may carry its file's checksum, `https://host/x.pth#sha256=<64 hex digits>`.
"""

import base64
import difflib
import email.message
import hashlib
import http.client
import logging
import os
import re
import time
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import parse_qs, unquote, urldefrag, urlsplit
from urllib.request import Request, url2pathname, urlopen

from filelock import FileLock

from lavis_lite.common.errors import InputError, MissingFileError, UnreachableError

logger = logging.getLogger(__name__)

ATTEMPTS = 20
"""Number of requests for one file, as long as each of them brings some bytes."""
TIMEOUT = 60
"""Seconds without a byte after which a connection counts as lost."""
CHUNK = 2**20
PROGRESS = 10
"""Seconds between two lines about a download in the log."""
MAX_NAME = 100
"""Characters of a URL's file name that a cached file keeps; file systems allow 255."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LOOSE_HUB_ID = re.compile(rf"[\w-][\w.-]*|{HUB_ID.pattern}")
"""Some old repositories, such as `bert-base-uncased`, have no owner."""
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


def cache_dir() -> Path:
    """Return the folder of downloaded and generated files: $LAVIS_LITE_CACHE or ~/.cache/lavis_lite."""
    return Path(os.environ.get("LAVIS_LITE_CACHE") or Path.home() / ".cache" / "lavis_lite").expanduser()


def data_root() -> Path:
    """Return the folder of the data sets: $LAVIS_LITE_DATA or `cache_dir()/datasets`."""
    return Path(os.environ.get("LAVIS_LITE_DATA") or cache_dir() / "datasets").expanduser()


def is_offline() -> bool:
    """Return whether LAVIS_LITE_OFFLINE forbids the network."""
    return os.environ.get("LAVIS_LITE_OFFLINE", "0").lower() not in ("", "0", "false")


def is_url(source: str | Path) -> bool:
    """Return whether `source` is an http(s) address."""
    return str(source).startswith(("http://", "https://"))


def is_weight_file(source: str | Path) -> bool:
    """Return whether `source` is a URL or has a weight file's suffix; else it is a folder or a name."""
    return is_url(source) or Path(source).suffix in WEIGHT_SUFFIXES


def is_folder(source: str | Path) -> bool:
    """Return whether `source` is a folder, or is not a path on this machine and has a hub id's form: `owner/name`."""
    path = Path(source).expanduser()
    if path.exists() or is_url(source):
        return path.is_dir()
    return path.suffix not in WEIGHT_SUFFIXES and HUB_ID.fullmatch(str(source)) is not None


def local_folder(source: str | Path, *, what: str = "folder", give: str = "give a folder or a hub id") -> Path | None:
    """Return the folder on this machine, or None if `source` is a hub id: `name` or `owner/name`.

    A missing path is not taken for a hub id if it begins with `/`, `.` or `~`, has several levels, has a weight file's
    suffix, or if its first part is a folder here. `what` and `give` are the error's first and last words.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    name, path = str(source), Path(source).expanduser()
    if not name.strip():
        raise MissingFileError(f"{what} {name!r} does not exist: {give}")
    if path.is_dir():
        return path
    is_inside = path.parent != Path(".") and path.parent.is_dir()
    is_id = LOOSE_HUB_ID.fullmatch(name) and path.suffix not in WEIGHT_SUFFIXES
    if is_id and not is_inside and not path.exists():
        return None
    problem = "is a file, not a folder" if path.exists() else "does not exist"
    near = similar_names(path, only_folders=True) if is_inside else []
    listing = f" ({path.parent} has {', '.join(near)})" if near else ""
    raise MissingFileError(f"{what} {name} {problem}{listing}; relative paths start at {Path.cwd()}: {give}")


def similar_names(path: Path, *, only_folders: bool = False) -> list[str]:
    """Return the names in the path's folder that are similar to its own, or else the first ones."""
    entries = path.parent.iterdir() if path.parent.is_dir() else ()
    visible = (entry for entry in entries if not entry.name.startswith("."))
    names = sorted(entry.name for entry in visible if entry.is_dir() or not only_folders)
    return difflib.get_close_matches(path.name, names, n=3) or names[:5]


def missing_file(path: Path) -> MissingFileError:
    """Return the error about a file that is not there, with similar names in its folder."""
    near = similar_names(path)
    hint = f"{path.parent} has {', '.join(near)}" if near else f"the folder {path.parent} is empty or does not exist"
    return MissingFileError(f"no file {path} (relative paths start at {Path.cwd()}); {hint}")


def fetch_folder(source: str | Path) -> Path:
    """Return a local folder, or the folder of a hub id's weights, configuration and processors in the hub's cache.

    Raises:
        FileNotFoundError: no such folder; or it is not cached and LAVIS_LITE_OFFLINE is set.
        ConnectionError: the hub cannot be reached or has no such repository.
    """
    local = local_folder(source)
    if local is not None:
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            patterns = ["*.json", "*.txt", "*.model", weights]
            folder = Path(snapshot_download(str(source), allow_patterns=patterns, local_files_only=is_offline()))
            if any(folder.glob(weights)):
                return folder
    except LocalEntryNotFoundError as error:
        raise MissingFileError(
            f"{source} is neither a folder here nor in the hub's cache, and the hub cannot be reached"
            f"{' because LAVIS_LITE_OFFLINE is set' if is_offline() else ''}: give a local folder"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnreachableError(f"{source} is not a folder here, and the hub's answer is: {reason}") from error
    return folder


def fetch(
    source: str | Path,
    *,
    cache_dir: str | Path | None = None,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
) -> Path:
    """Return the local path of `source`: a path or file:// URL as it is; an http(s) URL is downloaded once.

    `cache_dir` is the folder to download into (default `downloads` in the cache), `size` is in bytes. A cached file is
    checked by `size` only; hashes, and the server's size and MD5, are checked after the download. A download that was
    cut off is resumed, also by the next call.

    Raises:
        FileNotFoundError: a local file is missing, or the file is not cached and LAVIS_LITE_OFFLINE is set.
        ConnectionError: the download failed.
        ValueError: the size or a hash is not as expected.
    """
    if not is_url(source):
        path = _local_path(source)
        _check(path, source=path, sha256=sha256, md5=md5, size=size)
        return path
    url, fragment = _split(str(source))
    sha256 = sha256 or _sha256_of(fragment, url=url)
    target = cached_path(url, cache_dir)
    if target.is_file() and size in (None, target.stat().st_size):
        return target
    if is_offline():
        raise MissingFileError(
            f"{url} is not in the cache and LAVIS_LITE_OFFLINE is set: put the file at {target}, or unset the variable"
        )
    _download(_mirrored(url), target, sha256=sha256, md5=md5, size=size)
    return target


_cache = cache_dir  # `fetch` has an argument of that name


def cached_path(url: str, cache_dir: str | Path | None = None) -> Path:
    """Return where `fetch` puts the file of a URL, whether or not it is there."""
    url, _ = _split(url)
    folder = Path(cache_dir or _cache() / "downloads").expanduser()
    target = folder / _cache_name(url)
    assert target.parent.resolve() == folder.resolve(), f"{url} would be cached outside {folder}: {target}"
    return target


def fetch_unlocked(url: str, target: Path) -> None:
    """Download one of many files to `target`, resumed and written aside as by `fetch`, without a lock of its own.

    The caller holds a lock on the folder. Raises as `fetch` does.
    """
    url, _ = _split(url)
    if is_offline():
        raise MissingFileError(
            f"{url} is not here and LAVIS_LITE_OFFLINE is set: unset it, or put the file at {target}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _complete(_mirrored(url), target, sha256=None, md5=None, size=None)


def _local_path(source: str | Path) -> Path:
    text = str(source)
    path = Path(url2pathname(urlsplit(text).path)) if text.startswith("file://") else Path(text).expanduser()
    if not path.exists():
        raise missing_file(path)
    return path


def _sha256_of(fragment: str, *, url: str) -> str | None:
    """Return the checksum in a URL's fragment, if there is one."""
    found = parse_qs(fragment).get("sha256", [None])[0]
    if found is not None and not re.fullmatch("[0-9a-fA-F]{64}", found):
        raise InputError(f"{url}: the checksum sha256={found} is not 64 hexadecimal digits")
    return found


def _split(source: str) -> tuple[str, str]:
    """Return a URL and its fragment. ValueError for text that is not a URL."""
    try:
        url, fragment = urldefrag(source)
        urlsplit(url)
    except ValueError as error:
        raise InputError(f"{source!r} is not a URL: {error}") from None
    if not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"{source!r} is not a URL: write spaces and characters outside ASCII as %XX")
    return url, fragment


def _cache_name(url: str) -> str:
    """Return a plain file name: eight hex digits of the URL's hash, so that different addresses never share a cached
    file, and the last component of its path, of which letters, digits, `.`, `_` and `-` are kept.

    Note: a server or a recipe chooses the URL, and `%2f..` in it would leave the cache, so it is cleaned after
    unquoting.
    """
    component = unquote(urlsplit(url).path.rstrip("/")).rsplit("/", maxsplit=1)[-1]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", component) or "index"
    stem, dot, suffix = name.rpartition(".")
    if len(name) > MAX_NAME:  # keep the suffix, which names the file's format
        name = f"{stem[: MAX_NAME - 1 - len(suffix)]}.{suffix}" if dot and len(suffix) < 20 else name[:MAX_NAME]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"


def _mirrored(url: str) -> str:
    for rule in filter(None, os.environ.get("LAVIS_LITE_MIRROR", "").split(",")):
        old, separator, new = rule.partition("=")
        if not separator or not old or not new:
            raise InputError(f"LAVIS_LITE_MIRROR: {rule!r} is not of the form old-prefix=new-prefix")
        if url.startswith(old):
            return new + url.removeprefix(old)
    return url


def _download(url: str, target: Path, *, sha256: str | None, md5: str | None, size: int | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_file() and size in (None, target.stat().st_size):
            return  # another process was faster
        _complete(url, target, sha256=sha256, md5=md5, size=size)


def _complete(url: str, target: Path, *, sha256: str | None, md5: str | None, size: int | None) -> None:
    """Download to a file beside `target`, check it and rename it; a transfer that is cut off stays, to be resumed."""
    partial = target.with_name(f".{target.name}.part")
    try:
        headers = _transfer(url, partial)
    except (OSError, http.client.HTTPException) as error:
        kept = _kept_bytes(partial)
        raise UnreachableError(
            f"cannot download {url}: {error}. "
            + (f"{kept:,} bytes are kept, and the next attempt resumes there. " if kept else "")
            + f"Put the file at {target}, or set LAVIS_LITE_MIRROR=old-prefix=new"
        ) from error
    try:
        _check(partial, source=url, sha256=sha256, md5=md5 or _published_md5(headers), size=size)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
        _tag(partial).unlink(missing_ok=True)


def _transfer(url: str, partial: Path) -> email.message.Message:
    """Download into `partial`, resumed after each interruption as long as each request brings some bytes; return the
    response's headers.
    """
    before = _kept_bytes(partial)
    for _ in range(ATTEMPTS - 1):
        try:
            return _receive(url, partial)
        except (OSError, http.client.HTTPException) as error:
            kept = _kept_bytes(partial)
            if isinstance(error, HTTPError) and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                partial.unlink()
                kept = 0
            elif kept <= before or isinstance(error, HTTPError):
                raise
            logger.warning(f"{url}: {error}; resuming at byte {kept:,}")
            before = kept
    return _receive(url, partial)


def _receive(url: str, partial: Path) -> email.message.Message:
    """Request the bytes that `partial` lacks; if the server has another version, or cannot resume, it sends all."""
    start = _kept_bytes(partial)
    request = Request(url, headers={"User-Agent": "lavis_lite"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", _tag(partial).read_text(encoding="utf-8"))
    with urlopen(request, timeout=TIMEOUT) as response:
        continues = response.status == http.client.PARTIAL_CONTENT
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if version and not version.startswith("W/"):
            _tag(partial).write_text(version, encoding="utf-8")
        else:
            _tag(partial).unlink(missing_ok=True)
        promised = response.headers.get("Content-Length")
        expected = None if promised is None else int(promised) + (start if continues else 0)
        logger.info(f"downloading {url}" + ("" if expected is None else f" ({expected / 2**20:,.1f} MiB)"))
        with partial.open("ab" if continues else "wb") as file:
            _copy(response, file, url=url, expected=expected)
        found = partial.stat().st_size
        if expected is not None and found < expected:
            raise UnreachableError(f"the connection ended after {found:,} of {expected:,} bytes")
        return response.headers


def _copy(response: Any, file: BinaryIO, *, url: str, expected: int | None) -> None:
    """Copy a response to a file; every `PROGRESS` seconds the log says how far it is."""
    begun = reported = time.monotonic()
    start = file.tell()
    while chunk := response.read(CHUNK):
        file.write(chunk)
        now = time.monotonic()
        if now - reported >= PROGRESS:
            reported, done = now, file.tell()
            rate = (done - start) / (now - begun) / 2**20
            of = "" if not expected else f" of {expected / 2**20:,.0f} MiB, {done / expected:.0%}"
            logger.info(f"{url}: {done / 2**20:,.0f}{of or ' MiB'}, {rate:,.1f} MiB/s")


def _kept_bytes(partial: Path) -> int:
    """Return the number of bytes on disk that a request can resume after."""
    return partial.stat().st_size if partial.is_file() and _tag(partial).is_file() else 0


def _tag(partial: Path) -> Path:
    """Return the path of the file with the version (ETag or date) of `partial`; without it the download restarts."""
    return partial.with_name(f"{partial.name}.tag")


def _published_md5(headers: email.message.Message) -> str | None:
    """Return the MD5 that Google's storage, where LAVIS's files lie, sends with a file."""
    for value in headers.get_all("x-goog-hash", []):
        for item in value.split(","):
            if item.strip().startswith("md5="):
                return base64.b64decode(item.strip().removeprefix("md5=")).hex()
    return None


def _check(path: Path, *, source: str | Path, sha256: str | None, md5: str | None, size: int | None) -> None:
    if size is not None and path.stat().st_size != size:
        raise InputError(
            f"{source} has {path.stat().st_size} bytes, not {size}: the file is cut short, or is another file"
        )
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected is None:
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, name).hexdigest()
        if found != expected.lower():
            raise InputError(f"{source} has {name} {found}, not {expected}: the file is damaged, or is another file")
