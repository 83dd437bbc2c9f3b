"""The dry run: all checks of a run and its figures, without a step."""

from typing import Any

import torch

from lavis_lite.cli import preflight
from lavis_lite.cli.cache_checks import cache_lines
from lavis_lite.cli.memory import memory_lines
from lavis_lite.cli.provenance import parameters
from lavis_lite.cli.throughput import throughput_lines
from lavis_lite.cli.verdict import check_expected
from lavis_lite.common import dist
from lavis_lite.common.config import trained as trained_config
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.schema import reads_config
from lavis_lite.common.config.sections import MODEL_KEYS
from lavis_lite.common.errors import InputError
from lavis_lite.common.hardware import Gpu
from lavis_lite.common.optim import build_schedule
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.models.base import BaseModel, build_model, starting_points
from lavis_lite.runners import eval_batches
from lavis_lite.runners.division import divide
from lavis_lite.runners.loaders import Datasets
from lavis_lite.runners.plan import Plan
from lavis_lite.runners.resume import resume_line
from lavis_lite.tasks.base import setup_task


def dry_run(cfg: Config, *, gpu: Gpu | None = None) -> None:
    """Print the merged configuration, parameter and sample counts, and where the run would resume; the model is built
    on the meta device. With `gpu`, memory and rate are those on such a GPU.
    """
    dist.init("cpu")  # nothing is computed, so this machine need not have the run's device
    try:
        task = setup_task(cfg)
        preflight.check_task(cfg, task)
        check_expected(cfg)
        is_there = cfg.run.resume_ckpt_path and "run.resume_ckpt_path" not in dict(preflight.missing_weights(cfg))
        resumes = bool(cfg.run.resume or is_there)
        cfg.run = divide(cfg.run, resumes=resumes)
        datasets = task.build_datasets(cfg)
        found = preflight.check_data(cfg, task, datasets)
        preflight.fit_features(cfg, found)
        model = build_without_weights(cfg.model, on_gpu=gpu is not None or needs_gpu(cfg))
        if start := starting_points(cfg.model):
            model.check_start(**start)
        preflight.check_model(cfg, task, model, datasets, found)
        resumed = []
        if resumes:
            plan = found.plan  # None of an evaluation
            resumed.append(eval_batches.resume_line(cfg) if plan is None else resume_line(cfg, model, datasets, plan))
        if dist.is_main():
            print("\n".join([*report(cfg, model, datasets, found, gpu), *resumed]))
    finally:
        dist.shutdown()


def needs_gpu(cfg: Config) -> bool:
    """Return whether the run is one for a GPU, which this machine need not have."""
    try:
        return dist.resolve_device(cfg.run.device).type == "cuda"
    except InputError:
        return True


def build_without_weights(section: dict[str, Any], *, on_gpu: bool = False) -> BaseModel:
    """Return the model of a `model` section on the meta device, with the precisions of a GPU if it is to run on one:
    shapes and names, no memory, no weight file read.
    """
    arguments = {key: value for key, value in section.items() if key not in MODEL_KEYS}
    with torch.device("meta"), trained_config.fitting_adapters(section, section.get("checkpoint")):
        model_class = registry.get_model_class(section["arch"])
        if reads_config(model_class):
            return build_model(model_class, arguments)
        return model_class(**(model_class.for_device(arguments, "cuda") if on_gpu else arguments))


def report(
    cfg: Config, model: BaseModel, datasets: Datasets, found: preflight.DataReport, gpu: Gpu | None = None
) -> list[str]:
    """Return the dry run's lines."""
    lines = ["# the merged configuration", cfg.to_yaml().rstrip(), ""]
    lines += ["# dry run: no step was run, no weights were read"]
    lines += [f"model       {cfg.model['arch']} {cfg.model.get('model_type') or ''}".rstrip()]
    lines += [f"parameters  {parameter_counts(model)}"]
    for name, splits in datasets.items():
        lines += [f"samples     {name}/{split}: {len(dataset):,}" for split, dataset in splits.items()]
    if found.plan is not None:
        lines += plan_lines(cfg, found.plan)
        lines += training_costs(cfg, model, found, gpu)
        lines += cache_lines(cfg, model, datasets)
        lines += [f"left out    {key}, which {', '.join(names)} lacks" for key, names in found.left_out.items()]
    trained = {f"{name}/{split}" for name in cfg.datasets for split in cfg.run.train_splits}
    trained_on = set().union(*(split.files for split in found.splits if split.where in trained))
    for split in found.splits:
        name, _, key = split.where.rpartition("/")
        dataset = datasets[name][key]
        records = dataset.annotation if isinstance(dataset, BaseDataset) else []
        others = set() if split.where in trained else trained_on
        lines.append(split.line(others, num_repeated=preflight.num_repeated(records)))
    for key, path in preflight.missing_weights(cfg):
        lines.append(f"weights     not found: {path} ({key}); without it the run ends at its start")
    try:
        preflight.check_device(cfg)
        return [*lines, f"device      {dist.resolve_device(cfg.run.device)}"]
    except InputError as error:
        return [*lines, f"device      not checked on this machine: {error}"]


def training_costs(cfg: Config, model: BaseModel, found: preflight.DataReport, gpu: Gpu | None) -> list[str]:
    """Return the lines about the memory of a training step on the samples that were read, and its rate on a GPU."""
    trained = {f"{name}/{split}" for name in cfg.datasets for split in cfg.run.train_splits}
    batches = [batch for split in found.splits if split.where in trained for batch in split.batches[:1]]
    if not batches or found.plan is None or not dist.is_main():
        return []
    lines = memory_lines(cfg, model, batches[0], gpu)
    return lines if gpu is None else [*lines, *throughput_lines(cfg, model, batches[0], found.plan, gpu)]


def parameter_counts(model: BaseModel) -> str:
    """Return in words how many parameters a model has, and how many are trainable."""
    total, trainable = parameters(model)
    return f"{total:,} in all, {trainable:,} trainable"


def plan_lines(cfg: Config, plan: Plan) -> list[str]:
    """Return each training set's share, if there are several, and how many steps the run takes."""
    build_schedule(cfg.run, max_epoch=plan.num_epochs, iters_per_epoch=plan.inner, total_steps=plan.total)  # may warn
    lines = []
    if len(plan.sampler.shares) > 1:
        of = "samples" if plan.sampler.is_concat else "steps"
        lines += [f"share       {name}: {share:.2%} of the {of}" for name, share in plan.sampler.shares.items()]
    batch = f"{plan.sampler.global_batch:,} samples per step"
    if cfg.run.accum_grad_iters > 1:
        batch += f", accumulated from {cfg.run.accum_grad_iters} batches on each process"
    return [*lines, f"steps       {plan.sampler.steps_per_epoch:,} per epoch, {plan.total:,} in all ({batch})"]
