"""A run under Hugging Face's Trainer: build or resume, then log, validate, sample and save after its steps."""

import gc
import logging
import math
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging as transformers_logging

from megazh.errors import DataError, DivergedError, WorkerError
from megazh.pipeline.engine import quiet
from megazh.run.folder import RunFolder
from megazh.run.metrics import VALIDATION, Metrics, StepRecord, sample_of
from megazh.run.peaks import mfu, peak_flops
from megazh.training.checkpoint_list import CheckpointManifest, checkpoint_path
from megazh.training.checkpoint_read import load_checkpoint
from megazh.training.collect import largest, of_rank_0
from megazh.training.describe import describe_devices
from megazh.training.evaluate import Validation
from megazh.training.garbage import COLLECT_EVERY, collect_on_request_only
from megazh.training.gpu_memory import limit_memory, peak_memory
from megazh.training.health import diverged, find_not_finite
from megazh.training.hf.deepspeed import zero_config
from megazh.training.hf.evaluate import HfValidator, sample_text
from megazh.training.hf.folder import write_folder
from megazh.training.hf.model import PackedModel
from megazh.training.hf.state import TrainingState
from megazh.training.hf.trainer import HfTrainer, trainer_arguments
from megazh.training.layout import Layout, make_layout
from megazh.training.loop import Interrupted, hash_seed
from megazh.training.pace import Pace, due
from megazh.training.prompting import Prompting
from megazh.training.recipe import Device, Kernels, Recipe, Resume, run_recipe
from megazh.training.resume import agree_on_checkpoint, agree_on_initial
from megazh.training.retention import keep_rule, prune, validation_losses
from megazh.training.saver import Saver, mark_complete
from megazh.training.startup import Startup
from megazh.training.stop import StopRequest

ENGINE = "hf"


