"""The `run` section: every key of a run with its default, and the keys of LAVIS that are accepted and ignored.

The YAML's `run` section also has the task's own keys (`num_beams`, `k_test`, ...), which are the task's fields.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lavis_lite.common.bounds import Bounds, check_number, check_numbers
from lavis_lite.common.errors import SettingError

IGNORED_LAVIS_KEYS = (
    *("world_size", "dist_url", "dist_backend", "distributed", "gpu", "rank", "use_dist_eval_sampler", "use_datapipe"),
    *("save_freq", "save_last", "val_freq"),
)
"""docs/lavis.md says for each of them what takes its place."""
LAVIS_TASK_KEYS = (
    *("num_beams", "max_len", "min_len", "length_penalty", "repetition_penalty", "use_nucleus_sampling", "top_p"),
    *("temperature", "prompt", "inference_method", "num_ans_candidates", "report_metric", "annotation_file", "img_ids"),
    *("caption_key", "sample_id_key", "load_gt_from_file", "ques_files", "anno_files", "segments", "k_test"),
)
"""Keys that tasks of LAVIS read. Its recipes also give them to tasks that do not read them: these only log them."""

BOUNDS: dict[str, Bounds] = {
    **{key: (0.0, 1000.0) for key in ("init_lr", "min_lr", "warmup_lr", "weight_decay")},
    **{key: (0.0, 1.0, 0.0) for key in ("lr_layer_decay", "lr_decay_rate")},
    **{key: (0.0, 1.0, 1.0) for key in ("beta1", "beta2")},
    **{key: (1, 10**9) for key in ("max_iters", "iters_per_inner_epoch", "log_freq", "checkpoint_every")},
    **{key: (1, 10**6) for key in ("max_epoch", "batch_size_train", "batch_size_eval", "accum_grad_iters")},
    "global_batch": (1, 10**9),
    "grad_clip_norm": (0.0, math.inf, 0.0),
    "warmup_steps": (0, 10**9),
    "num_workers": (0, 1024),
    "prefetch_factor": (1, 1024),
    "profile": (1, 10_000),
    "peak_tflops": (0.0, 1e6, 0.0),
    "seed": (0, 2**63 - 1),
    "keep_checkpoints": (0, 10**6),
    "early_stopping": (1, 10**6),
    "step_timeout": (0.0, 1e6, 0.0),
    "limit": (1, 10**9),
    "max_unreadable_share": (0.0, 1.0),
}
"""Least and greatest value, and one that is excluded. The greatest are far above what runs need: a larger value is a
typing error, and would fail late or never end."""
MOST_SHARE = 10**9
Tracker = Literal["wandb", "mlflow", "trackio"]


def is_plain_name(name: str) -> bool:
    """Return whether a file or folder can have this name: not a path, nor longer than file systems allow."""
    return name not in ("", ".", "..") and not set("/\\\0") & set(name) and len(name.encode(errors="replace")) <= 200


@dataclass(kw_only=True)
class RunConfig:
    """Settings of one run, for every task.

    A step is an update of the weights by one global batch: `batch_size_train` x processes x `accum_grad_iters` samples.
    An epoch is one pass over the training sets.
    """

    task: str
    """Registered name of the task."""
    runner: str = "runner_base"
    """`runner_base` counts epochs, `runner_iter` steps."""

    lr_sched: str = "linear_warmup_cosine_lr"
    lr_sched_per_epoch: bool = False
    """True: LAVIS's schedule, which changes once per epoch and warms up within the first epoch only."""
    init_lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    warmup_lr: float | None = None
    """Learning rate at step 0; if None, `warmup_steps` has no effect, as in LAVIS."""
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
    global_batch: int | None = None
    """Samples of one step, on all processes together, in equal batches of at most `batch_size_train`; replaces
    `accum_grad_iters`."""
    loss_average: Literal["batches", "tokens"] = "batches"
    """Over all batches of a step, on all processes: the mean of their losses, or of a language model's loss over all
    their labels."""

    max_epoch: int = 1
    max_iters: int | None = None
    iters_per_inner_epoch: int | None = None
    """`runner_iter`: steps between two validations; None: an epoch's."""
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    valid_splits: list[str] = field(default_factory=list)
    early_stopping: int | None = None
    """Validations without a better metric after which training ends; None: it never ends early."""
    test_splits: list[str] = field(default_factory=list)
    best_by: Literal["first", "mean"] = "first"
    """Metric that selects checkpoint_best.pth: `agg_metrics` of the first validation result, or the mean of all."""
    defaults: Literal["lavis"] | None = None
    """`lavis`: the decoding settings that LAVIS uses where a YAML is silent, instead of the papers'; the task's
    `lavis_defaults`."""
    evaluate: bool = False
    """True: evaluate `valid_splits` and `test_splits` without training, as LAVIS does."""
    limit: int | None = None
    """Evaluate only the first samples of each split, this many; of a retrieval gallery the first images."""
    train_dataset_mixing: Literal["concat", "per_step"] | None = None
    """Several training sets: `concat` mixes them within each batch, as LAVIS and BLIP do; `per_step` takes each step's
    batch from one of them. None: `per_step` if one of the three settings below is given, else `concat`."""
    train_dataset_sampling: Literal["size", "sqrt", "uniform"] = "size"
    """`per_step`: sampling weight of each training set: its size, the square root of its size, or equal weights."""
    train_dataset_factors: dict[str, float] | None = None
    """Factor of each training set's sampling weight, by name; 1 for those not named."""
    train_dataset_ratios: dict[str, float] | None = None
    """Sampling weight of each training set, by name; replaces the two above."""

    batch_size_train: int = 32
    """Samples per process and batch."""
    batch_size_eval: int = 32
    num_workers: int | Literal["auto"] = 2
    """Loader processes per process; `auto`: its share of the cores less one."""
    prefetch_factor: int | None = None
    """Batches that each worker reads ahead; None: torch's default."""
    max_unreadable_share: float = 0.0
    """Share of a training set's images that may be unreadable; these are skipped and counted."""

    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on GPUs that support it, fp16 on others, fp32 on the CPU."""
    compile: Literal["none", "encoder", "model"] = "none"
    """`encoder`: torch.compile for the layers of the image encoder; `model`: for those of all parts."""
    amp: bool | None = None
    """LAVIS's key: True is `precision: auto`, False is `precision: fp32`."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes: each holds the whole model, or with `fsdp` a shard of every parameter and its optimizer
    state."""
    find_unused_parameters: bool = False
    step_timeout: float = 600.0
    """Seconds that a training step waits for other ranks before the run fails; preparation and scoring wait hours."""

    seed: int = 42
    output_dir: str = "output"
    job_id: str | None = None
    """Folder of the run in `output_dir`; None: the time, YYYYmmdd_HHMMSS."""
    resume_ckpt_path: str | None = None
    resume: Literal["auto"] | None = None
    """`auto`: resume the newest job with a readable checkpoint, in its folder, or start a new one."""
    log_freq: int = 50
    """Steps between two lines of log.txt."""
    peak_tflops: float | None = None
    """Peak rate of a device, to which the logged `mfu` is relative; None: that of known GPUs in 16 bits."""
    profile: int | None = None
    """Steps that are profiled, after a warm-up; None: none."""
    checkpoint: Literal["full", "sharded"] = "full"
    """`full`: rank 0 gathers and writes checkpoint_last.pth; `sharded`: each process writes its part of it."""
    checkpoint_every: int | None = None
    """Steps between two writes of checkpoint_last.pth within an epoch; None: only after each epoch."""
    async_checkpoint: bool = False
    """True: training continues while checkpoint_last.pth is written from a copy in the host's memory."""
    keep_checkpoints: int = 0
    """Number of checkpoints kept as checkpoint_<step>.pth, the newest ones, besides `last` and `best`."""
    tensorboard: bool = True
    tracker: Tracker | list[Tracker] | None = None
    """Services that get the numbers and pictures of the run too; each needs its package."""

    def __post_init__(self) -> None:
        given = {key: value for key, value in vars(self).items() if value is not None}
        if self.num_workers == "auto":
            del given["num_workers"]
        check_numbers("run", given, **BOUNDS)
        for key in ("train_dataset_ratios", "train_dataset_factors"):
            for name, share in given.get(key, {}).items():
                check_number(f"run.{key}.{name}", share, 0.0, float(MOST_SHARE))
        for key in ("train_splits", "valid_splits", "test_splits"):
            if not all(map(is_plain_name, given[key])):
                raise SettingError(f"run.{key}", f"must be names that files can have, got {given[key]!r}")
        if not self.output_dir.strip():
            raise SettingError("run.output_dir", f"must name a folder, got {self.output_dir!r}")
        if self.job_id is not None and not is_plain_name(self.job_id):
            raise SettingError("run.job_id", f"must be the name of a folder, without a path, got {self.job_id!r}")
        if self.runner == "runner_iter" and self.max_iters is None:
            raise SettingError("run.max_iters", "missing: runner_iter needs the number of steps")
        if self.runner == "runner_base" and self.iters_per_inner_epoch is not None:
            raise SettingError("run.iters_per_inner_epoch", "needs runner: runner_iter; runner_base counts epochs")
        if self.lr_sched == "linear_warmup_step_lr" and self.lr_decay_rate is None:
            raise SettingError("run.lr_decay_rate", "missing: linear_warmup_step_lr needs a factor per epoch, e.g. 0.9")
        if self.checkpoint == "sharded" and self.parallel != "fsdp":
            raise SettingError("run.checkpoint", "sharded needs run.parallel: fsdp; ddp has no shards, set full")
        if self.limit is not None and not self.evaluate:
            raise SettingError("run.limit", "is for evaluations only: leave it out, or set run.evaluate: true")
        if self.early_stopping is not None and not self.valid_splits:
            raise SettingError("run.early_stopping", "needs validations: name a split in run.valid_splits")
        self._check_mixture()
        self._apply_amp()

    @property
    def trackers(self) -> list[Tracker]:
        """Return `tracker` as a list."""
        if isinstance(self.tracker, str):
            return [self.tracker]
        return list(self.tracker or ())

    @property
    def mixing(self) -> Literal["concat", "per_step"]:
        """Return `train_dataset_mixing`, or what follows from the other settings if it is None."""
        if self.train_dataset_mixing is not None:
            return self.train_dataset_mixing
        return "per_step" if self._sampling_settings() else "concat"

    def _sampling_settings(self) -> dict[str, Any]:
        """Return the settings of the sampling weights that differ from the defaults."""
        keys = ("train_dataset_ratios", "train_dataset_factors", "train_dataset_sampling")
        return {key: value for key in keys if (value := vars(self)[key]) and value != "size"}

    def _check_mixture(self) -> None:
        changed = self._sampling_settings()
        if self.train_dataset_mixing == "concat" and changed:
            given = ", ".join(f"{key}: {value}" for key, value in changed.items())
            raise SettingError("run.train_dataset_mixing", f"concat contradicts {given}; set per_step, or no weights")
        if self.train_dataset_ratios and len(changed) > 1:
            given = f"train_dataset_sampling: {self.train_dataset_sampling}, factors {self.train_dataset_factors}"
            correction = "leave it out, or set train_dataset_sampling: size and train_dataset_factors: null"
            raise SettingError("run.train_dataset_ratios", f"contradicts {given}; {correction}")

    def _apply_amp(self) -> None:
        if self.precision in {True: ("fp32",), False: ("bf16", "fp16"), None: ()}[self.amp]:
            raise SettingError("run.amp", f"{self.amp} contradicts run.precision, {self.precision}; leave one out")
        if self.amp is False:
            self.precision = "fp32"
