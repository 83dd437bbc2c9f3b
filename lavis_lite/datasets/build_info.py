"""The keys of `build_info`: where the files of a dataset are. `storage.py` reads them."""

from __future__ import annotations

from typing import Any, TypedDict


class AnnotationFiles(TypedDict, total=False):
    """The annotation files of one split; lists have one entry per file."""

    url: str | list[str] | None
    md5: str | list[str] | None
    storage: str | list[str] | None
    num_samples: int | None
    images: str | None


class VisualFolder(TypedDict, total=False):
    """The folder that the records' paths of images or videos start from."""

    storage: str | None
    archives: dict[str, Any] | None
    listed: dict[str, Any] | None
    needed: dict[str, list[str]] | None


class BuildInfo(TypedDict, total=False):
    """Places of a dataset's files."""

    annotations: dict[str, AnnotationFiles | None] | None
    images: VisualFolder | None
    videos: VisualFolder | None
    homepage: str | None
    licence: str | None
    instance_id_key: str | None
