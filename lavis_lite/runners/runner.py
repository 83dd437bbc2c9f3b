"""The one training loop, and what stands around it: validation, best and last checkpoint, exact resume, test.

`step` counts iterations (batches), as in LAVIS; the optimizer moves every `accum_grad_iters` of them.
A run is cut into epochs (`runner_base`) or inner epochs (`runner_iter`); that is all in which the two differ.
"""

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from lavis_lite.common import checkpoint, dist
from lavis_lite.common.errors import InputError, UnknownNameError
from lavis_lite.common.logger import MetricLogger
from lavis_lite.common.optim import build_optimizer, build_schedule, set_lr
from lavis_lite.common.registry import registry
from lavis_lite.runners.learning import LearningWatch, learning_metrics
from lavis_lite.runners.loaders import (
    check_splits,
    eval_loader,
    eval_sets,
    to_device,
    train_loader,
    train_sets,
)
from lavis_lite.runners.plan import Plan, resolve_precision
from lavis_lite.runners.progress import Progress
from lavis_lite.runners.resume import (
    annotation_digests,
    apply_hyperparameters,
    check_best,
    check_resumable,
    load_verified,
    report_differences,
    resume_path,
)
from lavis_lite.runners.sampling import seed_rank
from lavis_lite.runners.state import (
    FiniteGuard,
    RunState,
    aggregate,
    bring_best,
    rank_state,
    restore_rank,
    save_last,
)
from lavis_lite.runners.stopping import Stopped, StopSignals

logger = logging.getLogger(__name__)

NOT_RESUMED = {"resume": None, "resume_ckpt_path": None}


