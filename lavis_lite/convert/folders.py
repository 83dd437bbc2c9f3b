"""Write a model as a Hugging Face folder or as a LAVIS file.

Note: transformers' class is built on the meta device and given the model's tensors, so it selects its own and writes
them itself. Tensors that it has no place for (momentum encoders, queues, temperature, the Q-Former's language head) go
to `lavis_lite.safetensors`, architecture and settings to `lavis_lite.json`, so that nothing is lost; transformers reads
neither.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lite.common import checkpoint, integrity
from lavis_lite.common.disk import is_full, why_unwritable
from lavis_lite.common.errors import ExistingFileError, InputError, WriteError
from lavis_lite.common.sources.folders import EXTRA_FILE, SETTINGS_FILE
from lavis_lite.convert.card import Origin, card
from lavis_lite.models.base import BaseModel
from lavis_lite.models.hf import HFAdapter, transformers_class
from lavis_lite.nn import lora

logger = logging.getLogger(__name__)


def write_folder(
    model: BaseModel,
    target: str | Path,
    *,
    arch: str,
    settings: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    origin: Origin | None = None,
) -> Path:
    """Write a model, in its precision, as a folder that transformers' `from_pretrained` and ours load.

    `settings` are constructor arguments that config.json has no place for (prompt, lengths), `preprocess` the
    processors. Adapters (LoRA) are merged, in the folder and not in `model`; if `adapter` names a second folder, those
    of the language model are written there in peft's format instead. With `origin` the folder has a model card.

    Raises:
        FileExistsError: the target exists and `overwrite` is not set.
        ValueError: transformers has no class for the architecture or the sizes, or the model has no adapter to write.
    """
    target = check_target(target, overwrite=overwrite)
    if adapter is not None:
        adapter = check_target(adapter, overwrite=overwrite)
        if model.llm_prefix is None or not lora.has_adapters(model.get_submodule(f"{model.llm_prefix}_model")):
            raise InputError("the model has no adapters to write: it was trained without llm_lora")
    hf = adapter_of(model, arch=arch)
    config = hf.config(model, arch=arch)
    processor = hf.processor(model, config)
    own = lora.plain_state_dict(model, keep=None if adapter is None else f"{model.llm_prefix}_model.")
    if lora.unties(model, own):
        config.text_config.tie_word_embeddings = False
    theirs = hf_model(model, config, own, arch=arch)
    with _replacing(target) as folder:
        theirs.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        for name, tokenizer in hf.tokenizers(model).items():
            tokenizer.save_pretrained(folder / name)
        write_extras(own, hf.from_hf(theirs.state_dict(), model).keys(), folder / EXTRA_FILE)
        stored = {"arch": arch, "settings": dict(settings or {}), "preprocess": dict(preprocess or {})}
        (folder / SETTINGS_FILE).write_text(f"{json.dumps(stored, indent=2)}\n", encoding="utf-8")
        if origin is not None:
            text = card(target.name, arch=arch, hf_class=type(theirs).__name__, origin=origin)
            (folder / "README.md").write_text(text, encoding="utf-8")
    if adapter is not None:
        llm = model.get_submodule(f"{model.llm_prefix}_model")
        with _replacing(adapter) as folder:
            lora.write_adapter(llm, folder, num_tokens=config.text_config.vocab_size)
        logger.info(f"the adapters (LoRA) were written to {adapter}")
    elif lora.has_adapters(model):
        language = model if model.llm_prefix is None else model.get_submodule(f"{model.llm_prefix}_model")
        owner = "language model" if model.llm_prefix and lora.has_adapters(language) else "model"
        logger.info(f"the adapters (LoRA) were merged into the {owner}")
    logger.info(f"{type(theirs).__name__} written to {target}")
    return target


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a new folder that, with its checksums, replaces `target` unless an error is raised inside.

    Note: safetensors makes its files private; all files get the usual mode, which follows the umask.

    Raises:
        WriteError: the disk is full; what is there stays as it is.
    """
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        integrity.write_sums(partial)
        mode = (partial / integrity.SUMS_FILE).stat().st_mode
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        if target.exists():
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        os.replace(partial, target)
    except Exception as error:  # safetensors and tokenizers raise their own, with the system's words
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:  # the innermost first; each holds the one before it only
            with contextlib.suppress(FileNotFoundError):
                parent.rmdir()
        if not is_full(error):
            raise
        why = why_unwritable(target.parent, error)
        left = "what was there is unchanged" if target.exists() else "nothing was left there"
        raise WriteError(
            errno.ENOSPC,
            f"cannot write the folder {target}: {why}; {left}. Free some space, or name a target on another disk",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_checkpoint(
    model: BaseModel,
    target: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    trainable_only: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a model as a `.pth` file that LAVIS loads, adapters (LoRA) merged.

    `trainable_only` leaves out the frozen parts that have their own source, as LAVIS's files do. `config` has the
    sections `model` and `preprocess` that the model was trained with.

    Raises:
        FileExistsError: the file exists and `overwrite` is not set.
        ValueError: `trainable_only` for a model with adapters, whose language model differs from its source.
    """
    target = check_target(target, overwrite=overwrite)
    if not trainable_only:
        state = {name: tensor.detach() for name, tensor in lora.plain_state_dict(model).items()}
    elif lora.has_adapters(model):
        raise InputError("a file of the trainable parts only has no adapters (LoRA): write the whole model")
    else:
        state = model.checkpoint_state_dict()
    return checkpoint.save({"model": state} | ({} if config is None else {"config": config}), target)


def check_target(target: str | Path, *, overwrite: bool) -> Path:
    """Return the path to write to. FileExistsError if it exists and must not be replaced."""
    target = Path(target).expanduser()
    if target.exists() and not overwrite:
        raise ExistingFileError(f"{target} exists: choose another target, or overwrite it (--overwrite)")
    return target


def adapter_of(model: BaseModel | type[BaseModel], *, arch: str) -> HFAdapter[Any]:
    """Return the adapter of a model or its class. ValueError if transformers has no class for the architecture."""
    if model.hf is None:
        raise InputError(f"transformers has no class for {arch}: keep the model as a .pth file")
    return model.hf


def hf_model(model: BaseModel, config: Any, own: Mapping[str, Tensor], *, arch: str) -> Any:
    """Return transformers' model of this configuration with our tensors, shared and not copied. ValueError if it has
    other sizes.
    """
    hf = adapter_of(model, arch=arch)
    name = hf.hf_class(arch, model)
    with torch.device("meta"):
        theirs = transformers_class(name)(config)
    given = dict(hf.to_hf(own, model, config))
    wanted = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    wrong = [key for key, shape in wanted.items() if key not in given or given[key].shape != shape]
    if wrong:
        shapes = ", ".join(f"{key} {tuple(wanted[key])}" for key in wrong[:3])
        problem = f"{len(wrong)} tensors that this model lacks or has in another shape: {shapes}"
        raise InputError(f"{name} of these sizes has {problem}. Keep the model as a .pth file")
    views = {  # loading unfreezes the parameters that it is given
        id(tensor): nn.Parameter(tensor.detach(), False) if isinstance(tensor, nn.Parameter) else tensor
        for tensor in given.values()
    }
    theirs.load_state_dict({key: views[id(given[key])] for key in wanted}, assign=True)
    return theirs


def write_extras(own: Mapping[str, Tensor], covered: Collection[str], path: Path) -> None:
    """Write the tensors that are not `covered`; aliases and position_ids are skipped."""
    from safetensors.torch import save_file

    written = {id(tensor) for name, tensor in own.items() if name in covered}
    extras: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if id(tensor) not in written and not name.endswith("position_ids"):
            written.add(id(tensor))
            extras[name] = tensor.detach().contiguous()
    if extras:
        save_file(extras, path, metadata={"format": "pt"})
