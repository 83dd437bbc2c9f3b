"""Checksums of weight files: detect a file that changed after it was written.

torch's zip format has a CRC-32 for each entry, which torch itself does not verify. Its legacy format has none. A
.safetensors file has one if its folder has `SHA256SUMS`, in the format of `sha256sum`.
"""

import errno
import hashlib
import logging
import re
import struct
import zipfile
import zlib
from pathlib import Path

from lavis_lite.common.errors import DamagedFileError

logger = logging.getLogger(__name__)

SUMS_FILE = "SHA256SUMS"
REMEDY = "download or copy it again, or take an older one"
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError)
"""Errors of zipfile for a damaged archive, beside OSErrors for an offset that does not exist."""


def verify(path: Path, *, as_zip: bool = False) -> None:
    """Read the whole file and compare it with its checksums, if it has any; `as_zip`: it must be a zip file.

    Raises:
        DamagedFileError: an entry fails its checksum, or the file is cut short.
    """
    if path.suffix == ".safetensors":
        _verify_sum(path)
    elif not (as_zip or _is_zip(path)) or not _verify_zip(path):  # else torch's legacy format, or not a checkpoint
        logger.info("%s holds no checksums: damage in its tensors would go unnoticed", path)


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` with the digests of the folder's .safetensors files."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.glob("*.safetensors"))]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def _is_zip(path: Path) -> bool:
    """Return whether the start or the end of the file, of which one may be lost, is that of a zip file."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return True
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # an end that contradicts itself
        return True


def _verify_zip(path: Path) -> bool:
    """Return whether a zip file has checksums, which `torch.serialization.set_crc32_options(False)` omits."""
    try:
        with zipfile.ZipFile(path) as archive:
            has_sums = any(entry.CRC for entry in archive.infolist())
            bad = archive.testzip() if has_sums else None
    except (*_BROKEN_ZIP, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        what = f"checkpoint {path} ({path.stat().st_size:,} bytes) is damaged, truncated or not a checkpoint"
        raise DamagedFileError(f"{what} ({type(error).__name__}: {error}); {REMEDY}") from error
    if bad is not None:
        raise DamagedFileError(f"checkpoint {path} is damaged: entry {bad} fails its checksum; {REMEDY}")
    return has_sums


def _verify_sum(path: Path) -> None:
    sums = path.with_name(SUMS_FILE)
    if not sums.is_file():
        return
    text = sums.read_text(encoding="utf-8", errors="replace")
    wanted = re.search(rf"^([0-9a-f]{{64}})  {re.escape(path.name)}$", text, re.MULTILINE)
    if wanted is not None and sha256(path) != wanted[1]:
        advice = f"{REMEDY}. If it was replaced on purpose, delete {sums}"
        raise DamagedFileError(f"{path} is damaged: it fails its checksum in {SUMS_FILE}; {advice}")


def sha256(path: Path) -> str:
    """Return a file's digest, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
