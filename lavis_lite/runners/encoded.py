"""Training on stored tokens of the frozen image encoder (`model.cache_features`).

Loader workers read the tokens of batches whose images are all stored (`TokenReader`). Other batches come with pixels
and digests: the training process computes the missing tokens, once per image, and stores them (`EncoderCache`).

Letters: B images, S image tokens, E width.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lavis_lite.common import dist
from lavis_lite.common.checkpoint import write_text
from lavis_lite.common.config.agreement import model_setting
from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import SettingError
from lavis_lite.common.precision import autocast
from lavis_lite.common.sources import download
from lavis_lite.common.token_store import TokenStore, image_digests
from lavis_lite.common.transfer import pins_memory, upload
from lavis_lite.models.base import BaseModel
from lavis_lite.models.inputs import IS_ENCODED
from lavis_lite.nn.fingerprint import weights_digest

logger = logging.getLogger(__name__)

DIGESTS = "image_digests"
FORMAT = 1
"""Of the files; part of the key of a folder."""
ENCODER_KEYS = ("vit_model", "vit_type", "vit", "vit_layer_norm_epsilon", "image_size")
"""Settings of a model section that say which image encoder it has."""
Samples = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RowForm:
    """The tokens (S,E) of an image, and the folder that has them."""

    folder: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def store(self) -> TokenStore:
        """Open the folder."""
        return TokenStore(self.folder, row_bytes=self.row_bytes)

    def tokens(self, rows: Tensor) -> Tensor:
        """Return rows of bytes (B, row_bytes) as tokens (B,S,E)."""
        return rows.view(self.dtype).view(len(rows), *self.shape)

    def rows(self, tokens: Tensor) -> Tensor:
        """Return tokens (B,S,E) on the CPU as rows of bytes (B, row_bytes)."""
        return tokens.contiguous().flatten(1).view(torch.uint8)


class TokenReader:
    """Puts tokens in the place of pixels in batches whose images are all stored, and digests into all others.

    Each loader worker opens the folder for itself, at its first batch.
    """

    def __init__(self, form: RowForm) -> None:
        self.form = form
        self.opened: tuple[int, TokenStore] | None = None

    @property
    def store(self) -> TokenStore:
        """The folder, as this process has opened it."""
        if self.opened is None or self.opened[0] != os.getpid():
            self.opened = os.getpid(), self.form.store()
        return self.opened[1]

    def __call__(self, samples: Samples) -> Samples:
        """Return the batch with `image` (B,S,E) and `image_is_encoded`, or with `image_digests` besides the pixels."""
        digests = image_digests(samples["image"])
        if self.store.has_all(digests):
            rows = torch.empty(len(digests), self.form.row_bytes, dtype=torch.uint8)
            if all(self.store.read(digests, rows.numpy())):
                return {**samples, "image": self.form.tokens(rows), IS_ENCODED: True}
        return {**samples, DIGESTS: digests}

    def __getstate__(self) -> dict[str, Any]:
        return {"form": self.form, "opened": None}


class EncoderCache:
    """Computes the tokens that are not stored yet, and stores them; a context, whose end writes the last.

    On an accelerator the tokens of a batch are written when the next one comes: they are copied meanwhile.
    """

    def __init__(self, model: BaseModel, form: RowForm) -> None:
        self.model, self.form, self.store = model, form, form.store()
        self.read_batch = TokenReader(form)
        """The change of a batch in the loader workers."""
        self.num_encoded = 0
        """Images that went through the encoder."""
        self.pending: tuple[Sequence[bytes], Tensor, Any] | None = None
        logger.info(f"model.cache_features: {len(self.store):,} images have their tokens in {form.folder}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()
        self.store.close()
        logger.info(f"model.cache_features: {self.num_encoded:,} images were encoded (by this process)")

    def fill(self, samples: Samples) -> Samples:
        """Return the batch with `image` (B,S,E), the tokens of the frozen encoder; pixels are encoded once per image.

        Raises:
            WriteError: tokens cannot be stored.
        """
        self.flush()
        if DIGESTS not in samples:
            return samples
        digests, image = samples.pop(DIGESTS), samples["image"]
        return {**samples, "image": self._tokens(digests, image), IS_ENCODED: True}

    def _tokens(self, digests: Sequence[bytes], image: Tensor) -> Tensor:
        rows = torch.empty(len(digests), self.form.row_bytes, dtype=torch.uint8)
        is_stored = self.store.read(digests, rows.numpy())
        missing = {digest: row for row, digest in reversed(list(enumerate(digests))) if not is_stored[row]}
        if len(missing) == len(digests):
            return self._encoded(digests, image)
        tokens = upload(self.form.tokens(rows), image.device)
        if missing:
            first = upload(torch.tensor(list(missing.values())), image.device)
            encoded = self._encoded(list(missing), image[first])
            numbers = {digest: number for number, digest in enumerate(missing)}
            absent = [(row, numbers[digest]) for row, digest in enumerate(digests) if digest in missing]
            to, of = upload(torch.tensor(absent), image.device).unbind(1)
            tokens[to] = encoded[of]
        return tokens

    @torch.no_grad()
    def _encoded(self, digests: Sequence[bytes], image: Tensor) -> Tensor:
        """Return the tokens of images that have different digests, and store them."""
        tokens = self.model.encoder_tokens(image)
        assert (*tokens.shape[1:], tokens.dtype) == (*self.form.shape, self.form.dtype), (tokens.shape, self.form)
        self.num_encoded += len(digests)
        if pins_memory(tokens.device):
            copy = tokens.to("cpu", non_blocking=True)  # torch pins its memory
            copied = torch.get_device_module(tokens.device).Event()
            copied.record()
            self.pending = digests, copy, copied
        else:
            self.pending = digests, tokens, None
            self.flush()
        return tokens

    def flush(self) -> None:
        """Write the tokens of the last batch."""
        pending, self.pending = self.pending, None
        if pending is not None:
            digests, tokens, copied = pending
            if copied is not None:
                copied.synchronize()
            self.store.add(digests, self.form.rows(tokens).numpy())


def open_cache(cfg: Config, model: BaseModel, *, device: torch.device, dtype: torch.dtype) -> EncoderCache | None:
    """Return the cache if `model.cache_features` asks for one; must be entered by every rank, with the weights loaded.

    `dtype` is the run's autocast type.

    Raises:
        InputError: the model has no frozen image encoder whose tokens could be kept.
        WriteError: the folder cannot be written.
    """
    root = cache_root(cfg.model.get("cache_features"))
    if root is None:
        return None
    if not isinstance(model, BaseModel):
        problem = f"{type(model).__name__} does not derive from BaseModel, which says how to encode; leave it out"
        raise SettingError("model.cache_features", problem)
    encoder = model.frozen_encoder().eval()
    shape, kind = row_form(model, size=model_setting(cfg.model, "image_size"), device=device, dtype=dtype)
    about = {**describe(cfg, encoder, dtype=dtype), "tokens": list(shape), "dtype": str(kind)}
    about["weights"] = dist.on_main(lambda: weights_digest(encoder.state_dict()))
    text = json.dumps(about, indent=2, sort_keys=True, default=str)
    folder = root / hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    dist.on_main(lambda: write_text(folder / "about.json", text + "\n") and None)
    return EncoderCache(model, RowForm(folder=folder, shape=shape, dtype=kind))


def cache_root(setting: str | bool | None) -> Path | None:
    """Return the folder that `model.cache_features` names: `tokens` in the cache for true, None for none."""
    if setting is True:
        return download.cache_dir() / "tokens"
    if isinstance(setting, str) and not setting.strip():
        raise SettingError("model.cache_features", f"must name a folder, or be true or false, got {setting!r}")
    return Path(setting).expanduser() if setting else None


def describe(cfg: Config, encoder: nn.Module, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return what tokens depend on besides pixels and weights; transforms are named too, so that each has a folder."""
    transforms = [(body.get("vis_processor") or {}).get("train") for body in cfg.datasets.values()]
    return {
        "format": FORMAT,
        "encoder": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
        "settings": {key: model_setting(cfg.model, key) for key in ENCODER_KEYS},
        "precision": str(dtype),
        "transforms": sorted({json.dumps(one, sort_keys=True, default=str) for one in transforms}),
    }


@torch.no_grad()
def row_form(
    model: BaseModel, *, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape (S,E) and type of an image's tokens; on the meta device without computing."""
    with autocast(device, dtype) if device.type != "meta" else torch.no_grad():
        tokens = model.encoder_tokens(torch.zeros(1, 3, size, size, device=device))
    return tuple(tokens.shape[1:]), tokens.dtype