def train(path: Path, device: torch.device, stop: StopRequest, startup: Startup) -> None:
    """Train the run in folder `path` to its end; arguments and errors as for `megazh.training.loop.train`."""
    run = RunFolder(path)
    recipe = run_recipe(run)
    hf_run = HfRun(run, recipe, make_layout(recipe, dist.get_world_size()), device, stop, startup)
    devices = describe_devices(device)
    if dist.get_rank() == 0:
        run.record(recipe.to_yaml())
        run.add_devices(devices, {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {})
    hf_run.run()


class HfRun(TrainerCallback):
    """The state of training on one rank, which the Trainer calls back. All ranks make one, with equal arguments."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        layout: Layout,
        device: torch.device,
        stop: StopRequest,
        startup: Startup,
    ) -> None:
        transformers_logging.set_verbosity_error()
        # It warns that the Trainer tells it of one micro-batch per step, and DeepSpeed's configuration of all of them.
        logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
        self._folder, self._recipe, self._layout, self._device = run, recipe, layout, device
        self._stop, self._startup = stop, startup
        self._steps = recipe.total_steps
        self._precision = recipe.precision.on(Device(device.type))
        limit_memory(device, recipe.parallel.memory_limit_gib)
        self._mixture = recipe.open_mixture()
        run.check_data(self._mixture)  # on another machine or a moment later, the paths may lead to other data
        self._tokenizer = run.tokenizer()
        self._prompting = Prompting(self._tokenizer, self._mixture.template)
        self._startup.done("data")
        self._run_id = run.info().run_id
        resume = recipe.checkpoint.resume
        named = None if isinstance(resume, Resume) else resume
        self._found = agree_on_checkpoint(run.checkpoints, self._run_id, self.log, named)
        self._step = self._begun_at = self._found[1].step if self._found else 0
        self._model = PackedModel(
            recipe.model,
            recipe.batch.seq_len,
            recipe.schedule.seed,
            self._precision.compute.torch,
            device,
            recipe.parallel.kernels is Kernels.AUTO,
            recipe.parallel.activation_checkpointing,
        )
        self._startup.done("model")
        self._validator = self._make_validator()
        self._startup.done("validation data")
        with quiet():
            arguments = trainer_arguments(
                run, recipe, layout, self._precision, self._steps - self._step, device.type == "cpu"
            )
            self._trainer = HfTrainer(self._model, arguments, recipe, layout, self._mixture, self._step, self)
        self._startup.done("trainer")
        self._flops_per_token = recipe.flops_per_token.total
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self._peak_flops = peak_flops(name, recipe.logging.peak_tflops)
        self._pace = Pace(self._step, self._steps)
        self._evaluated: set[str] = set()
        """Evaluations that are done for the current step, see `_evaluate`."""
        self._metrics: Metrics
        self._state: TrainingState
        self._saver: Saver

    def log(self, line: str) -> None:
        """Print a line once, on rank 0."""
        if dist.get_rank() == 0:
            print(line, flush=True)

    def run(self) -> None:
        """Train all remaining steps, validate and sample, and mark the run as complete."""
        with Metrics(self._folder.path, self._step, quiet=dist.get_rank() != 0) as self._metrics:
            self._trainer.train()
        if self._step < self._steps:
            raise WorkerError(f"step {self._step} of {self._steps}: the data has no samples left")
        self._saver.wait()
        mark_complete(checkpoint_path(self._folder.checkpoints, self._step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the state, once the Trainer has prepared model and optimizer; evaluate a new run."""
        sharded = zero_config(self._recipe, self._layout, self._precision) is not None
        self._state = TrainingState(self._model, self._trainer.base_optimizer, sharded, dist.get_rank())
        self._startup.done("optimizer")
        self._load()
        self._saver = Saver(self._state, self._folder.checkpoints, self.log, self._retain, self._complete_folder)
        self._saver.saved_at = self._found[1].step if self._found else None
        self._saver.check_room()  # now, not after hours
        if self._stop_is_agreed():
            raise Interrupted  # during start-up: there is nothing to save
        self._evaluated = of_rank_0(self._metrics.evaluated_at(self._step))
        self._evaluate()
        self._startup.done("validation")
        self._begin_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record a step, and save, validate and sample as far as each is due; stop on request."""
        if "grad_norm" not in logs:
            return  # the Trainer's own summary at its end
        stop = self._record(logs)
        self._evaluated = set()
        last = self._step == self._steps
        if stop or last:
            self._save()
        elif due(self._recipe.checkpoint.checkpoint_every, self._step):
            self._save(wait=False)
        if stop:
            raise Interrupted
        self._evaluate()
        if not last and (self._saved_or_saving() or VALIDATION in self._evaluated):
            self._metrics.draw()
            gc.collect()
        elif due(COLLECT_EVERY, self._step):
            gc.collect()
        self._begin_step()

    def _begin_step(self) -> None:
        self._trainer.data_seconds = 0.0
        self._step_begun = time.perf_counter()

    def _load(self) -> None:
        """Restore the state of a checkpoint or, where the run begins, the weights that the recipe names."""
        initial = self._recipe.checkpoint.initial_checkpoint
        found, begins = self._found, self._found is None
        if found is None and initial is not None:
            found = agree_on_initial(Path(initial))
        if found is None:
            return
        path, manifest = found
        load_checkpoint(self._state, path, manifest, self.log, weights_only=begins)
        if wrong := find_not_finite(self._state, self._device):
            remedy = "name other weights" if begins else "remove this checkpoint to resume from the one before it"
            raise DataError(f"{path}: {wrong} is not finite: training had diverged; {remedy}")
        self._startup.done("checkpoint")
        if begins:
            origin = f", step {manifest.step} of run {manifest.run_id}" if manifest.step else ""
            self.log(f"weights are those of {path}{origin}")
        else:
            self.log(f"resumed at step {self._step} of {self._steps}")

    def _make_validator(self) -> HfValidator | None:
        validation = self._mixture.manifest.validation
        if not validation or not validation.fraction:
            return None
        limit = self._recipe.evaluation.validation_samples
        return HfValidator(self._mixture.validation, self._layout, dist.get_rank(), limit, self._tokenizer)

    def _record(self, logs: dict[str, float]) -> bool:
        """Record the step that the Trainer has just taken; returns whether a rank was requested to stop.

        Raises:
            DivergedError: its loss or gradient is not finite.
        """
        seconds = time.perf_counter() - self._step_begun
        self._step += 1
        if self._step == self._begun_at + 1:
            self._startup.done("first step")
            self.log(self._startup.describe())
            collect_on_request_only()
        recipe, loss, norm = self._recipe, logs["loss"], float(logs["grad_norm"])
        stop, data_seconds, memory, reserved, saving, odd = largest(
            [
                float(self._stop.requested),
                self._trainer.data_seconds,
                *peak_memory(self._device),
                float(self._saver.busy),
                # DeepSpeed gives -1 for a norm that is not finite.
                float(not (math.isfinite(loss) and math.isfinite(norm) and norm >= 0)),
            ],
            self._device,
        )
        self._saver.poll(saving > 0)
        rate_all = recipe.batch_tokens / seconds
        self._metrics.step(
            StepRecord(
                step=self._step,
                steps=self._steps,
                tokens=self._step * recipe.batch_tokens,
                loss=loss,
                learning_rate=self._trainer.rate(self._step - 1),
                grad_norm=norm,
                step_seconds=seconds,
                tokens_per_second=rate_all,
                tokens_per_second_per_gpu=rate_all / self._layout.ranks,
                mfu=mfu(rate_all / self._layout.ranks, self._flops_per_token, self._peak_flops),
                memory_bytes=int(memory) if memory else None,
                memory_reserved=int(reserved) if memory else None,
                data_seconds=data_seconds,
                skipped=False,
                skipped_so_far=0,
                eta_seconds=self._pace.remaining(self._step, seconds),
            )
        )
        if odd > 0:
            raise self._diverged(f"loss {loss:g} or gradient norm {norm:g} is not finite")
        return stop > 0

    def _stop_is_agreed(self) -> bool:
        """Whether any rank was requested to stop. All ranks call it."""
        return largest([float(self._stop.requested)], self._device)[0] > 0

    def _interrupt(self) -> NoReturn:
        """Save the current step, unless that was done or it is the first, and end. All ranks call it."""
        self._saver.wait()
        if self._step and not self._saved_or_saving():
            self._save()
        raise Interrupted

    def _evaluate(self) -> None:
        """Validate and sample, as far as each is due now and not done.

        Raises:
            Interrupted: a rank was requested to stop; the current step is saved.
        """
        every, last = self._recipe.evaluation, self._step >= self._steps
        if self._step == 0 or last or due(every.validate_every, self._step):
            self._validate()
        if self._step and (last or due(every.sample_every, self._step)):
            self._sample()

    def _validate(self) -> None:
        if self._validator is None or VALIDATION in self._evaluated:
            return
        found: Validation | None = self._validator(self._model, self._stop_is_agreed, self.log)
        if found is None:
            self._interrupt()
        tokens = self._step * self._recipe.batch_tokens
        self._metrics.validation(self._step, tokens, found.loss, found.bits_per_byte, self._validator.samples)
        self._evaluated.add(VALIDATION)

    def _sample(self) -> None:
        """Sample a continuation of each prompt that has none at this step."""
        evaluation = self._recipe.evaluation
        for number, prompt in enumerate(evaluation.sample_prompts):
            if sample_of(prompt) in self._evaluated:
                continue
            seed = hash_seed(self._recipe.schedule.seed, self._step, number)
            text: str | None = ""
            try:
                text = sample_text(
                    self._model, self._prompting, prompt, evaluation.sample_tokens, seed, lambda: self._stop.requested
                )
            except DataError as error:  # logits that are not finite; the run has what it needs, and may recover
                self.log(f"no sample after step {self._step}: {error}")
            # Ranks draw for themselves, so one may know of the request that others have not seen yet.
            if self._stop_is_agreed() or text is None:
                self._interrupt()
            self._metrics.sample(self._step, prompt, text)
            self._evaluated.add(sample_of(prompt))

    def _saved_or_saving(self) -> bool:
        """Whether the current step has a checkpoint, or is being saved."""
        return self._step in (self._saver.saved_at, self._saver.step)

    def _save(self, wait: bool = True) -> None:
        """Save the current step. All ranks call it; arguments and errors as in `megazh.training.loop`."""
        self._saver.wait()
        if wrong := find_not_finite(self._state, self._device):
            raise self._diverged(f"{wrong} is not finite")
        recipe = self._recipe
        manifest = CheckpointManifest(
            run_id=self._run_id,
            step=self._step,
            samples=self._step * recipe.batch.global_batch_size,
            tokens=self._step * recipe.batch_tokens,
            stages=1,
            replicas=self._layout.replicas,
            bounds=[0, recipe.model.num_hidden_layers + 2],
            precision=self._precision.compute.value,
            engine=ENGINE,
            recipe=recipe.model_dump(mode="json", exclude_none=True),
            data=self._mixture.fingerprint,
            versions={},
            template=self._mixture.template,
        )
        if wait:
            self._saver.save(manifest)
        else:
            self._saver.begin(manifest)

    def _diverged(self, what: str) -> DivergedError:
        self._saver.wait()
        step = self._saver.saved_at
        saved = None if step is None else checkpoint_path(self._folder.checkpoints, step)
        return diverged(f"step {self._step}: training has diverged: {what}", self._recipe.optimizer, saved)

    def _complete_folder(self, folder: Path) -> None:
        """Make a checkpoint a folder that transformers reads; called in a thread of rank 0."""
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        template = self._mixture.template
        write_folder(folder, self._recipe, self._tokenizer, dtype, template.stop if template else None)

    def _retain(self, saved: Path) -> list[str]:
        """Remove the checkpoints that are no longer to be kept; called in a thread of rank 0."""
        losses = validation_losses(self._folder.path)
        return prune(saved.parent, keep_rule(self._recipe), losses, int(saved.name.removeprefix("step_")))
