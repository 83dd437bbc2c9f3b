"""The `run` section: every key a run takes, with its default, and LAVIS's keys that no longer mean anything.

A task's own keys (`num_beams`, `k_test`, ...) stand beside these in the YAML; they are the task's fields.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from lavis_lite.common.errors import InputError

DEAD_RUN_KEYS = {
    "world_size": "torchrun sets it",
    "dist_url": "torchrun sets it",
    "dist_backend": "nccl on GPUs, gloo elsewhere",
    "distributed": "torchrun decides it",
    "gpu": "torchrun sets it",
    "rank": "torchrun sets it",
    "use_dist_eval_sampler": "evaluation is always sharded, each sample counted once",
    "use_datapipe": "there are no data pipes",
    "save_freq": "every epoch is saved; see keep_checkpoints and checkpoint_every",
    "save_last": "checkpoint_last.pth is always written",
    "val_freq": "every epoch (inner epoch) is validated",
}

_AT_LEAST: dict[str, float] = {
    "init_lr": 0,
    "min_lr": 0,
    "warmup_lr": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_epoch": 1,
    "max_iters": 1,
    "iters_per_inner_epoch": 1,
    "batch_size_train": 1,
    "batch_size_eval": 1,
    "num_workers": 0,
    "accum_grad_iters": 1,
    "seed": 0,
    "log_freq": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 0,
}
_AT_MOST: dict[str, float] = {
    "init_lr": 1000,
    "min_lr": 1000,
    "warmup_lr": 1000,
    "warmup_steps": 10**9,
    "weight_decay": 1000,
    "max_epoch": 10**6,
    "max_iters": 10**9,
    "iters_per_inner_epoch": 10**9,
    "batch_size_train": 10**6,
    "batch_size_eval": 10**6,
    "num_workers": 1024,
    "accum_grad_iters": 10**6,
    "seed": 2**63 - 1,
    "log_freq": 10**9,
    "checkpoint_every": 10**9,
    "keep_checkpoints": 10**6,
    "lr_layer_decay": 1,
    "lr_decay_rate": 1,
}
"""Far above what any run needs: a value beyond is a slip (or an attack) and would only fail later, or never end."""

MOST_SHARE = 10**9
_ABOVE_ZERO = ("grad_clip_norm", "lr_layer_decay", "lr_decay_rate")
_BELOW_ONE = ("beta1", "beta2")


def is_plain_name(name: str) -> bool:
    """Return whether a name can be a file's or folder's: neither a path nor longer than file systems allow."""
    return name not in ("", ".", "..") and not set("/\\\0") & set(name) and len(name.encode(errors="replace")) <= 200


class RunConfigError(InputError):
    """A value of the run section that makes no sense; `key` says which, so that the caller can name the file."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"run.{key}: {text}")
        self.key = key
        self.text = text


