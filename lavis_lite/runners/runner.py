"""The runner: builds a training, resumes it, keeps the best and the last checkpoint, evaluates and tests.

The loop itself is in train_loop.py; `runner_base` and `runner_iter` differ in the plan of the run only (plan.py).
"""

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavis_lite.common import checkpoint, checkpoint_parts, dist, sharding
from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError
from lavis_lite.common.optim import build_optimizer, build_schedule
from lavis_lite.common.precision import autocast, resolve_precision, use_faster_products
from lavis_lite.common.registry import registry
from lavis_lite.common.rng import seed_rank
from lavis_lite.datasets.protocols import EvalDataset
from lavis_lite.models.base import BaseModel
from lavis_lite.models.placing import place
from lavis_lite.nn.fingerprint import weights_digest
from lavis_lite.runners.checkpoint_writer import CheckpointWriter
from lavis_lite.runners.compiling import compile_layers
from lavis_lite.runners.encoded import open_cache
from lavis_lite.runners.eval_batches import SavedBatches, made_with, partial_path
from lavis_lite.runners.jobs import BEST, new_parts, write_last, write_sharded
from lavis_lite.runners.learning import LearningWatch
from lavis_lite.runners.loaders import Datasets, EvalLoader, TrainLoader, eval_sets, train_sets
from lavis_lite.runners.pictures import pictures_of
from lavis_lite.runners.plan import make_plan
from lavis_lite.runners.profiling import StepProfiler
from lavis_lite.runners.progress import Progress
from lavis_lite.runners.resume import annotation_digests, load_verified, resume
from lavis_lite.runners.speed import Speed, peak_tflops
from lavis_lite.runners.stopping import StopSignals
from lavis_lite.runners.train_loop import Training, train_loop
from lavis_lite.runners.train_state import TrainState
from lavis_lite.tasks.base import BaseTask, check_splits
from lavis_lite.tasks.predictions import predictions_path, write_predictions
from lavis_lite.tasks.results import BatchResults

logger = logging.getLogger(__name__)

NOT_RESUMED = {"resume": None, "resume_ckpt_path": None}
Results = dict[str, dict[str, Any]]
"""{split: metrics}"""


