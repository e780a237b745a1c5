"""The training loop: build or resume, then step, log, validate, sample and save."""

import gc
import hashlib
import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megazh.errors import DataError, DivergedError
from megazh.model.backend import choose_backend
from megazh.pipeline.engine import check_tied, make_engine, quiet
from megazh.pipeline.module import Z_LOSS, DecoderPipeline
from megazh.run.folder import RunFolder
from megazh.run.metrics import VALIDATION, Metrics, StepRecord, sample_of
from megazh.run.peaks import mfu, peak_flops
from megazh.training.checkpoint_list import CheckpointManifest, checkpoint_path
from megazh.training.checkpoint_read import load_checkpoint
from megazh.training.collect import largest, of_rank_0
from megazh.training.cut import agree_on_bounds
from megazh.training.describe import describe_devices, describe_kernels
from megazh.training.evaluate import Validation, Validator, sample_text
from megazh.training.feed import MicroBatch, training_feed
from megazh.training.garbage import COLLECT_EVERY, collect_on_request_only
from megazh.training.gpu_memory import limit_memory, peak_memory
from megazh.training.health import Health, diverged, find_not_finite
from megazh.training.layout import Layout, make_layout
from megazh.training.learning_rate import learning_rate, warmup_steps
from megazh.training.optimizers.choose import rules
from megazh.training.pace import Pace, due
from megazh.training.prompting import Prompting
from megazh.training.recipe import Device, Kernels, Recipe, Resume, run_recipe
from megazh.training.resume import agree_on_checkpoint, agree_on_initial
from megazh.training.retention import keep_rule, prune, validation_losses
from megazh.training.saver import Saver, mark_complete
from megazh.training.stages import describe_parts, work_of
from megazh.training.startup import Startup
from megazh.training.stop import StopRequest


class Interrupted(Exception):
    """A rank was requested to stop; finished steps are saved."""


