"""A run under Hugging Face's Trainer, which calls back after each of its steps."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging as transformers_logging

from megazh.errors import WorkerError
from megazh.model.sampling import SamplingOptions
from megazh.pipeline.busy_clock import BusyClock
from megazh.pipeline.engine import quiet
from megazh.run.changes import Change
from megazh.run.folder import RunFolder
from megazh.training.attempt_events import open_metrics
from megazh.training.control import Control
from megazh.training.held_out import HeldOut, Validation
from megazh.training.hf.deepspeed import zero_config
from megazh.training.hf.evaluate import sample_text, validate
from megazh.training.hf.folder import write_folder
from megazh.training.hf.model import PackedModel
from megazh.training.hf.state import TrainingState
from megazh.training.hf.trainer import HfTrainer, trainer_arguments
from megazh.training.layout import Layout
from megazh.training.recipe import Kernels, Recipe
from megazh.training.session import Session, StepResult, train_as
from megazh.training.startup import Startup


def train(path: Path, device: torch.device, control: Control, startup: Startup) -> None:
    """Train the run in folder `path` to its end; see `megazh.training.session.train_as`."""
    train_as(HfRun, path, device, control, startup)


class HfRun(Session, TrainerCallback):
    """Training by Hugging Face's Trainer."""

    engine_name = "hf"
    decides = False  # the Trainer updates before it tells of the loss

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        layout: Layout,
        device: torch.device,
        control: Control,
        startup: Startup | None = None,
    ) -> None:
        transformers_logging.set_verbosity_error()
        # It warns that the Trainer tells it of one micro-batch per step, and DeepSpeed's configuration of all of them.
        logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
        super().__init__(run, recipe, layout, device, control, startup)
        self.bounds = [0, recipe.model.num_hidden_layers + 2]
        self._model = PackedModel(
            recipe.model,
            recipe.batch.seq_len,
            recipe.schedule.seed,
            self.precision.compute.torch,
            device,
            recipe.parallel.kernels is Kernels.AUTO,
            recipe.parallel.activation_checkpointing,
        )
        self._clock = BusyClock(device)
        # Forward passes alone: backward passes overlap with the reduction, which waits for other ranks. These hooks are
        # inside of what wraps the model, and so behind what that exchanges.
        self._model.register_forward_pre_hook(lambda *_: self._clock.start())
        self._model.register_forward_hook(lambda *_: self._clock.stop())
        self.startup.done("model")
        self.open_held_out(dist.get_rank())
        self.startup.done("validation data")
        with quiet():
            arguments = trainer_arguments(
                run, recipe, layout, self.precision, self.steps - self.step, device.type == "cpu"
            )
            self._trainer = HfTrainer(
                self._model, arguments, recipe, layout, self.mixture, self.step, self, self.rate, self.watched
            )
        self.startup.done("trainer")

    def run(self) -> None:
        """Train all remaining steps; see `Session.run`."""
        with open_metrics(self) as self.metrics:
            self._trainer.train()
        if not self.last:
            raise WorkerError(f"step {self.step} of {self.steps}: the data has no samples left")
        self.checkpoints.finish()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the state, once the Trainer has prepared model and optimizer; evaluate a new run."""
        sharded = zero_config(self.recipe, self.layout, self.precision) is not None
        self.state = TrainingState(self._model, self._trainer.base_optimizer, sharded, dist.get_rank())
        self.startup.done("optimizer")
        self.checkpoints.load()
        self.begin_evaluating()
        self._begin_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record the step that the Trainer has just taken; save, validate and sample as far as each is due."""
        if "grad_norm" not in logs:
            return  # the Trainer's own summary at its end
        loss, norm = logs["loss"], float(logs["grad_norm"])
        result = StepResult(
            loss=loss,
            learning_rate=self.rate(self.step),
            grad_norm=norm,
            seconds=time.perf_counter() - self._step_begun,
            data_seconds=self._trainer.data_seconds,
            busy_seconds=self._clock.end(),
        )
        self.guard.accept(loss, norm)
        self.after_step(self.record(result))
        self._begin_step()

    def _begin_step(self) -> None:
        self._trainer.data_seconds = 0.0
        self._clock.begin(self.slow_ranks.measures(self.step + 1))
        self._step_begun = time.perf_counter()

    def compute_validation(self, held_out: HeldOut) -> Validation | None:
        """See `Session`."""
        return validate(self._model, held_out, self.stop_is_agreed, self.log)

    def generate(self, prompt: str, tokens: int, seed: int, options: SamplingOptions) -> str | None:
        """See `Session`."""
        return sample_text(
            self._model, self.prompting, prompt, tokens, seed, lambda: bool(self.control.reason), options
        )

    def change(self, changes: list[Change]) -> None:
        """Go on with changed settings; the Trainer has prepared the rate of the next step already."""
        super().change(changes)
        self._trainer.set_rate(self.rate(self.step))

    def complete_folder(self, folder: Path) -> None:
        """Make a checkpoint a folder that transformers reads."""
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        template = self.mixture.template
        write_folder(folder, self.recipe, self.tokenizer, dtype, template.stop if template else None)