@registry.register_runner("runner_iter")
@registry.register_runner("runner_base")
class Runner:
    """Trains and evaluates `model` on `datasets` ({name: {split: dataset}}) as `cfg.run` says; writes to `job_dir`.

    The best checkpoint is the one with the highest `agg_metrics` of the first validation split (of its first dataset),
    or with `run.best_by=mean` of all validation results together; without validation splits it is the last one.
    """

    training: Training
    """The parts of a training, once `train` has built them."""

    def __init__(self, cfg: Config, task: BaseTask, model: BaseModel, datasets: Datasets, job_dir: str | Path) -> None:
        self.cfg, self.run, self.task, self.datasets = cfg, cfg.run, task, datasets
        self.job_dir = Path(job_dir)
        self.device = dist.resolve_device(self.run.device)
        self.dtype = resolve_precision(self.run.precision, self.device)
        use_faster_products()
        check_splits([*self.run.valid_splits, *self.run.test_splits], datasets)
        self.is_sharded = self.run.parallel == "fsdp" and not self.run.evaluate and dist.world_size() > 1
        if self.run.compile != "none":
            compile_layers(model, self.run.compile)
        self.model = self._placed(model)
        self.stop = StopSignals()  # replaced by a caller that catches signals; this one is not entered and catches none
        self.has_begun = False  # a first step or an evaluation
        self.saved_step: int | None = None
        peak = peak_tflops(self.run, self.device, self.dtype)
        speed = Speed(self.model, self.device, peak_tflops=peak)
        self.progress = Progress(
            self.job_dir, speed=speed, tensorboard=self.run.tensorboard, trackers=self.run.trackers
        )
        profiled = self.run.profile if dist.is_main() else None
        self.profiler = StepProfiler(self.job_dir, num_steps=profiled, device=self.device.type)
        self.has_warned_of_no_best = False
        self.about: dict[str, Any] = {}
        """Facts about the run, for the row `run` of its log."""
        self.evaluated_weights: str | None = None
        """Digest of the weights of an evaluation that keeps its batches."""
        self.keeps_batches = False
        """Whether an evaluation writes the results of its batches as they are computed, so that it can be resumed."""
        self.num_samples: dict[str, int] = {}
        """Samples of each split that was evaluated."""

    def train(self) -> dict[str, Any]:
        """Train to the end from where the last run stopped, then test the best weights; with `run.evaluate` only test.

        Returns `{"best": {"metric", "epoch"}, "test": {split: metrics}}`.
        """
        if self.run.evaluate:
            return {"best": None, "test": self.evaluate()}
        self.training = self._prepare()
        state = self.training.state
        self._write_config()  # only now: a resume that is refused leaves the job as it was
        self.has_begun = True
        self.progress.report_run(self.about, self._config())
        with self.training.writer, self.training.tokens or contextlib.nullcontext():
            train_loop(self.training, save=self._save_last, validate=self._validate)
        self._load_best()
        test = self._evaluate_splits(self.run.test_splits, step=state.step, epoch=state.epoch)
        self.progress.close()
        return {"best": state.position["best"], "test": test}

    def evaluate(self, splits: Sequence[str] | None = None) -> Results:
        """Return metrics by split, or `<dataset>_<split>` if several datasets have it. Default: the splits of
        `run.valid_splits`, then those of `run.test_splits`.

        The weights are the model's own, or those of `run.resume_ckpt_path` if it is set.
        """
        both = [*self.run.valid_splits, *self.run.test_splits]
        splits = list(dict.fromkeys(both if splits is None else splits))
        check_splits(splits, self.datasets)
        self._write_config()
        if self.run.resume_ckpt_path:
            logger.info(f"evaluating the weights of {self.run.resume_ckpt_path} (run.resume_ckpt_path)")
            self._load_weights(Path(self.run.resume_ckpt_path))
        self.progress.report_run(self.about, self._config())
        return self._evaluate_splits(splits)

    def _placed(self, model: BaseModel) -> BaseModel:
        """Return the model on this rank's device, whole or this rank's shard of it."""
        if not self.is_sharded:
            return place(model, self.device)
        sharding.check_shardable(model, dtype=self.dtype)
        sharding.shard(model, model.shard_units(), device=self.device, dtype=self.dtype)
        return model

    def _parallel(self) -> tuple[nn.Module, Callable[[], contextlib.AbstractContextManager[None]]]:
        """Return the model as training calls it, and the context in which gradients stay on their rank."""
        if self.is_sharded:
            return self.model, sharding.no_sync(self.model)
        return dist.data_parallel(self.model, find_unused_parameters=self.run.find_unused_parameters)

    def _prepare(self) -> Training:
        """Build everything that training needs, and resume if there is something to resume."""
        run = self.run
        sets = train_sets(self.datasets, run.train_splits)
        self.data = annotation_digests(sets)
        world = dist.world_size()
        loader = TrainLoader(sets, run, rank=dist.rank(), world=world, device=self.device)
        plan = make_plan(run, loader.sampler.lengths, world, streams=loader.sampler.streams)
        for key, names in loader.left_out.items():
            logger.info(f"mixed batches have no {key!r}, which the samples of {', '.join(names)} lack")
        schedule = build_schedule(run, max_epoch=plan.num_epochs, iters_per_epoch=plan.inner, total_steps=plan.total)
        optimizer = build_optimizer(self.model.optimizer_groups(run.weight_decay, run.lr_layer_decay), run)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        watch = LearningWatch(warmup_steps=0 if run.warmup_lr is None else run.warmup_steps)
        state = TrainState(self.model, optimizer, scaler=scaler, loader=loader, watch=watch, device=self.device)
        seed_rank(run.seed)
        resume(state, run, plan, job_dir=self.job_dir, data=self.data, config=self._config())
        self.saved_step = state.step
        loader.sampler.start_step = state.step
        tokens = open_cache(self.cfg, self.model, device=self.device, dtype=self.dtype)
        if tokens is not None:
            loader.read_by(tokens.read_batch)
        if len(loader.sampler.names) > 1:
            self.progress.report_mixture(loader.sampler)
        parallel, no_sync = self._parallel()
        return Training(
            run=run,
            task=self.task,
            plan=plan,
            state=state,
            schedule=schedule,
            dtype=self.dtype,
            parallel=parallel,
            no_sync=no_sync,
            ranks=dist.Lockstep(run.step_timeout),
            progress=self.progress,
            profiler=self.profiler,
            stop=self.stop,
            writer=CheckpointWriter(is_aside=run.async_checkpoint),
            parts=dist.new_group() if run.checkpoint == "sharded" else None,
            tokens=tokens,
        )

    def _validate(self, epoch: int) -> None:
        """Validate after (inner) epoch `epoch`, and keep the weights if they are the best so far."""
        state = self.training.state
        results = self._evaluate_splits(self.run.valid_splits, step=state.step, epoch=state.epoch)
        name, metric = aggregate(results, by=self.run.best_by)
        if metric is None:
            advice = "validate on a split with answers, references or labels, or set run.valid_splits=[]"
            logger.log(
                logging.INFO if self.has_warned_of_no_best else logging.WARNING,
                f"{name}: nothing was scored, so checkpoint_best.pth will hold the last weights; {advice}",
            )
            self.has_warned_of_no_best = True
            return
        if name not in results:
            self.progress.report_metrics(name, {"agg_metrics": metric}, step=state.step, epoch=epoch)
        if state.best_metric is None or math.isnan(state.best_metric) or metric > state.best_metric:
            state.best_metric, state.best_epoch = metric, epoch
            self._save_best()
            logger.info(f"best so far: {metric:.4g} on {name} after epoch {epoch + 1}")

    def _evaluate_splits(self, splits: Sequence[str], *, step: int | None = None, epoch: int = 0) -> Results:
        """Return the metrics of splits, and keep their predictions; `step` is None but in a training."""
        self.has_begun = True
        self.model.eval()
        results: Results = {}
        for key, dataset in eval_sets(self.datasets, splits).items():
            self.num_samples[key] = len(dataset)
            folder, size = self.job_dir / "result", self.run.batch_size_eval
            batches = self.task.eval_batches(dataset, batch_size=size, split=key, result_dir=folder)
            options: dict[str, Any] = {"rank": dist.rank(), "world": dist.world_size(), "device": self.device}
            profiler = self.profiler if self.run.evaluate else StepProfiler()
            kept = self._batches(key, dataset) if batches is None else None
            options |= {"num_finished": kept.num_finished} if kept else {}
            loader = EvalLoader(dataset, self.run, **options, batches=batches, name=key, profiler=profiler)
            started = time.perf_counter()
            watched, keeping = profiler.over(self.model), self.task.keeping(kept or BatchResults())
            with watched, torch.no_grad(), sharding.gathered(self.model), autocast(self.device, self.dtype), keeping:
                results[key] = self.task.evaluate(self.model, loader, split=key, result_dir=folder)
            if kept:
                kept.close()
            seconds, number = time.perf_counter() - started, sum(loader.sizes) * dist.world_size()
            dist.on_main(partial(self._keep_predictions, key, step))
            speed = {"seconds": round(seconds, 2), "samples_per_s": round(number / seconds, 2)}
            self.progress.report_metrics(key, results[key], step=step or 0, epoch=epoch, speed=speed)
        return results

    def _batches(self, split: str, dataset: EvalDataset) -> SavedBatches | None:
        """Return the file of a split's batches, if the evaluation can be resumed."""
        if not self.keeps_batches or self.task.unresumable() is not None:
            return None
        if self.evaluated_weights is None:
            self.evaluated_weights = dist.on_main(lambda: weights_digest(self.model.state_dict()))
        made = made_with(self._config(), dataset, weights=self.evaluated_weights, device=self.device, dtype=self.dtype)
        path, resume = partial_path(self.job_dir, split), self.run.resume == "auto"
        kept = SavedBatches(path, made, resume=resume, device=self.device)
        if kept.num_finished:
            logger.info(f"{split}: resumed after {kept.num_finished:,} batches, which {path} has")
        return kept

    def _keep_predictions(self, split: str, step: int | None) -> None:
        """Write the predictions of the last evaluation, and show some of them in TensorBoard and the trackers."""
        kept = self.task.take_predictions()
        if not kept:
            return
        write_predictions(predictions_path(self.job_dir, split, step), kept)
        if self.progress.shows_pictures:
            pictures = pictures_of(kept, seed=self.run.seed)
            self.progress.report_pictures(f"{split}_predictions", pictures, step=step or 0)

    def _save_last(self) -> None:
        """Gather the whole training state and write it, or write each rank's part; must be entered by every rank."""
        state, is_sharded = self.training.state, self.run.checkpoint == "sharded"
        self.training.guard.check_weights(state.parameters, step=state.step)
        saved = state.save(whole=not is_sharded)
        saved |= {"plan": self.training.plan.to_dict(), "config": self._config(), "data": self.data}
        self.saved_step = state.step
        settings: dict[str, Any] = {"folder": self.job_dir, "step": state.step, "keep": self.run.keep_checkpoints}
        if is_sharded:
            name = dist.broadcast_object(new_parts(state.step))
            self.training.writer.write(partial(write_sharded, name=name, group=self.training.parts, **settings), saved)
        elif dist.is_main():
            self.training.writer.write(partial(write_last, **settings), saved)

    def _save_best(self) -> None:
        state = self.training.state
        self.training.guard.check_weights(state.parameters, step=state.step)
        weights = {"model": self.whole_state(), **state.position, "config": self._config()}
        if dist.is_main():
            checkpoint.save(weights, self.job_dir / BEST)
        dist.barrier()

    def whole_state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint holds of the model, on rank 0; must be entered by every rank."""
        state: dict[str, torch.Tensor] = sharding.whole(self.model.checkpoint_state_dict())
        return state

    def _load_best(self) -> None:
        if self.training.state.best_metric is None:
            self._save_best()
        elif self.run.test_splits:
            self._load_weights(self.job_dir / BEST)

    def _load_weights(self, path: Path) -> None:
        saved = checkpoint_parts.read(load_verified(path), path, sections=("model",))
        state = checkpoint.find_state_dict(saved, source=str(path))
        checkpoint.load_into(self.model, state, source=path)

    def _config(self) -> dict[str, Any]:
        """Return the merged configuration; of a training without what it resumed, which another run must not resume."""
        config = self.cfg.to_dict()
        return config if self.run.evaluate else {**config, "run": {**config["run"], **NOT_RESUMED}}

    def _write_config(self) -> None:
        import yaml

        if dist.is_main():
            text = yaml.safe_dump(self._config(), sort_keys=False, allow_unicode=True)
            name = "config_evaluate.yaml" if self.run.evaluate else "config.yaml"  # leaves the training's own as it is
            checkpoint.write_text(self.job_dir / name, text)


def aggregate(results: Mapping[str, Mapping[str, Any]], *, by: str) -> tuple[str, float | None]:
    """Return what weights are compared by: name and `agg_metrics` of the first validation result, or `mean` and that of
    all.

    A result whose `agg_metrics` is None (a split without answers, say) does not count in the mean; without any number
    the metric is None.

    Raises:
        InputError: one of those has no `agg_metrics`.
    """
    compared = list(results.items())[: 1 if by == "first" else None]
    for split, metrics in compared:
        if "agg_metrics" not in metrics:
            raise InputError(f"the task's score gave no 'agg_metrics' for {split}: found {sorted(metrics)}")
    numbers = [float(metrics["agg_metrics"]) for _, metrics in compared if metrics["agg_metrics"] is not None]
    return compared[0][0] if by == "first" else by, statistics.fmean(numbers) if numbers else None