def train(path: Path, device: torch.device, stop: StopRequest, startup: Startup) -> None:
    """Train the run in folder `path` to its end. All ranks call it.

    Args:
        path: the run folder; its config.yaml holds the recipe with the layout.
        device: this rank's device.
        stop: the request to stop, if one comes.
        startup: the clock of this start.

    Raises:
        MegazhError: data, checkpoint or machine fail, as the functions called here document.
        DivergedError: steps or weights are not finite; nothing more was saved.
        Interrupted: a rank was requested to stop; a checkpoint of the last finished step is written.
    """
    run = RunFolder(path)
    recipe = run_recipe(run)
    layout = make_layout(recipe, dist.get_world_size())
    trainer = Trainer(run, recipe, layout, device, stop, startup)
    devices = describe_devices(device)
    if dist.get_rank() == 0:
        run.record(recipe.with_cut(trainer.bounds).to_yaml())
        run.add_devices(devices, {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {})
    trainer.run()


class Trainer:
    """The state of training on one rank. All ranks make one, with equal arguments except for the device."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        layout: Layout,
        device: torch.device,
        stop: StopRequest,
        startup: Startup | None = None,
    ) -> None:
        self._startup = startup or Startup()
        self._folder, self._recipe, self._layout, self._device = run, recipe, layout, device
        self._steps = recipe.total_steps
        self._warmup = warmup_steps(self._steps, recipe.schedule.warmup)
        self._precision = recipe.precision.on(Device(device.type))
        limit_memory(device, recipe.parallel.memory_limit_gib)
        self._mixture = recipe.open_mixture()
        run.check_data(self._mixture)  # on another machine or a moment later, the paths may lead to other data
        self._tokenizer = run.tokenizer()
        self._prompting = Prompting(self._tokenizer, self._mixture.template)
        self._startup.done("data")
        self._run_id = run.info().run_id
        found = self._find_checkpoint()
        self._step = found[1].step if found else 0
        """Optimizer steps done."""
        kernels = recipe.parallel.kernels is Kernels.AUTO
        backend = choose_backend(recipe.model, device, self._precision.compute.torch, kernels, recipe.low_rank)
        self.work = work_of(recipe, layout, self._precision, backend)
        self.bounds = self._bounds(found[1] if found else None)
        stages = (describe_parts(recipe, begin, end) for begin, end in pairwise(self.bounds))
        self.log(f"{'stages':<12}{' | '.join(stages)}")
        if device.type == "cuda":
            self.log(f"{'kernels':<12}{describe_kernels(recipe, device, self.work)}")
        self._startup.done("stages")
        self.engine = self._make_engine()
        self._startup.done("engine")
        self._load(found)
        self._saver = Saver(self.engine.optimizer, run.checkpoints, self.log, self._retain)
        self._saver.saved_at = found[1].step if found else None
        self._saver.check_room()  # now, not after hours
        module: DecoderPipeline = self.engine.module
        self._replica = module.mpu().get_data_parallel_rank()
        self._feed = self._make_feed(module)
        self._validator = self._make_validator()
        self._startup.done("validation data")
        self._flops_per_token = recipe.flops_per_token.total
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self._peak_flops = peak_flops(name, recipe.logging.peak_tflops)
        self._stop = stop
        self._data_seconds = 0.0
        self._pace = Pace(self._step, self._steps)
        self._begun_at = self._step
        self._save_is_due = False
        """Whether a checkpoint waits for a step that is not skipped."""
        self._health = Health()
        self._evaluated: set[str] = set()
        """Evaluations that are done for the current step, see `_evaluate`."""

    def log(self, line: str) -> None:
        """Print a line once, on rank 0."""
        if dist.get_rank() == 0:
            print(line, flush=True)

    def _find_checkpoint(self) -> tuple[Path, CheckpointManifest] | None:
        """The checkpoint that the run goes on from; None where it begins."""
        resume = self._recipe.checkpoint.resume
        named = None if isinstance(resume, Resume) else resume
        return agree_on_checkpoint(self._folder.checkpoints, self._run_id, self.log, named)

    def _bounds(self, saved: CheckpointManifest | None) -> list[int]:
        """The cut into stages: the recipe's, else that of a checkpoint of as many stages, else the best one."""
        if saved and saved.stages == self._layout.stages and self._recipe.parallel.stage_bounds is None:
            return saved.bounds
        return agree_on_bounds(self._recipe, self.work, self._device)

    def _load(self, found: tuple[Path, CheckpointManifest] | None) -> None:
        """Restore the state of a checkpoint or, where the run begins, the weights that the recipe names."""
        initial = self._recipe.checkpoint.initial_checkpoint
        begins = found is None
        if found is None and initial is not None:
            found = agree_on_initial(Path(initial))
        if found is None:
            return
        path, manifest = found
        load_checkpoint(self.engine.optimizer, path, manifest, self.log, weights_only=begins)
        if wrong := find_not_finite(self.engine.optimizer, self._device):
            remedy = "name other weights" if begins else "remove this checkpoint to resume from the one before it"
            raise DataError(f"{path}: {wrong} is not finite: training had diverged; {remedy}")
        self._startup.done("checkpoint")
        if begins:
            origin = f", step {manifest.step} of run {manifest.run_id}" if manifest.step else ""
            self.log(f"weights are those of {path}{origin}")
        else:
            self.log(f"resumed at step {self._step} of {self._steps}")
            if (manifest.stages, manifest.replicas) != (self._layout.stages, self._layout.replicas):
                self.log(
                    f"{path.name} was saved by {manifest.stages} stages x {manifest.replicas} replicas, and is resumed "
                    f"by {self._layout.stages} x {self._layout.replicas}"
                )

    def _retain(self, saved: Path) -> list[str]:
        """Remove the checkpoints that are no longer to be kept; called in a thread of rank 0."""
        losses = validation_losses(self._folder.path)
        return prune(saved.parent, keep_rule(self._recipe), losses, int(saved.name.removeprefix("step_")))

    def _make_engine(self) -> Any:
        recipe = self._recipe
        with quiet():
            module = DecoderPipeline(
                self.work, self.bounds, recipe.schedule.seed, recipe.optimizer.z_loss, recipe.parallel.cuda_graph
            )
        self._startup.done("model")
        optimizer = recipe.optimizer
        return make_engine(module, optimizer.name.value, rules(optimizer), self.work, optimizer.max_grad_norm)

    def _make_feed(self, module: DecoderPipeline) -> Iterator[MicroBatch] | None:
        if not (module.is_first or module.is_last):
            return None
        feed = training_feed(self._mixture, self._layout, self._replica, self._step, self._recipe.data.workers)
        return self._timed(feed)

    def _timed(self, feed: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        while True:
            begun = time.perf_counter()
            batch = next(feed, None)
            self._data_seconds += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def _make_validator(self) -> Validator | None:
        validation = self._mixture.manifest.validation
        if not validation or not validation.fraction:
            return None
        limit = self._recipe.evaluation.validation_samples
        return Validator(self._mixture.validation, self._layout, self._replica, limit, self._tokenizer)

    def run(self) -> None:
        """Train all remaining steps, validate and sample, and mark the run as complete."""
        if self._stop_is_agreed():
            raise Interrupted  # during start-up: there is nothing to save
        with Metrics(self._folder.path, self._step, quiet=dist.get_rank() != 0) as metrics:
            self._evaluated = of_rank_0(metrics.evaluated_at(self._step))
            self._evaluate(metrics)  # of a new run, or what an interruption prevented
            self._startup.done("validation")
            while self._step < self._steps:
                stop = self.take_step(metrics)
                self._evaluated = set()
                self._check_health(metrics)
                self._save_if_due(stop)
                if stop:
                    raise Interrupted
                self._evaluate(metrics)
                if self._step < self._steps and (self._saved_or_saving() or VALIDATION in self._evaluated):
                    metrics.draw()
                    gc.collect()
                elif due(COLLECT_EVERY, self._step):
                    gc.collect()
        self._saver.wait()
        mark_complete(checkpoint_path(self._folder.checkpoints, self._step))

    def _check_health(self, metrics: Metrics) -> None:
        """End a run that has diverged, before anything is saved.

        Raises:
            DivergedError: too many steps in a row were skipped, at the end of a run already more than half of it; or
                the last one, and the model is of no use.
        """
        skipped = self._health.skipped_in_row
        if self._health.diverged:
            raise self._diverged(f"the last {skipped} steps were skipped, since gradients were not finite")
        if self._step < self._steps or not skipped:
            return
        if 2 * skipped > self._steps or self.engine.skipped_steps >= self._steps:
            raise self._diverged(
                f"{self.engine.skipped_steps} of {self._steps} steps were skipped, since gradients were not finite"
            )
        if self._health.doubtful:
            found = self._validate(metrics)  # first: the steps skipped last hold nothing that a save could lose
            if found is None or not math.isfinite(found.loss):
                shown = "loss" if found is None else "validation loss"
                raise self._diverged(f"the last step was skipped, and the {shown} is not finite, either")

    def _diverged(self, what: str) -> DivergedError:
        self._saver.wait()
        step = self._saver.saved_at
        saved = None if step is None else checkpoint_path(self._folder.checkpoints, step)
        return diverged(f"step {self._step}: training has diverged: {what}", self._recipe.optimizer, saved)

    def _save_if_due(self, stop: bool) -> None:
        """Save before anything that takes time or may fail: at the end, on a request to stop, and at intervals.

        At an interval, a checkpoint waits for a step that is not skipped: until then it would hold nothing new.
        """
        self._save_is_due |= due(self._recipe.checkpoint.checkpoint_every, self._step)
        if stop or self._step == self._steps:
            self._save()
        elif self._save_is_due and not self._health.skipped_in_row:
            self._save(wait=False)

    def _evaluate(self, metrics: Metrics) -> None:
        """Validate, sample and compare the tied embedding, as far as each is due now and not done.

        Raises:
            Interrupted: a rank was requested to stop; the current step is saved.
        """
        every, last = self._recipe.evaluation, self._step >= self._steps
        if self._step == 0 or last or due(every.validate_every, self._step):
            self._validate(metrics)
        if not self._step:
            return
        if last or due(every.sample_every, self._step):
            self._sample(metrics)
        if last or due(self._recipe.parallel.check_tied_every, self._step):
            check_tied(self.engine.module)

    def _stop_is_agreed(self) -> bool:
        """Whether any rank was requested to stop. All ranks call it."""
        return largest([float(self._stop.requested)], self._device)[0] > 0

    def _interrupt(self) -> NoReturn:
        """Save the current step, unless that was done or it is the first, and end. All ranks call it."""
        self._saver.wait()
        if self._step and not self._saved_or_saving():
            self._save()
        raise Interrupted

    def take_step(self, metrics: Metrics) -> bool:
        """Take one optimizer step and record it in `metrics`; returns whether a rank was requested to stop."""
        engine, recipe = self.engine, self._recipe
        rate = learning_rate(
            self._step, self._steps, recipe.optimizer.learning_rate, self._warmup, recipe.schedule.min_lr_ratio
        )
        engine.optimizer.learning_rate = rate
        self._data_seconds = 0.0
        skipped_before = engine.skipped_steps
        begun = time.perf_counter()
        loss = float(engine.train_batch(self._feed))
        z_loss = float(engine.agg_additional_losses[Z_LOSS]) if engine.agg_additional_losses else None
        seconds = time.perf_counter() - begun
        self._step += 1
        if self._step == self._begun_at + 1:
            self._startup.done("first step")
            self.log(self._startup.describe())
            collect_on_request_only()
        skipped_here, odd_here = engine.skipped_steps > skipped_before, not math.isfinite(loss)
        saving = float(self._saver.busy)
        stop, data_seconds, memory, reserved, skipped, odd, saving = largest(
            [
                float(self._stop.requested),
                self._data_seconds,
                *peak_memory(self._device),
                float(skipped_here),
                float(odd_here),
                saving,
            ],
            self._device,
        )
        self._saver.poll(saving > 0)
        self._health.count(skipped > 0, not odd)
        rate_all = recipe.batch_tokens / seconds
        metrics.step(
            StepRecord(
                step=self._step,
                steps=self._steps,
                tokens=self._step * recipe.batch_tokens,
                loss=loss - (z_loss or 0.0),
                learning_rate=rate,
                grad_norm=engine.get_global_grad_norm(),
                step_seconds=seconds,
                tokens_per_second=rate_all,
                tokens_per_second_per_gpu=rate_all / self._layout.ranks,
                mfu=mfu(rate_all / self._layout.ranks, self._flops_per_token, self._peak_flops),
                memory_bytes=int(memory) if memory else None,
                memory_reserved=int(reserved) if memory else None,
                data_seconds=data_seconds,
                skipped=skipped > 0,
                skipped_so_far=engine.skipped_steps,
                z_loss=z_loss,
                eta_seconds=self._pace.remaining(self._step, seconds),
            )
        )
        return stop > 0

    def _validate(self, metrics: Metrics) -> Validation | None:
        """Validate, unless that is done for this step; None then, and without held-out documents."""
        if self._validator is None or VALIDATION in self._evaluated:
            return None

        def agree(seconds: float) -> tuple[bool, float]:
            stop, slowest = largest([float(self._stop.requested), seconds], self._device)
            return stop > 0, slowest

        found = self._validator(self.engine, agree, self.log)
        if found is None:
            self._interrupt()
        tokens = self._step * self._recipe.batch_tokens
        metrics.validation(self._step, tokens, found.loss, found.bits_per_byte, self._validator.samples)
        self._evaluated.add(VALIDATION)
        return found

    def _sample(self, metrics: Metrics) -> None:
        """Sample a continuation of each prompt that has none at this step."""
        evaluation = self._recipe.evaluation
        for number, prompt in enumerate(evaluation.sample_prompts):
            if sample_of(prompt) in self._evaluated:
                continue
            seed = hash_seed(self._recipe.schedule.seed, self._step, number)
            text: str | None = ""
            try:
                text = sample_text(
                    self.engine, self._prompting, prompt, evaluation.sample_tokens, seed, lambda: self._stop.requested
                )
            except DataError as error:  # logits that are not finite; the run has what it needs, and may recover
                self.log(f"no sample after step {self._step}: {error}")
            # Replicas draw for themselves, so a rank may know of the request that others have not seen yet.
            if self._stop_is_agreed() or text is None:
                self._interrupt()
            metrics.sample(self._step, prompt, text)
            self._evaluated.add(sample_of(prompt))

    def _saved_or_saving(self) -> bool:
        """Whether the current step has a checkpoint, or is being saved."""
        return self._step in (self._saver.saved_at, self._saver.step)

    def _save(self, wait: bool = True) -> None:
        """Save the current step. All ranks call it.

        Args:
            wait: whether to wait until the checkpoint is there. Without, a thread writes it while training goes on.

        Raises:
            DivergedError: a weight or an optimizer state is not finite, on any rank.
            WriteError: it cannot be written; only with `wait`.
            SaveError: the third save in a row has failed.
        """
        self._saver.wait()
        if wrong := find_not_finite(self.engine.optimizer, self._device):
            raise self._diverged(f"{wrong} is not finite")
        recipe = self._recipe
        manifest = CheckpointManifest(
            run_id=self._run_id,
            step=self._step,
            samples=self._step * recipe.batch.global_batch_size,
            tokens=self._step * recipe.batch_tokens,
            stages=self._layout.stages,
            replicas=self._layout.replicas,
            bounds=self.bounds,
            precision=self._precision.compute.value,
            recipe=recipe.model_dump(mode="json", exclude_none=True),
            data=self._mixture.fingerprint,
            versions={},
            template=self._mixture.template,
        )
        self._save_is_due = False
        if wait:
            self._saver.save(manifest)
        else:
            self._saver.begin(manifest)


def hash_seed(*parts: int) -> int:
    """Derive a 63-bit seed from some numbers; the same on every machine."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
