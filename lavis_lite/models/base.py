"""Base class of all models: building from a config, loading weights, optimizer groups, checkpoints.

The keys and shapes of the sample dict that models read are listed in datasets/protocols.py.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lavis_lite.common import checkpoint
from lavis_lite.common.config import trained as trained_config
from lavis_lite.common.config.schema import ConstructorSignature, as_read, reads_config
from lavis_lite.common.config.sections import MODEL_KEYS
from lavis_lite.common.errors import InputError, SettingError
from lavis_lite.common.optim import parameter_groups
from lavis_lite.common.registry import registry
from lavis_lite.common.sharding import ShardUnit
from lavis_lite.common.sources import weights
from lavis_lite.common.transfer import upload
from lavis_lite.models.hf import HFAdapter
from lavis_lite.models.inputs import image_of
from lavis_lite.models.tokenizers import tokenize
from lavis_lite.nn.decoding import DecodingConfig, GenerationConfig
from lavis_lite.nn.losses import IGNORED, NextTokens
from lavis_lite.nn.uninitialised import Uninitialised

logger = logging.getLogger(__name__)

NOT_TRAINED = re.compile(rf"_m\.|queue|{checkpoint.COMPUTED.pattern}")
"""Matches the names of momentum encoders, queues and buffers that follow from the sizes."""
COMPLETE = ("checkpoint", "finetuned")
"""Kinds of weights that have every trained parameter, so that nothing need be initialised before they are loaded."""
PRETRAINED = {"text_encoder", "text_decoder", "itm_head"}
"""Parts of BLIP's pretraining model, from which every task starts."""


class Output(dict[str, Any]):
    """A model's output: a dict whose entries are attributes too, as in LAVIS (`output.loss`).

    LAVIS's `intermediate_output` and `sims` are attributes only, which are computed when they are read: see `later`.
    """

    def later(self, **entries: Callable[[], Any]) -> Self:
        """Let attributes be computed when they are first read; the functions keep the tensors that they need."""
        self.__dict__.update({f"_{name}": function for name, function in entries.items()})
        return self

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if f"_{name}" in self.__dict__:
            self.__dict__[name] = value = self.__dict__[f"_{name}"]()
            return value
        raise AttributeError(f"the output has no {name!r}; it has {', '.join(self)}")