@dataclass(kw_only=True)
class RunConfig:
    """Settings of one run, whatever its task.

    A step is an update of the weights by one global batch: `batch_size_train` x processes x `accum_grad_iters` samples.
    An epoch is one pass over the training sets.
    """

    task: str
    """Registered name of the task."""
    runner: str = "runner_base"
    """`runner_base` counts epochs, `runner_iter` steps."""

    lr_sched: str = "linear_warmup_cosine_lr"
    lr_sched_per_epoch: bool = False
    """True: LAVIS's own schedule, which changes once an epoch and warms up within the first epoch only."""
    init_lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    warmup_lr: float | None = None
    """Learning rate at step 0; without it `warmup_steps` has no effect, as in LAVIS."""
    warmup_steps: int = 0
    lr_decay_rate: float | None = None
    """Factor per epoch of `linear_warmup_step_lr`."""
    lr_layer_decay: float = 1.0
    """Factor of the learning rate per layer of the image encoder, from the last layer down."""
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip_norm: float | None = None
    accum_grad_iters: int = 1
    """Batches on each process whose gradients make up one step."""
    loss_average: Literal["batches", "tokens"] = "batches"
    """Over all batches of a step, on all processes: the mean of their losses, or of a language model's loss over all
    their labels."""

    max_epoch: int = 1
    max_iters: int | None = None
    iters_per_inner_epoch: int | None = None
    """`runner_iter`: steps between two validations; None: an epoch's."""
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    valid_splits: list[str] = field(default_factory=list)
    test_splits: list[str] = field(default_factory=list)
    best_by: Literal["first", "mean"] = "first"
    """What chooses checkpoint_best.pth: the first validation result's `agg_metrics`, or the mean of all of them."""
    evaluate: bool = False
    """True: no training, evaluate `valid_splits` and `test_splits`, as LAVIS does."""
    train_dataset_mixing: Literal["concat", "per_step"] | None = None
    """Several training sets: `concat` mixes them within each batch, as LAVIS and BLIP do; `per_step` takes each step's
    batch from one of them. None: `per_step` if a setting below says how often, else `concat`."""
    train_dataset_sampling: Literal["size", "sqrt", "uniform"] = "size"
    """`per_step`: how likely a step's batch comes from a training set: by its size, its square root, or all alike."""
    train_dataset_factors: dict[str, float] | None = None
    """Hand adjustments: by how much a training set's share is multiplied; 1 for those that are not named."""
    train_dataset_ratios: dict[str, float] | None = None
    """Share of each training set by name, instead of both."""

    batch_size_train: int = 32
    """Samples per process and batch."""
    batch_size_eval: int = 32
    num_workers: int = 2
    max_unreadable_share: float = 0.0
    """Share of a training set's images that may be unreadable and are then skipped and counted."""

    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: on a GPU bf16 where it has it, else fp16; fp32 on the CPU."""
    amp: bool | None = None
    """LAVIS's switch: True is `precision: auto`, False is `precision: fp32`."""
    find_unused_parameters: bool = False
    step_timeout: float = 600.0
    """Seconds that a training step waits for another rank before the run ends; preparation and scoring wait hours."""

    seed: int = 42
    output_dir: str = "output"
    job_id: str | None = None
    """Folder of the run below `output_dir`; None takes the time, YYYYmmdd_HHMMSS."""
    resume_ckpt_path: str | None = None
    resume: Literal["auto"] | None = None
    """`auto`: go on with the newest job that left a readable checkpoint, in its folder; else start afresh."""
    log_freq: int = 50
    """Steps between two lines of the log."""
    checkpoint_every: int | None = None
    """Steps between two writes of checkpoint_last.pth within an epoch; None writes it after each epoch only."""
    keep_checkpoints: int = 0
    """Number of the newest checkpoints kept as checkpoint_<step>.pth beside `last` and `best`."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for key, least in _AT_LEAST.items():
            self._require(key, lambda v, least=least: v >= least, f"{least:g} or more")
        for key in ("train_splits", "valid_splits", "test_splits"):
            self._require(key, lambda v: all(map(is_plain_name, v)), "plain names, since results are filed under them")
        self._require("output_dir", lambda v: v.strip() != "", "a folder")
        for key, most in _AT_MOST.items():
            self._require(key, lambda v, most=most: v <= most, f"{most:,} or less")
        for key in _ABOVE_ZERO:
            self._require(key, lambda v: v > 0, "more than 0")
        for key in _BELOW_ONE:
            self._require(key, lambda v: 0 <= v < 1, "from 0 to less than 1")
        self._require("step_timeout", lambda v: 0 < v <= 1e6, "more than 0 and at most 1e6 seconds")
        self._require("max_unreadable_share", lambda v: 0 <= v <= 1, "a share, 0 to 1")
        for key in ("train_dataset_ratios", "train_dataset_factors"):
            self._require(key, lambda v: all(0 <= x <= MOST_SHARE for x in v.values()), f"0 to {MOST_SHARE:,} for each")
        self._check_mixture()
        self._require("job_id", is_plain_name, "a folder's plain name")
        if self.runner == "runner_iter" and self.max_iters is None:
            raise RunConfigError("max_iters", "missing: runner_iter needs the number of steps")
        if self.runner == "runner_base" and self.iters_per_inner_epoch is not None:
            raise RunConfigError("iters_per_inner_epoch", "needs runner: runner_iter; runner_base counts epochs")
        self._apply_amp()

    @property
    def mixing(self) -> Literal["concat", "per_step"]:
        """`train_dataset_mixing`, decided where it is None."""
        if self.train_dataset_mixing is not None:
            return self.train_dataset_mixing
        return "per_step" if self._drawing() else "concat"

    def _drawing(self) -> dict[str, Any]:
        """Return the settings that say how often each set is drawn, as far as they differ from the defaults."""
        keys = ("train_dataset_ratios", "train_dataset_factors", "train_dataset_sampling")
        values = {key: getattr(self, key) for key in keys}
        return {key: value for key, value in values.items() if value and value != "size"}

    def _check_mixture(self) -> None:
        drawing = self._drawing()
        if self.train_dataset_mixing == "concat" and drawing:
            given = ", ".join(f"{key}: {value}" for key, value in drawing.items())
            way_out = "concat takes every sample once per epoch; leave these out, or set train_dataset_mixing: per_step"
            raise RunConfigError("train_dataset_mixing", f"concat contradicts {given}; {way_out}")
        if self.train_dataset_ratios and len(drawing) > 1:
            given = f"train_dataset_sampling: {self.train_dataset_sampling}, factors {self.train_dataset_factors}"
            way_out = "leave it out, or set train_dataset_sampling: size and train_dataset_factors: null"
            raise RunConfigError("train_dataset_ratios", f"contradicts {given}; {way_out}")

    def _require(self, key: str, holds: Any, expected: str) -> None:
        value = getattr(self, key)
        if value is not None and not holds(value):
            raise RunConfigError(key, f"expected {expected}, got {value!r}")

    def _apply_amp(self) -> None:
        contradictory = {True: ("fp32",), False: ("bf16", "fp16"), None: ()}[self.amp]
        if self.precision in contradictory:
            raise RunConfigError("amp", f"amp: {self.amp} contradicts precision: {self.precision}; leave one out")
        if self.amp is False:
            self.precision = "fp32"
