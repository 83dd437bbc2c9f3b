"""What every registered model shares: building from a config, loading weights, optimizer groups, checkpoints.

The keys and shapes of the sample dict that models eat are listed in docs/architecture.md, section 3.
"""

import inspect
import logging
import re
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lavis_lite.common import checkpoint
from lavis_lite.common.config import trained as trained_config
from lavis_lite.common.config.sections import MODEL_KEYS
from lavis_lite.common.errors import InputError
from lavis_lite.common.optim import parameter_groups
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import weights

logger = logging.getLogger(__name__)

NOT_TRAINED = re.compile(rf"_m\.|queue|{checkpoint.COMPUTED.pattern}")
"""In the names of momentum twins, queues and buffers that follow from the sizes."""
PRETRAINED = {"text_encoder", "text_decoder", "itm_head"}
"""Parts of BLIP's pretraining model, from which every task starts."""


class Output(dict[str, Tensor]):
    """What a model answers: a dict whose entries are attributes too, as LAVIS's users write them (`output.loss`)."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the output has no {name!r}; it has {', '.join(self)}") from None


class BaseModel(nn.Module):
    """A registered model. Constructors take keyword-only arguments and build; the union of a class's and its parents'
    is its YAML schema.
    """

    new_parts: ClassVar[tuple[str, ...]] = ()
    """What stands in the names of parameters that a pretrained file may lack because finetuning adds them."""
    loaded_later: tuple[str, ...] = ()
    """What stands in the names of parameters that any file may lack because `load_frozen` loads them."""
    prompt_begins_captions: ClassVar[bool] = False
    """Training captions begin with the setting `prompt`."""
    learns_answers: ClassVar[bool] = True
    """Training reads what to write about `text_input`, a question or an instruction: `text_output`, or `answer`."""

    takes_video: ClassVar[bool] = True
    """Images may be videos, (B,3,F,H,W)."""
    reports_num_labels: ClassVar[bool] = False
    """The loss is a language model's, a mean over labels whose number the output has as `num_labels`."""

    has_warned_of_cut_texts: bool = False
    """Whether it was logged that texts are cut; it is once per model."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = inherited_signature(cls)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def from_config(cls, cfg: dict[str, Any], *, device: str | torch.device = "cpu") -> Self:
        """Build from a model section and load its weights: `checkpoint`, else `finetuned`, which are complete, else
        `init_*` and then `pretrained`; then frozen parts that the file does not hold. `device` is where the model will
        run; it is built on the CPU.
        """
        kind, source = chosen_weights(cfg) or (None, None)
        with trained_config.fitting_adapters(cfg, source):
            model = cls(**{key: value for key, value in cfg.items() if key not in MODEL_KEYS})
            if start := starting_points(cfg):
                model.start_from(**start)
            loaded = set() if source is None else model.load_weights(source, initialise=kind == "pretrained")
        model.load_frozen(loaded)
        return model

    @classmethod
    def image_statistics(cls, cfg: Mapping[str, Any]) -> dict[str, list[float]] | None:
        """Return `mean` and `std` of the images that the encoder of a model section was trained on; None for CLIP's."""
        return None

    @classmethod
    def from_pretrained(cls, source: str, **settings: Any) -> Any:
        """`lavis_lite.models.from_pretrained`, for the architectures of this class."""
        from lavis_lite.models.loading import from_pretrained

        return from_pretrained(source, model_class=cls, **settings)

    def load_frozen(self, loaded: set[str]) -> None:
        """Fetch frozen parts from their own sources, unless the names `loaded` from a file cover them; models with such
        parts override it.
        """

    def start_from(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        """Start encoders from weights of another family; models that can override it."""
        self.check_start(vit=vit, text=text)

    def check_start(self, *, vit: str | None = None, text: str | None = None, add_token_type: bool = True) -> None:
        """Raise what `start_from` would, as far as sources on this machine tell without reading weights."""
        raise InputError(f"{type(self).__name__} takes no init_vit or init_text; give pretrained or finetuned weights")

    def load_weights(self, source: str, *, initialise: bool = False) -> set[str]:
        """Load a file or URL (.pth as LAVIS and BLIP write it, or .safetensors), or a Hugging Face folder or hub id;
        returns the names it had.

        With `initialise` (a pretrained file) the parts that finetuning adds may be missing; otherwise every trainable
        parameter must be there.
        """
        state = self.adapt_state_dict(weights.open_state(source))
        new_parts = self.loaded_later + (self.new_parts if initialise else ())
        report = checkpoint.load_into(
            self,
            state,
            source=str(source),
            allow_missing=lambda key: (
                any(part in key for part in new_parts) or (initialise and self.is_restorable(key))
            ),
            elsewhere=self.is_restorable,
        )
        if not initialise:
            self.check_leftovers(report.unexpected, state, source)
        self.after_loading(state)
        return set(state)

    def check_leftovers(self, unexpected: list[str], state: Collection[str], source: str) -> None:
        """Tell what a complete file has beyond this model.

        ValueError for trained tensors of a checkpoint that was trained as this architecture, and for those inside this
        model's parts if it was another; a warning for whole parts, which a file of another task has. A pretraining
        file has those of every task.
        """
        own = {name.split(".")[0] for name in self.state_dict()}
        left = [name for name in unexpected if not NOT_TRAINED.search(name)]
        trained = trained_config.read(source)
        if trained is not None and trained.is_whole:
            is_same = trained.arch in registry.list_models() and type(self) is registry.get_model_class(trained.arch)
            lost = left if is_same else [name for name in left if "." in name and name.split(".")[0] in own]
            if lost:
                raise InputError(
                    f"{source}: {len(lost)} tensors that were trained have no place in the model: "
                    f"{', '.join(lost[:4])}. Leave out the settings that differ from its training"
                )
        parts = {name.split(".")[0] for name in left if "." in name} - own
        is_pretraining = PRETRAINED.issubset(name.split(".")[0] for name in state)
        if parts and not is_pretraining:
            logger.warning(
                f"{source} also has {', '.join(sorted(parts))}, which {type(self).__name__} has not: "
                "make sure that it is a checkpoint of this architecture"
            )

    def adapt_state_dict(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """Bring a file's tensors, which are read when asked for, into this model's layout and size; models override
        it.
        """
        return state

    def after_loading(self, state: Mapping[str, Tensor]) -> None:
        """Derive what the file did not hold; models override it."""

    def optimizer_groups(self, weight_decay: float, lr_layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Parameter groups of AdamW: no decay for vectors, learning-rate factors by layer."""
        return parameter_groups(self, weight_decay, self.layer_scale(lr_layer_decay))

    def layer_scale(self, decay: float) -> Callable[[str], float]:
        """The learning-rate factor of each parameter name; models with an image encoder override it."""
        return lambda name: 1.0

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """The state_dict without frozen parameters that can be fetched again."""
        frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        left_out = {name for name in frozen if self.is_restorable(name)}
        if left_out:
            logger.info(f"the checkpoint leaves out {len(left_out)} frozen parameters")
        return {name: tensor for name, tensor in self.state_dict().items() if name not in left_out}

    def is_restorable(self, name: str) -> bool:
        """Whether a frozen parameter can be fetched again from its own source; models with such parts override it."""
        return False

    def forward(self, samples: dict[str, Any]) -> Output:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


def inherited_signature(cls: type) -> inspect.Signature:
    """The constructor's keyword-only parameters, going on to the parent's wherever a class passes **kwargs on."""
    found: dict[str, inspect.Parameter] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner) or owner is nn.Module:
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                found.setdefault(parameter.name, parameter)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return inspect.Signature(list(found.values()))


def starting_points(cfg: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `start_from` for a model section: empty if it names none, or has complete weights to load."""
    kind, _ = chosen_weights(cfg) or (None, None)
    if kind not in (None, "pretrained") or not (cfg.get("init_vit") or cfg.get("init_text")):
        return {}
    keys = {"vit": "init_vit", "text": "init_text", "add_token_type": "init_text_token_type"}
    return {argument: cfg[key] for argument, key in keys.items() if cfg.get(key) not in (None, "")}


def chosen_weights(cfg: dict[str, Any]) -> tuple[str, str] | None:
    """Which file a model section asks for: its kind and path, or None for random weights. A kind that was asked for
    must be named.
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