class BaseModel(nn.Module):
    """A model, to be registered. Constructors take keyword-only arguments and build the modules; the arguments of a
    class and its parents together are its YAML schema.
    """

    hf: ClassVar[HFAdapter[Any] | None] = None
    """The adapter to Hugging Face's layout."""
    llm_prefix: ClassVar[str | None] = None
    """`<llm_prefix>_model` is the language model of an architecture that has one."""
    newly_initialized: tuple[str, ...] = ()
    """Substrings of the names of parameters that finetuning adds, so that a pretrained file may lack them."""
    loaded_separately: tuple[str, ...] = ()
    """Substrings of the names of parameters that `load_frozen` loads, so that any file may lack them."""
    prompt_begins_captions: ClassVar[bool] = False
    """Training captions begin with the setting `prompt`."""
    tokenizer: PreTrainedTokenizerBase
    """Tokenizer of the text transformer, where there is one."""
    max_txt_len: int
    """Tokens of a text that are read."""
    max_positions: int
    """Positions of the text transformer."""
    learns_answers: ClassVar[bool] = True
    """Training reads the text to generate for `text_input`, a question or instruction: `text_output` or `answer`."""
    takes_video: ClassVar[bool] = True
    """`image` may be a video (B,3,F,H,W)."""
    reads_encoded: ClassVar[bool] = False
    """Training and evaluation read images through `checked_image` and `encode_image` alone, so that tokens of the image
    encoder may take their place: stored ones of a frozen encoder in training (`model.cache_features`), in evaluation
    those that several samples share."""
    llm_device_map: str | dict[str, Any] | None = None
    """The devices among which `place` divides the language model; None: it is on the model's."""
    num_text_tokens: int = 0
    """Tokens of all texts that were tokenised so far, without padding."""
    reports_num_labels: ClassVar[bool] = False
    """The loss is a language model's, a mean over labels whose number the output has as `num_labels`."""

    __signature__ = ConstructorSignature()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def checked_image(self, samples: Mapping[str, Any], *, answering: bool = False) -> Tensor:
        """Return the batch's `image` as `image_of` does, on the device it is on."""
        return image_of(samples, video=self.takes_video, answering=answering, encoded=self.reads_encoded)

    def frozen_encoder(self) -> nn.Module:
        """Return the frozen image encoder, whose tokens `model.cache_features` keeps.

        Raises:
            InputError: there is none, or it is trained.
        """
        problem = f"{type(self).__name__} cannot train on the tokens of a frozen image encoder; leave it out"
        raise SettingError("model.cache_features", problem)

    def encoder_tokens(self, image: Tensor) -> Tensor:
        """Return the tokens (B,S,E) of the frozen image encoder alone, in its precision, without gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no image encoder")

    def tokenize(
        self, texts: Sequence[str], *, start: int | None = None, max_length: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the text transformer's ids and mask (B,T), padded to the longest, None in place of a mask without
        padding; `start` replaces [CLS], `max_length` truncates. Does not wait for the device.
        """
        return self._uploaded(*tokenize(self.tokenizer, texts, start=start, max_length=max_length))

    def tokenize_to_predict(
        self, texts: Sequence[str], *, start: int | None = None, max_length: int | None = None
    ) -> tuple[Tensor, Tensor | None, NextTokens]:
        """Return ids and mask as `tokenize` does, and the tokens that a language-model loss predicts: all but the first
        and padding.
        """
        ids, mask = tokenize(self.tokenizer, texts, start=start, max_length=max_length)
        predicted = NextTokens.of(self.labels(ids)).upload(self.device)
        return *self._uploaded(ids, mask), predicted

    def _uploaded(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        is_full = bool(mask.all())
        ids, mask = self.upload_texts(ids, mask)
        return ids, None if is_full else mask

    def upload_texts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and mask (B,T) from the CPU on the model's device, and count the tokens."""
        self.num_text_tokens += int(mask.sum())
        return upload(ids, self.device), upload(mask, self.device)

    @property
    def decoder_start(self) -> int:
        """Id of `[DEC]`."""
        return self.tokenizer.bos_token_id

    def decoding(self, generation: GenerationConfig, **settings: Any) -> DecodingConfig:
        """Return decoding settings with the end and padding tokens and the positions of the text transformer."""
        tokens = {"eos_id": self.tokenizer.sep_token_id, "pad_id": self.tokenizer.pad_token_id}
        return DecodingConfig.of(generation, **tokens, max_positions=self.max_positions, **settings)

    def labels(self, ids: Tensor, num_masked: int | Tensor = 0) -> Tensor:
        """Return the labels of a language-model loss: padding and the first `num_masked` (one number, or (B,)) do not
        count.
        """
        limit = num_masked[:, None] if isinstance(num_masked, Tensor) else num_masked
        is_prompt = torch.arange(ids.shape[1], device=ids.device) < limit
        return ids.masked_fill((ids == self.tokenizer.pad_token_id) | is_prompt, IGNORED)

    @classmethod
    def from_config(cls, cfg: dict[str, Any], *, device: str | torch.device = "cpu") -> Self:
        """Build from a model section and load its weights: `checkpoint`, else `finetuned`, which are complete, else
        `init_*` and then `pretrained`; then the frozen parts that the file lacks. The model is built on the CPU;
        `device` is the one it will run on.
        """
        cfg = cls.for_device(cfg, device)
        kind, source = chosen_weights(cfg) or (None, None)
        if kind in COMPLETE:
            generator = torch.get_rng_state()
            with (skipped := Uninitialised()):
                model = cls._loaded(cfg, kind, source)
            if skipped.are_overwritten(model):
                return model
            torch.set_rng_state(generator)  # of a random language model the file has nothing
        return cls._loaded(cfg, kind, source)

    @classmethod
    def for_device(cls, cfg: dict[str, Any], device: str | torch.device) -> dict[str, Any]:
        """Return the model section with the settings that depend on the device resolved."""
        return cfg

    @classmethod
    def _loaded(cls, cfg: dict[str, Any], kind: str | None, source: str | None) -> Self:
        """Return the model of a section, with its weights."""
        with trained_config.fitting_adapters(cfg, source):
            model = cls(**{key: value for key, value in cfg.items() if key not in MODEL_KEYS})
            if start := starting_points(cfg):
                model.start_from(**start)
            loaded = set() if source is None else model.load_weights(source, initialise=kind == "pretrained")
        model.load_frozen(loaded)
        return model

    @classmethod
    def image_statistics(cls, cfg: Mapping[str, Any]) -> dict[str, list[float]] | None:
        """Return the `mean` and `std` with which the encoder of a model section was trained; None for CLIP's."""
        return None

    @classmethod
    def from_pretrained(cls, source: str, **settings: Any) -> Any:
        """Call `lavis_lite.models.from_pretrained` for the architecture of this class."""
        from lavis_lite.models.loading import from_pretrained

        return from_pretrained(source, model_class=cls, **settings)

    def load_checkpoint(self, url_or_filename: str) -> None:
        """Load complete weights: LAVIS's name of `load_weights`."""
        self.load_weights(url_or_filename)

    def load_checkpoint_from_config(self, cfg: Mapping[str, Any]) -> None:
        """Load the weights that a model section names, if it names any, for a `from_config` written for LAVIS."""
        if (chosen := chosen_weights(dict(cfg))) is not None:
            self.load_weights(chosen[1], initialise=chosen[0] == "pretrained")

    def load_frozen(self, loaded: set[str]) -> None:
        """Load frozen parts from their own sources, unless the names `loaded` from a file cover them."""

    def start_from(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        """Initialise encoders from weights of another family, such as ViT or BERT."""
        self.check_start(vit=vit, text=text)

    def check_start(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        """Raise the errors of `start_from` that can be found on this machine without reading weights."""
        raise InputError(f"{type(self).__name__} takes no init_vit or init_text; give pretrained or finetuned weights")

    def load_weights(self, source: str, *, initialise: bool = False) -> set[str]:
        """Load the weights at `source` (see `open_state`) and return the names that it has.

        With `initialise` (a pretrained file) the parameters that finetuning adds may be missing; otherwise every
        trainable parameter must be there.
        """
        state = self.adapt_state_dict(weights.open_state(source))
        for name in [name for name in state if self.was_read(name, source)]:
            del state[name]
        optional = self.loaded_separately + (self.newly_initialized if initialise else ())
        report = checkpoint.load_into(
            self,
            state,
            source=str(source),
            allow_missing=lambda key: any(part in key for part in optional) or (initialise and self.is_restorable(key)),
            loaded_separately=self.is_restorable,
            take=True,
        )
        if not initialise:
            self.check_leftovers(report.unexpected, state, source)
        self.after_loading(state)
        return set(state)

    def check_leftovers(self, unexpected: list[str], state: Collection[str], source: str) -> None:
        """Check the tensors of a complete file that the model lacks.

        ValueError for trained tensors of a checkpoint that was trained as this architecture, and for those inside this
        model's parts if it was trained as another. Whole parts, which a file of another task has, give a warning; a
        pretraining file has the parts of every task.
        """
        own = {name.split(".")[0] for name in self.state_dict()}
        left = [name for name in unexpected if not NOT_TRAINED.search(name)]
        trained = trained_config.read(source)
        if trained is not None and trained.is_whole:
            is_same = trained.arch in registry.list_models() and type(self) is registry.get_model_class(trained.arch)
            lost = left if is_same else [name for name in left if "." in name and name.split(".")[0] in own]
            if lost:
                found = f"{len(lost)} tensors that were trained have no place in the model: {', '.join(lost[:4])}"
                raise InputError(f"{source}: {found}. Leave out the settings that differ from its training")
        parts = sorted({name.split(".")[0] for name in left if "." in name} - own)
        if parts and not PRETRAINED.issubset(name.split(".")[0] for name in state):
            logger.warning(f"{source} also has {', '.join(parts)}: make sure that it is of {type(self).__name__}")

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """Return a file's tensors, which are read on access, in this model's layout and size."""
        return state

    def was_read(self, name: str, source: str) -> bool:
        """Return whether the constructor has read this parameter from `source` already."""
        return False

    def after_loading(self, state: Mapping[str, Tensor]) -> None:
        """Derive the tensors that the file lacked."""

    def optimizer_groups(self, weight_decay: float, lr_layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Return parameter groups for AdamW: no decay for vectors, learning-rate factors by layer."""
        return parameter_groups(self, weight_decay, self.layer_scale(lr_layer_decay))

    def layer_scale(self, decay: float) -> Callable[[str], float]:
        """Return the function from a parameter's name to its learning-rate factor."""
        return lambda name: 1.0

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """Return the state_dict without the frozen parameters that can be fetched again."""
        frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        left_out = {name for name in frozen if self.is_restorable(name)}
        if left_out:
            logger.info(f"the checkpoint leaves out {len(left_out)} frozen parameters")
        return {name: tensor for name, tensor in self.state_dict().items() if name not in left_out}

    def shard_units(self) -> list[ShardUnit]:
        """Return the blocks that are gathered one after another where parameters are sharded (`run.parallel: fsdp`).

        Raises:
            InputError: the model cannot be sharded.
        """
        return []

    def is_restorable(self, name: str) -> bool:
        """Return whether a frozen parameter can be fetched again from its own source."""
        return False

    def text_readers(self, samples: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
        """Return what reads the texts of a training batch: their key, the `model` setting that chooses the tokenizer,
        and the tokenizer. Models that read texts override it.
        """
        return []

    def check_generate(self, samples: dict[str, Any], **changes: Any) -> None:
        """Raise what `generate` would for these settings, without running the model; models that generate override it.

        Images, and the model, may be on the meta device.
        """

    def check_predict_answers(self, samples: dict[str, Any], **changes: Any) -> None:
        """Raise what `predict_answers` would for these settings, as `check_generate` does."""

    def forward(self, samples: dict[str, Any]) -> Output:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


def build_model(
    model_class: type[BaseModel], section: dict[str, Any], *, device: str | torch.device = "cpu"
) -> BaseModel:
    """Return the model of a `model` section with its weights.

    A class with a `from_config(cfg)` of its own, as in LAVIS's tutorials, reads the section itself.
    """
    if reads_config(model_class):
        return model_class.from_config(as_read(model_class, section))
    return model_class.from_config(section, device=device)


def checked_frozen(encoder: nn.Module, *, advice: str) -> nn.Module:
    """Return an image encoder. SettingError with the advice if any of its parameters is trained, be it an adapter."""
    if trained := [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]:
        problem = f"the image encoder is trained ({len(trained)} tensors, {trained[0]} ...), so its tokens change with"
        raise SettingError("model.cache_features", f"{problem} every step; {advice}, or leave cache_features out")
    return encoder


def starting_points(cfg: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `start_from` for a model section; none if the section has complete weights to load."""
    kind, _ = chosen_weights(cfg) or (None, None)
    if kind not in (None, "pretrained") or not (cfg.get("init_vit") or cfg.get("init_text")):
        return {}
    keys = {"vit": "init_vit", "text": "init_text", "add_token_type": "init_text_token_type"}
    return {argument: cfg[key] for argument, key in keys.items() if cfg.get(key) not in (None, "")}


def chosen_weights(cfg: dict[str, Any]) -> tuple[str, str] | None:
    """Return the kind and source of a model section's weights, or None for random weights. ValueError if a kind is
    required (`load_*`) and not named.
    """
    if cfg.get("checkpoint"):
        return "checkpoint", cfg["checkpoint"]
    for kind in ("finetuned", "pretrained"):
        wanted, source = cfg.get(f"load_{kind}"), cfg.get(kind)
        if wanted and not source:
            raise InputError(f"model.load_{kind} is true, but model.{kind} names no file or URL")
        if source and wanted is not False:
            return kind, source
    return None
