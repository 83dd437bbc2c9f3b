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
import shutil
from pathlib import Path
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
MAX_NAME = 100
"""Last characters of a URL's file name that a cached file keeps; file systems allow 255."""
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
    """Whether LAVIS_LITE_OFFLINE forbids the network."""
    return os.environ.get("LAVIS_LITE_OFFLINE", "0").lower() not in ("", "0", "false")


def is_url(source: str | Path) -> bool:
    """Whether `source` is an http(s) address."""
    return str(source).startswith(("http://", "https://"))


def is_weight_file(source: str | Path) -> bool:
    """Whether `source` is a URL or has a weight file's suffix; else it is a folder or a name."""
    return is_url(source) or Path(source).suffix in WEIGHT_SUFFIXES


def is_folder(source: str | Path) -> bool:
    """Whether `source` is a folder, or is not a path on this machine and has a hub id's form: `owner/name`."""
    path = Path(source).expanduser()
    if path.exists() or is_url(source):
        return path.is_dir()
    return path.suffix not in WEIGHT_SUFFIXES and HUB_ID.fullmatch(str(source)) is not None


def local_folder(source: str | Path, *, what: str = "folder", give: str = "give a folder or a hub id") -> Path | None:
    """Return the folder on this machine, or None if `source` is a hub id: `name` or `owner/name`.

    A missing path is not taken for a hub id if it begins with `/`, `.` or `~`, has several levels, has a weight file's
    suffix, or if its first part is a folder here. `what` and `give` are the error's first and last words.

    Raises:
        FileNotFoundError: there is no such folder.
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
    raise MissingFileError(f"{what} {name} {problem}; relative paths start at {Path.cwd()}: {give}")


def missing_file(path: Path) -> MissingFileError:
    """Return the error about a file that is not there, with similar names in its folder."""
    names = sorted(entry.name for entry in path.parent.glob("[!.]*"))
    near = difflib.get_close_matches(path.name, names, n=3) or names[:5]
    hint = f"did you mean {', '.join(near)}?" if near else f"the folder {path.parent} is empty or does not exist"
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
        reason = " because LAVIS_LITE_OFFLINE is set" if is_offline() else ""
        problem = f"is neither a folder here nor in the hub's cache, and the hub cannot be reached{reason}"
        raise MissingFileError(f"{source} {problem}: give a local folder") from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnreachableError(f"{source} is not a folder here, and the hub's answer is: {reason}") from error
    return folder


def fetch(source: str | Path, *, md5: str | None = None) -> Path:
    """Return the local path of `source`: a path or file:// URL as it is; an http(s) URL is downloaded once.

    Hashes (`md5`, the URL's SHA-256, the server's MD5) and the server's size are checked after the download, not of a
    file that is cached already. A download that was cut off is resumed, also by the next call.

    Raises:
        FileNotFoundError: a local file is missing, or the file is not cached and LAVIS_LITE_OFFLINE is set.
        ConnectionError: the download failed.
        ValueError: a hash is not as expected, or this is not a URL.
    """
    text = str(source)
    if not is_url(text):
        path = Path(url2pathname(urlsplit(text).path)) if text.startswith("file://") else Path(text).expanduser()
        if not path.exists():
            raise missing_file(path)
        _check(path, source=path, md5=md5)
        return path
    try:
        url, fragment = urldefrag(text)
        target = cache_dir() / "downloads" / _cache_name(url)
    except ValueError as error:
        raise InputError(f"{text!r} is not a URL: {error}") from None
    if target.is_file():
        return target
    if is_offline():
        raise MissingFileError(
            f"{url} is not in the cache and LAVIS_LITE_OFFLINE is set: put the file at {target}, or unset the variable"
        )
    _download(_mirrored(url), target, sha256=parse_qs(fragment).get("sha256", [None])[0], md5=md5)
    return target


def _cache_name(url: str) -> str:
    """Return a plain file name: eight hex digits of the URL's hash, so that different addresses never share a cached
    file, and the last component of its path, of which letters, digits, `.`, `_` and `-` are kept.

    Note: a server or a recipe chooses the URL, and `%2f..` in it would leave the cache, so it is cleaned after
    unquoting.

    Raises:
        ValueError: this is not a URL of ASCII characters.
    """
    component = unquote(urlsplit(url).path.rstrip("/")).rsplit("/", maxsplit=1)[-1]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", component)[-MAX_NAME:] or "index"
    return f"{hashlib.sha256(url.encode('ascii')).hexdigest()[:8]}-{name}"


def _mirrored(url: str) -> str:
    for rule in filter(None, os.environ.get("LAVIS_LITE_MIRROR", "").split(",")):
        old, _, new = rule.partition("=")
        if not old or not new:
            raise InputError(f"LAVIS_LITE_MIRROR: {rule!r} is not of the form old-prefix=new-prefix")
        if url.startswith(old):
            return new + url.removeprefix(old)
    return url


def _download(url: str, target: Path, *, sha256: str | None, md5: str | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    with FileLock(f"{target}.lock"):
        if target.is_file():
            return  # another process was faster
        try:
            headers = _transfer(url, partial)
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(
                f"cannot download {url}: {error}. {_kept_bytes(partial):,} bytes are kept for the next attempt; or put "
                f"the file at {target}, or set LAVIS_LITE_MIRROR=old-prefix=new"
            ) from error
        try:
            published = re.search(r"md5=([\w+/=]+)", ",".join(headers.get_all("x-goog-hash", [])))  # Google's storage
            md5 = md5 or (base64.b64decode(published[1]).hex() if published else None)
            _check(partial, source=url, sha256=sha256, md5=md5)
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
            shutil.copyfileobj(response, file, CHUNK)
        found = partial.stat().st_size
        if expected is not None and found < expected:
            raise UnreachableError(f"the connection ended after {found:,} of {expected:,} bytes")
        return response.headers


def _kept_bytes(partial: Path) -> int:
    """Return the number of bytes on disk that a request can resume after."""
    return partial.stat().st_size if partial.is_file() and _tag(partial).is_file() else 0


def _tag(partial: Path) -> Path:
    """Return the path of the file with the version (ETag or date) of `partial`; without it the download restarts."""
    return partial.with_name(f"{partial.name}.tag")


def _check(path: Path, *, source: str | Path, **hashes: str | None) -> None:
    for name, expected in hashes.items():
        if expected is None:
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, name).hexdigest()
        if found != expected.lower():
            raise InputError(f"{source} has {name} {found}, not {expected}: the file is damaged, or is another file")