@registry.register_runner("runner_base")
class Runner:
    """Trains and evaluates `model` on `datasets` ({name: {split: dataset}}) as `cfg.run` says; writes to `job_dir`.

    The best checkpoint is the one with the highest `agg_metrics` of the first validation split (of its first dataset),
    or with `run.best_by=mean` of all validation results together; without validation splits it is the last one.
    """

    def __init__(
        self,
        cfg: Any,
        task: Any,
        model: nn.Module,
        datasets: Mapping[str, Mapping[str, Dataset]],
        job_dir: str | Path,
    ) -> None:
        self.cfg, self.run, self.task, self.datasets = cfg, cfg.run, task, datasets
        self.job_dir = Path(job_dir)
        self.device = dist.resolve_device(self.run.device)
        self.dtype = resolve_precision(self.run, self.device)
        for setting in ("valid_splits", "test_splits"):
            check_splits(datasets, getattr(self.run, setting) or (), setting=setting)
        self.model = model.to(self.device)
        self.state = RunState()
        self.warned_of_no_best = False
        self.stop = StopSignals()  # of whoever catches signals; these are not entered and catch none
        self.has_begun = False  # a first step or an evaluation
        self.progress = Progress(self.job_dir, tensorboard=self.run.tensorboard)

    def train(self) -> dict[str, Any]:
        """Trains to the end from wherever the last run stopped, then tests the best weights.

        Returns `{"best": {"metric", "epoch"}, "test": {split: metrics}}`; with `run.evaluate` only tests.
        """
        if self.run.evaluate:
            return {"best": None, "test": self.evaluate()}
        self._prepare()
        self._write_config()  # not before: a resume that is refused leaves the job as it was
        self.has_begun = True
        try:
            with self.stop.deferred():
                for epoch in range(self.state.epoch, self.plan.num_epochs):
                    with self.steps:
                        self._train_epoch(epoch)
                    self._finish_epoch(epoch)
        finally:
            self.batches = iter(())  # ends the loader's workers
            self.progress.end_epoch()
        self._load_best()
        test = self._evaluate_splits(self.run.test_splits or ())
        self.progress.close()
        return {"best": self.state.to_dict()["best"], "test": test}

    def evaluate(self, splits: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Metrics of `splits` by split, or `<dataset>_<split>` if several datasets have it. Default: those of
        `run.valid_splits`, then those of `run.test_splits`.

        The weights are the model's own, or those of `run.resume_ckpt_path` if it is set.
        """
        both = [*(self.run.valid_splits or ()), *(self.run.test_splits or ())]
        splits = list(dict.fromkeys(both if splits is None else splits))
        check_splits(self.datasets, splits, setting="test_splits")
        self._write_config()
        if self.run.resume_ckpt_path:
            logger.info(f"evaluating the weights of {self.run.resume_ckpt_path} (run.resume_ckpt_path)")
            self._load_weights(Path(self.run.resume_ckpt_path))
        return self._evaluate_splits(splits)

    @staticmethod
    def plan_of(run: Any, loader: Any) -> Plan:
        """Return how long a run with this training loader is."""
        total = loader.steps_per_epoch * run.max_epoch
        return Plan(inner=loader.steps_per_epoch, total=min(total, run.max_iters or total), **loader.sampler.describe())

    def _prepare(self) -> None:
        """Builds everything that training needs, and resumes if there is something to resume."""
        run = self.run
        sets = train_sets(self.datasets, run.train_splits or ())
        pin = self.device.type == "cuda"
        self.data = annotation_digests(sets)
        self.loader = train_loader(sets, run, rank=dist.rank(), world=dist.world_size(), pin=pin)
        self.plan = self.plan_of(run, self.loader)
        sampler = self.loader.sampler
        self.draws_datasets = len(sampler.names) > 1 and not self.loader.is_concat
        for key, names in self.loader.left_out.items():
            logger.info(f"mixed batches have no {key!r}, which the samples of {', '.join(names)} lack")
        self.schedule = build_schedule(
            run, max_epoch=self.plan.num_epochs, iters_per_epoch=self.plan.inner, total_steps=self.plan.total
        )
        groups = self.model.optimizer_groups(run.weight_decay, run.lr_layer_decay)
        self.optimizer = build_optimizer(groups, run)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.metrics, self.by_dataset, self.guard = MetricLogger(), MetricLogger(), FiniteGuard()
        self.watch = LearningWatch(warmup_steps=0 if run.warmup_lr is None else run.warmup_steps)
        seed_rank(run.seed)
        self._resume()
        if len(sampler.names) > 1:
            self.progress.report_mixture(sampler.lengths, sampler.shares, is_concat=self.loader.is_concat)
        self.saved_step = self.state.step
        self.parallel, self.no_sync = dist.data_parallel(self.model, find_unused_parameters=run.find_unused_parameters)
        self.steps = dist.Steps(run.step_timeout)
        self.loader.seek(0, self.state.step)
        self.batches = iter(self.loader)

    def _train_epoch(self, epoch: int) -> None:
        run, plan = self.run, self.plan
        first, end = plan.bounds(epoch)
        start = self.state.step
        self.model.train()
        self.progress.start_epoch(epoch=epoch, num_epochs=plan.num_epochs, step=start - first, end=end - first)
        for step in range(start, end):
            lr = self.schedule.lr_at(step)
            set_lr(self.optimizer, lr)
            samples = to_device(next(self.batches), self.device)
            samples.update(epoch=epoch, iters=step - first, num_iters_per_epoch=plan.inner)
            window, closes_window = plan.window(step, accumulate=run.accum_grad_iters)
            with contextlib.nullcontext() if closes_window else self.no_sync():
                with self._autocast():
                    output = self.task.train_step(self.parallel, samples)
                losses = _losses(output)
                self.guard.update(step, lr, losses)
                self.scaler.scale(losses["loss"] / window).backward()
            if closes_window:
                self._update_weights()
            self.metrics.update(**losses, **learning_metrics(output))
            if self.draws_datasets:
                self.by_dataset.update(**{self.loader.sampler.dataset_at(step): losses["loss"]})
            self.state.step = step + 1
            self.progress.advance()
            if self.state.step % run.log_freq == 0 or self.state.step == end:
                self._log(epoch, lr)
            if closes_window:
                is_due = step + 1 < end and self._is_checkpoint_due()
                self._save_or_stop(is_due=is_due)
        self.progress.end_epoch()
        if start < end and len(self.loader.sampler.names) > 1:
            self.progress.report_datasets(self._by_dataset(first, end), step=self.state.step, epoch=epoch)

    def _by_dataset(self, first: int, end: int) -> dict[str, dict[str, Any]]:
        """Return each training set's part in the steps from `first` to before `end`.

        That is its batches and their mean loss, or its samples where a batch holds several sets' and has one loss.
        """
        sampler = self.loader.sampler
        if self.loader.is_concat:
            return {name: {"samples": count} for name, count in sampler.samples_between(first, end).items()}
        counts = dict(self.by_dataset.counts)
        means = self.by_dataset.drain()
        return {name: {"batches": counts.get(name, 0), "loss": means.get(name)} for name in sampler.names}

    def _save_or_stop(self, *, is_due: bool) -> None:
        """Save if a checkpoint is due; if any rank was asked to stop, save and raise Stopped on every rank."""
        signum = self.steps.largest(self.stop.signum or 0)
        if is_due or signum:
            with self.steps.paused():
                self._save_last()
        if signum:
            raise Stopped(signum)

    def _update_weights(self) -> None:
        if self.run.grad_clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self._parameters(), self.run.grad_clip_norm)
            if not self.scaler.is_enabled():  # the scaler's overflow steps have infinite norms
                self.metrics.update(grad_norm=norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _check_finite(self) -> None:
        self.guard.check()
        self.guard.check_weights(self._parameters(), step=self.state.step)

    def _log(self, epoch: int, lr: float) -> None:
        self.guard.check()
        row = {"step": self.state.step, "epoch": epoch, "lr": lr, **self.metrics.drain()}
        if self.run.max_unreadable_share > 0:
            row["unreadable"] = self.loader.unreadable
        if self.device.type == "cuda":
            row["max_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.progress.report(row, samples_per_step=self.loader.sampler.global_batch, total=self.plan.total)
        self.watch.update(row)

    def _finish_epoch(self, epoch: int) -> None:
        """Validates after (inner) epoch `epoch`, keeps the best weights, saves the run."""
        valid_splits = self.run.valid_splits or ()
        if valid_splits:
            self._save_last()  # validation may be long, and the epoch should not be lost with it
            with self.stop.at_once():
                results = self._evaluate_splits(valid_splits)
            self._keep_best(epoch, results)
        self.state.epoch = epoch + 1
        self._save_last()

    def _keep_best(self, epoch: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        name, metric = aggregate(results, by=self.run.best_by)
        if metric is None:
            self._warn_of_no_best(name)
            return
        if name not in results:
            self.progress.report_metrics(name, {"agg_metrics": metric}, step=self.state.step, epoch=epoch)
        known = self.state.best_metric
        if known is None or math.isnan(known) or metric > known:
            self.state.best_metric, self.state.best_epoch = metric, epoch
            self._save_weights(self.job_dir / "checkpoint_best.pth")
            logger.info(f"best so far: {metric:.4g} on {name} after epoch {epoch + 1}")

    def _warn_of_no_best(self, name: str) -> None:
        if not self.warned_of_no_best:
            self.warned_of_no_best = True
            logger.warning(
                f"{name}: nothing was scored, so checkpoint_best.pth cannot be chosen by it and will hold the last "
                "weights. Validate on a split with answers, references or labels, or set run.valid_splits=[]"
            )

    def _load_best(self) -> None:
        best = self.job_dir / "checkpoint_best.pth"
        if self.state.best_metric is None:
            self._save_weights(best)
        elif self.run.test_splits:
            self._load_weights(best)

    def _evaluate_splits(self, splits: Sequence[str]) -> dict[str, dict[str, Any]]:
        self.has_begun = True
        self.model.eval()
        results: dict[str, dict[str, Any]] = {}
        for key, dataset in eval_sets(self.datasets, splits).items():
            loader = eval_loader(dataset, self.run, rank=dist.rank(), world=dist.world_size(), device=self.device)
            with torch.no_grad(), self._autocast():
                results[key] = self.task.evaluate(self.model, loader, split=key, result_dir=self.job_dir / "result")
            self.progress.report_metrics(key, results[key], step=self.state.step, epoch=self.state.epoch)
        return results

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if enabled else torch.bfloat16, enabled=enabled)

    def _is_checkpoint_due(self) -> bool:
        every = self.run.checkpoint_every
        return bool(every) and self.state.step // every > self.saved_step // every

    def _save_last(self) -> None:
        """Gathers the whole training state and writes it; must be entered by every rank."""
        self._check_finite()
        ranks = dist.gather_objects([rank_state(self.loader, self.device)])
        metrics = [self.metrics.state_dict(), self.by_dataset.state_dict()]
        self.saved_step = self.state.step
        if not dist.is_main():
            return
        saved = {
            "model": self.model.checkpoint_state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **self.state.to_dict(),
            "plan": self.plan.to_dict(),
            "metrics": metrics,
            "learning": self.watch.state_dict(),
            "ranks": ranks,
            "config": self._config(),
            "data": self.data,
        }
        save_last(saved, self.job_dir, step=self.state.step, keep=self.run.keep_checkpoints)

    def _save_weights(self, path: Path) -> None:
        self._check_finite()
        if dist.is_main():
            weights = {
                "model": self.model.checkpoint_state_dict(),
                **self.state.to_dict(),
                "config": self._config(),
            }
            checkpoint.save(weights, path)
        dist.barrier()

    def _load_weights(self, path: Path) -> None:
        state = checkpoint.find_state_dict(load_verified(path), source=str(path))
        checkpoint.load_into(self.model, state, source=path)

    def _resume(self) -> None:
        """Puts model, optimizer, scaler, position and random states back as they were at the checkpoint."""
        path = resume_path(self.run, self.job_dir)
        if path is None:
            return
        saved, config = checkpoint.load(path, verify=False), self._config()
        dist.on_main(
            lambda: check_resumable(
                saved, path=path, plan=self.plan, optimizer=self.optimizer, data=self.data, config=config
            )
        )
        report_differences(saved, config, path=path)
        checkpoint.load_into(self.model, checkpoint.find_state_dict(saved, source=str(path)), source=path)
        apply_hyperparameters(self.optimizer, saved["optimizer"])
        if saved["scaler"]:  # empty if the checkpoint's precision needed none
            self.scaler.load_state_dict(saved["scaler"])
        self.state = RunState.from_dict(saved)
        for metrics, state in zip((self.metrics, self.by_dataset), saved["metrics"], strict=True):
            metrics.load_state_dict(state, device=self.device)
        self.watch.step = self.state.step
        if "learning" in saved:  # not in older checkpoints
            self.watch.load_state_dict(saved["learning"])
        restore_rank(
            saved["ranks"], self.loader, device=self.device, seed=self.run.seed, step=self.state.step, source=path
        )
        check_best(self.state, path)
        bring_best(self.state, path, job_dir=self.job_dir)
        logger.info(f"resumed {path} at step {self.state.step} of {self.plan.total}")

    def _config(self) -> dict[str, Any]:
        """Return the merged configuration; of a training without what it resumed, which another run must not resume."""
        config = self.cfg.to_dict()
        return config if self.run.evaluate else {**config, "run": {**config["run"], **NOT_RESUMED}}

    def _write_config(self) -> None:
        import yaml

        if dist.is_main():
            text = yaml.safe_dump(self._config(), sort_keys=False, allow_unicode=True)
            name = "config_evaluate.yaml" if self.run.evaluate else "config.yaml"  # leaves the training's own alone
            checkpoint.write_text(self.job_dir / name, text)


@registry.register_runner("runner_iter")
class IterRunner(Runner):
    """`Runner` that counts iterations: `max_iters` in all, validating every `iters_per_inner_epoch`."""

    @staticmethod
    def plan_of(run: Any, loader: Any) -> Plan:
        """Return how long a run with this training loader is."""
        if run.max_iters is None:
            raise InputError("run.runner=runner_iter needs run.max_iters (and perhaps run.iters_per_inner_epoch)")
        inner = run.iters_per_inner_epoch or loader.steps_per_epoch
        return Plan(inner=inner, total=run.max_iters, **loader.sampler.describe())


def _losses(output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    if "loss" not in output:
        raise UnknownNameError(f"train_step returned no 'loss': found {sorted(output)}")
    return {name: value for name, value in output.items() if name.startswith("loss") and torch.is_tensor(value)}
