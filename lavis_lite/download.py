"""Files from elsewhere: fetched once into the cache, under a lock, checked, and never seen half.

Settings come from the environment, since they belong to the machine and not to a run:
LAVIS_LITE_CACHE (default ~/.cache/lavis_lite), LAVIS_LITE_DATA (data sets; default <cache>/datasets),
LAVIS_LITE_OFFLINE=1 (never touch the network), LAVIS_LITE_MIRROR="old-prefix=new-prefix[,...]" (rewrite URLs).
"""

import hashlib
import logging
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """The folder of everything fetched or generated: $LAVIS_LITE_CACHE or ~/.cache/lavis_lite. Not created here."""
    return _cache()


def data_root() -> Path:
    """The folder in which data sets lie: $LAVIS_LITE_DATA or `cache_dir()/datasets`. Not created here."""
    return Path(os.environ.get("LAVIS_LITE_DATA") or cache_dir() / "datasets").expanduser()


def is_url(source: str | Path) -> bool:
    """Whether `source` is an http(s) address."""
    return str(source).startswith(("http://", "https://"))


def fetch(
    source: str | Path,
    *,
    cache_dir: str | Path | None = None,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
) -> Path:
    """The local path of `source`: a path or file:// URL as it is, an http(s) URL downloaded into the cache once.

    `cache_dir` is the folder to download into (default `downloads` in the cache), `size` is in bytes. A file already
    cached is checked by `size` only; hashes are checked when it is downloaded.

    Raises:
        FileNotFoundError: a local file is missing, or the file is not cached and LAVIS_LITE_OFFLINE is set.
        ConnectionError: the download failed.
        ValueError: size or hash differ from what was expected.
    """
    if not is_url(source):
        path = _local_path(source)
        _check(path, source=path, sha256=sha256, md5=md5, size=size)
        return path
    url = str(source)
    target = Path(cache_dir or _cache() / "downloads").expanduser() / _cache_name(url)
    if target.is_file() and size in (None, target.stat().st_size):
        return target
    if is_offline():
        raise FileNotFoundError(
            f"{url} is not in the cache and LAVIS_LITE_OFFLINE is set: put the file at {target}, or unset the variable"
        )
    _download(_mirrored(url), target, sha256=sha256, md5=md5, size=size)
    return target


def is_offline() -> bool:
    """Whether LAVIS_LITE_OFFLINE forbids the network."""
    return os.environ.get("LAVIS_LITE_OFFLINE", "0").lower() not in ("", "0", "false")


def _cache() -> Path:
    return Path(os.environ.get("LAVIS_LITE_CACHE") or Path.home() / ".cache" / "lavis_lite").expanduser()


def _local_path(source: str | Path) -> Path:
    text = str(source)
    path = Path(url2pathname(urlsplit(text).path)) if text.startswith("file://") else Path(text).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no file {path} (relative paths start at {Path.cwd()})")
    return path


def _cache_name(url: str) -> str:
    """The URL's file name after eight hex digits of the URL's hash: different addresses never share a cached file."""
    name = unquote(Path(urlsplit(url).path).name) or "index"
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"


def _mirrored(url: str) -> str:
    for rule in filter(None, os.environ.get("LAVIS_LITE_MIRROR", "").split(",")):
        old, separator, new = rule.partition("=")
        if not separator or not old or not new:
            raise ValueError(f"LAVIS_LITE_MIRROR: {rule!r} is not of the form old-prefix=new-prefix")
        if url.startswith(old):
            return new + url.removeprefix(old)
    return url


def _download(url: str, target: Path, *, sha256: str | None, md5: str | None, size: int | None) -> None:
    try:
        from iopath.common.download import download
        from iopath.common.file_io import file_lock
    except ImportError as error:
        raise ImportError(
            f"downloading needs iopath: `pip install iopath`, or put {url} at {target} yourself"
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    with file_lock(str(target)):
        if target.is_file() and size in (None, target.stat().st_size):
            return  # another process was faster
        partial.unlink(missing_ok=True)
        try:
            download(url, str(target.parent), filename=partial.name, progress=False)
            _check(partial, source=url, sha256=sha256, md5=md5, size=size)
            os.replace(partial, target)
        except OSError as error:
            raise ConnectionError(
                f"cannot download {url}: {error}. Put the file at {target}, or set LAVIS_LITE_MIRROR=old-prefix=new"
            ) from error
        finally:
            partial.unlink(missing_ok=True)


def _check(path: Path, *, source: str | Path, sha256: str | None, md5: str | None, size: int | None) -> None:
    if size is not None and path.stat().st_size != size:
        raise ValueError(f"{source} has {path.stat().st_size} bytes, not {size}: the file is cut short or another one")
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected is None:
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, name).hexdigest()
        if found != expected.lower():
            raise ValueError(f"{source} has {name} {found}, not {expected}: the file is damaged or another one")
