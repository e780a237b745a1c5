"""The training loop of the pipeline engine: build or resume, then take steps."""

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megazh.model.backend import choose_backend
from megazh.model.sampling import SamplingOptions
from megazh.pipeline.engine import check_tied, make_engine, quiet
from megazh.pipeline.module import Z_LOSS, DecoderPipeline
from megazh.run.folder import RunFolder
from megazh.training.attempt_events import open_metrics
from megazh.training.collect import largest
from megazh.training.control import Control
from megazh.training.cut import agree_on_bounds
from megazh.training.describe import describe_kernels
from megazh.training.evaluate import sample_text, validate
from megazh.training.feed import MicroBatch, training_feed
from megazh.training.held_out import HeldOut, Validation
from megazh.training.layout import Layout
from megazh.training.optimizers.choose import rules
from megazh.training.pace import due
from megazh.training.recipe import Kernels, Recipe
from megazh.training.session import Agreed, Session, StepResult, train_as
from megazh.training.stages import describe_parts, work_of
from megazh.training.startup import Startup


def train(path: Path, device: torch.device, control: Control, startup: Startup) -> None:
    """Train the run in folder `path` to its end; see `megazh.training.session.train_as`."""
    train_as(Trainer, path, device, control, startup)


class Trainer(Session):
    """Training by DeepSpeed's pipeline engine."""

    engine_name = "ds_pp"

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        layout: Layout,
        device: torch.device,
        control: Control,
        startup: Startup | None = None,
    ) -> None:
        super().__init__(run, recipe, layout, device, control, startup)
        kernels = recipe.parallel.kernels is Kernels.AUTO
        backend = choose_backend(recipe.model, device, self.precision.compute.torch, kernels, recipe.low_rank)
        self.work = work_of(recipe, layout, self.precision, backend)
        self.bounds = self._bounds()
        stages = (describe_parts(recipe, begin, end) for begin, end in pairwise(self.bounds))
        self.log(f"{'stages':<12}{' | '.join(stages)}")
        if device.type == "cuda":
            self.log(f"{'kernels':<12}{describe_kernels(recipe, device, self.work)}")
        self.startup.done("stages")
        self.engine = self._make_engine()
        self.startup.done("engine")
        self.state = self.engine.optimizer
        self.state.accept = self.guard.accept
        self.checkpoints.load()
        self._replica = self.engine.module.mpu().get_data_parallel_rank()
        self._data_seconds = 0.0
        self.restart_feed()
        self.open_held_out(self._replica)
        self.startup.done("validation data")

    def _bounds(self) -> list[int]:
        """The cut into stages: the recipe's, else that of a checkpoint of as many stages, else the best one."""
        found = self.checkpoints.found
        saved = found[1] if found else None
        if saved and saved.stages == self.layout.stages and self.recipe.parallel.stage_bounds is None:
            return saved.bounds
        return agree_on_bounds(self.recipe, self.work, self.device)

    @property
    def recorded_recipe(self) -> Recipe:
        """The recipe with the cut into stages."""
        return self.recipe.with_cut(self.bounds)

    def _make_engine(self) -> Any:
        recipe = self.recipe
        with quiet():
            module = DecoderPipeline(
                self.work, self.bounds, recipe.schedule.seed, recipe.optimizer.z_loss, recipe.parallel.cuda_graph
            )
        self.startup.done("model")
        optimizer = recipe.optimizer
        return make_engine(module, optimizer.name.value, rules(optimizer), self.work, optimizer.max_grad_norm)

    def restart_feed(self) -> None:
        """See `Session`."""
        self._feed: Iterator[MicroBatch] | None = None  # ends the threads of the one before
        module: DecoderPipeline = self.engine.module
        if module.is_first or module.is_last:
            workers, passed = self.recipe.data.workers, self.guard.samples_passed
            feed = training_feed(self.mixture, self.layout, self._replica, self.step, workers, self.course, passed)
            self._feed = self._timed(self.watched(feed))

    def _timed(self, feed: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        while True:
            begun = time.perf_counter()
            batch = next(feed, None)
            self._data_seconds += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def run(self) -> None:
        """Train all remaining steps; see `Session.run`."""
        with open_metrics(self) as self.metrics:
            self.begin_evaluating()
            while self.step < self.steps:
                self.after_step(self.take_step())
        self.checkpoints.finish()

    def take_step(self) -> Agreed:
        """Take one optimizer step and record it."""
        engine, rate = self.engine, self.rate(self.step)
        engine.optimizer.learning_rate = rate
        engine.set_train_batch_size(self.course.samples(self.step))
        self._data_seconds = 0.0
        self.guard.begin_step(self.course.samples(self.step), self.course.length(self.step))
        engine.clock.begin(self.slow_ranks.measures(self.step + 1))
        begun = time.perf_counter()
        loss = float(engine.train_batch(self._feed))
        z_loss = float(engine.agg_additional_losses[Z_LOSS]) if engine.agg_additional_losses else None
        return self.record(
            StepResult(
                loss=loss - (z_loss or 0.0),
                learning_rate=rate,
                grad_norm=engine.get_global_grad_norm(),
                seconds=time.perf_counter() - begun,
                data_seconds=self._data_seconds,
                z_loss=z_loss,
                busy_seconds=engine.clock.end(),
            )
        )

    def evaluate(self) -> None:
        """Validate, sample, and compare the copies of the tied embedding, as far as each is due."""
        super().evaluate()
        if self.step and (self.last or due(self.recipe.parallel.check_tied_every, self.step)):
            check_tied(self.engine.module)

    def compute_validation(self, held_out: HeldOut) -> Validation | None:
        """See `Session`."""

        def agree(seconds: float) -> tuple[bool, float]:
            stop, slowest = largest([float(self.control.reason), seconds], self.device)
            return stop > 0, slowest

        return validate(self.engine, held_out, agree, self.log)

    def generate(self, prompt: str, tokens: int, seed: int, options: SamplingOptions) -> str | None:
        """See `Session`."""
        return sample_text(
            self.engine, self.prompting, prompt, tokens, seed, lambda: bool(self.control.reason), options
        )
