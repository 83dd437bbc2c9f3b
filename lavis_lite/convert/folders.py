"""A model of ours as a Hugging Face folder, and such a folder as a LAVIS file.

Surprising: transformers' class is built without memory and given our tensors, so that it says which belong to it and
writes them itself. What it has no place for (momentum twins, queues, temperature, the Q-Former's language head) lies
beside its files in `lavis_lite.safetensors`, and our architecture and settings in `lavis_lite.json`, so that nothing is
lost; transformers reads neither.
"""

import copy
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lite.common import checkpoint, integrity
from lavis_lite.common.errors import ExistingFileError, InputError, MissingFileError
from lavis_lite.common.sources.hub import read_json_mapping
from lavis_lite.common.sources.weights import EXTRA_FILE, LazyState
from lavis_lite.convert.blip import blip_from_hf, blip_to_hf
from lavis_lite.convert.blip2 import VOCABULARIES, blip2_from_hf, blip2_to_hf
from lavis_lite.convert.configs import QFORMER_TOKENIZER, hf_class_of, hf_config
from lavis_lite.nn import lora

logger = logging.getLogger(__name__)

SETTINGS_FILE = "lavis_lite.json"
IMAGE_TOKEN = "<image>"


def write_folder(
    model: nn.Module,
    target: str | Path,
    *,
    arch: str,
    settings: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a model, in its precision, as a folder that transformers' `from_pretrained` and ours load.

    `settings` are constructor arguments that config.json has no place for (prompt, lengths), `preprocess` the
    processors. Adapters of the language model (LoRA) are merged into it, in the folder and not in `model`; with
    `adapter`, a second folder, they are written there as peft reads them.

    Raises:
        FileExistsError: a folder is there and `overwrite` is not set.
        ValueError: transformers has no class for the architecture or the sizes, or there is no adapter to write.
    """
    target = check_target(target, overwrite=overwrite)
    if adapter is not None:
        adapter = check_target(adapter, overwrite=overwrite)
        if not lora.has_adapters(model):
            raise InputError("the model has no adapters to write: it was trained without llm_lora")
    config = hf_config(model, arch=arch)
    processor = build_processor(model, config)
    own = lora.plain_state_dict(model, merge=adapter is None)
    if lora.unties(model, own):
        config.text_config.tie_word_embeddings = False
    twin = hf_model(model, config, own, arch=arch)
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        twin.save_pretrained(partial, max_shard_size=max_shard_size)
        processor.save_pretrained(partial)
        if getattr(model, "llm_prefix", None) is not None:
            model.tokenizer.save_pretrained(partial / QFORMER_TOKENIZER)
        write_extras(own, from_hf(twin.state_dict(), model).keys(), partial / EXTRA_FILE)
        stored = {"arch": arch, "settings": dict(settings or {}), "preprocess": dict(preprocess or {})}
        (partial / SETTINGS_FILE).write_text(f"{json.dumps(stored, indent=2)}\n", encoding="utf-8")
        integrity.write_sums(partial)
        _put(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if adapter is not None:
        write_adapter(model, adapter, num_tokens=config.text_config.vocab_size)
    elif lora.has_adapters(model):
        logger.info("the adapters (LoRA) were merged into the language model")
    logger.info(f"{type(twin).__name__} written to {target}")
    return target


def write_adapter(model: nn.Module, target: Path, *, num_tokens: int) -> None:
    """Write the adapters of a model's language model as a folder that peft reads, in place of what is there."""
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        lora.write_adapter(model.lm.model, partial, num_tokens=num_tokens)
        integrity.write_sums(partial)
        _put(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info(f"the adapters (LoRA) were written to {target}")


def _put(partial: Path, target: Path) -> None:
    """Replace the target by a folder, whose files others may read as the umask says; safetensors keeps them private."""
    usual = partial / ".mode"
    usual.touch()
    mode = usual.stat().st_mode
    usual.unlink()
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(mode)
    if target.exists():
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    os.replace(partial, target)


def write_checkpoint(
    model: nn.Module,
    target: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    trainable_only: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a model as a `.pth` file that LAVIS loads, adapters (LoRA) merged; `trainable_only` leaves out the frozen
    parts that have a source of their own, as LAVIS's files do. `config` has the sections `model` and `preprocess` that
    the file says it was trained as.

    Raises FileExistsError if the file is there and `overwrite` is not set, ValueError for `trainable_only` of a model
    with adapters, whose language model is not the source's any more.
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
    """The path to write to. FileExistsError if something is there and must not be replaced."""
    target = Path(target).expanduser()
    if target.exists() and not overwrite:
        raise ExistingFileError(f"{target} exists: choose another target, or overwrite it (--overwrite)")
    return target


def read_settings(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The architecture that `write_folder` left in a folder, and the sections `model` and `preprocess`, or none.
    ValueError for a damaged file.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None, {"model": {}, "preprocess": {}}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["arch"], {"model": dict(stored["settings"]), "preprocess": dict(stored.get("preprocess") or {})}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): delete it to do without") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. FileNotFoundError or ValueError if there is none that can be read."""
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{folder} holds no config.json, which says what its weights are of")
    return read_json_mapping(path)


def read_image_settings(folder: Path, image_size: int) -> dict[str, Any]:
    """Return `mean` and `std` as a folder's preprocessor_config.json or processor_config.json gives them, if it does.

    Warns if the file's images have another size than `image_size`, the model's, which is the one that counts.
    """
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if path.is_file():
            content = read_json_mapping(path)
            found |= content.get("image_processor") or content
    size = found.get("size")
    if isinstance(size, Mapping):
        size = size.get("height", size.get("shortest_edge"))
    if isinstance(size, int) and size != image_size:
        logger.warning(f"{folder} has images of {size} pixels in its preprocessor, and the model takes {image_size}")
    return {ours: found[key] for key, ours in (("image_mean", "mean"), ("image_std", "std")) if key in found}


def hf_model(model: nn.Module, config: Any, own: Mapping[str, Tensor], *, arch: str) -> Any:
    """transformers' model of this configuration with our tensors, shared and not copied. ValueError if it has other
    sizes.
    """
    import transformers

    name = hf_class_of(arch, reads_text=getattr(model, "qformer_text_input", False))
    with torch.device("meta"):
        twin = getattr(transformers, name)(config)
    given = to_hf(own, model, config)
    wanted = {key: tensor.shape for key, tensor in twin.state_dict().items()}
    wrong = [key for key, shape in wanted.items() if key not in given or given[key].shape != shape]
    if wrong:
        raise InputError(
            f"{name} of these sizes has {len(wrong)} tensors that this model lacks or has in another shape: "
            f"{', '.join(f'{key} {tuple(wanted[key])}' for key in wrong[:3])}. It cannot be written as a folder: "
            "keep it as a .pth file"
        )
    views = {  # loading unfreezes the parameters that it is given
        id(tensor): nn.Parameter(tensor.detach(), False) if isinstance(tensor, nn.Parameter) else tensor
        for tensor in given.values()
    }
    twin.load_state_dict({key: views[id(given[key])] for key in wanted}, assign=True)
    return twin


def to_hf(own: Mapping[str, Tensor], model: nn.Module, config: Any) -> dict[str, Tensor]:
    """A model's tensors under transformers' names, with rows for its image token."""
    if not hasattr(model, "Qformer"):
        return dict(blip_to_hf(own))
    given = dict(blip2_to_hf(own, getattr(model, "llm_prefix", None), config.model_type))
    if config.image_token_index is not None:
        rows = config.text_config.vocab_size
        for key in [key for key in given if key.endswith(VOCABULARIES) and len(given[key]) < rows]:
            given[key] = with_mean_rows(given[key].detach(), rows)
    return given


def with_mean_rows(vocabulary: Tensor, rows: int) -> Tensor:
    """A vocabulary (V,E) with rows added that are the mean of the others: as outputs they are never the likeliest."""
    mean = vocabulary.float().mean(dim=0, keepdim=True).to(vocabulary.dtype)
    return torch.cat([vocabulary, mean.expand(rows - len(vocabulary), -1)])


def from_hf(state: Mapping[str, Tensor], model: nn.Module) -> LazyState:
    """A state_dict of transformers under this model's names."""
    return (
        blip2_from_hf(state, getattr(model, "llm_prefix", None)) if hasattr(model, "Qformer") else blip_from_hf(state)
    )


def write_extras(own: Mapping[str, Tensor], covered: Collection[str], path: Path) -> None:
    """Write what is not `covered`: no second name of a tensor, and no table of positions, which is always the same."""
    from safetensors.torch import save_file

    seen = {id(tensor) for name, tensor in own.items() if name in covered}
    extras: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if id(tensor) not in seen and not name.endswith("position_ids"):
            seen.add(id(tensor))
            extras[name] = tensor.detach().contiguous()
    if extras:
        save_file(extras, path, metadata={"format": "pt"})


def build_processor(model: nn.Module, config: Any) -> Any:
    """transformers' processor for the model's images and texts; the image token that it adds to a language model's
    vocabulary is noted in `config`.
    """
    from transformers import Blip2Processor, BlipImageProcessor, BlipProcessor, InstructBlipProcessor

    side = model.visual_encoder.image_size
    images = BlipImageProcessor(size={"height": side, "width": side})
    if not hasattr(model, "Qformer"):
        return BlipProcessor(images, copy.deepcopy(model.tokenizer))
    if getattr(model, "llm_prefix", None) is None:
        return Blip2Processor(images, copy.deepcopy(model.tokenizer))
    tokenizer, queries = copy.deepcopy(model.llm_tokenizer.tokenizer), config.num_query_tokens
    if model.qformer_text_input:
        reader = copy.deepcopy(model.tokenizer)
        processor = InstructBlipProcessor(images, tokenizer, reader, num_query_tokens=queries)
    else:
        processor = Blip2Processor(images, tokenizer, num_query_tokens=queries)
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config.text_config.vocab_size = max(config.text_config.vocab_size, config.image_token_index + 1)
    return processor
