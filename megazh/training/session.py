"""Training of one run on one rank: what both engines do around a step.

A step is taken by the engine: `loop` has the pipelines of DeepSpeed, `hf.loop` the Trainer of Hugging Face. What comes
before and after it is here: the state that a run begins or goes on with, and then for each step its record, a
checkpoint (`checkpoints`), a validation and samples (`evaluations`), as far as each is due. All ranks call all methods,
in the same order.
"""

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megazh.model.sampling import SamplingOptions
from megazh.run.changes import Change
from megazh.run.folder import RunFolder
from megazh.run.metrics import VALIDATION, Metrics, StepRecord
from megazh.run.peaks import mfu, peak_flops
from megazh.run.pulse import beat
from megazh.run.state import State
from megazh.training.attempt_events import record_stop
from megazh.training.checkpoints import Checkpoints
from megazh.training.checks.course import check_consumed, course_of
from megazh.training.collect import largest
from megazh.training.commands import Commands
from megazh.training.control import Control, Interrupted, Reason
from megazh.training.describe import describe_devices
from megazh.training.evaluations import Evaluations
from megazh.training.feed import MicroBatch
from megazh.training.garbage import COLLECT_EVERY, collect_on_request_only
from megazh.training.gpu_memory import limit_memory, peak_memory
from megazh.training.guard import Guard, Verdict
from megazh.training.hang import limit_collectives, start_limit, step_limit
from megazh.training.held_out import HeldOut, Validation
from megazh.training.layout import Layout, make_layout
from megazh.training.live import LiveRecipe
from megazh.training.pace import Pace, due
from megazh.training.prompting import Prompting
from megazh.training.recipe import Device, Recipe, Spike, run_recipe
from megazh.training.sample_log import SampleLog
from megazh.training.slow_ranks import SlowRankWatch
from megazh.training.startup import Startup
from megazh.training.verdicts import end_if_diverged, end_without_data, skip_or_go_back


@dataclass(frozen=True)
class StepResult:
    """What this rank knows of a step that it has taken."""

    loss: float
    """Mean cross entropy in nats per token, the same on all ranks."""
    learning_rate: float
    grad_norm: float
    seconds: float
    data_seconds: float
    """Part of `seconds` spent waiting for samples."""
    busy_seconds: float = 0.0
    """Part of `seconds` that this rank computed by itself; 0 where that was not timed, see `SlowRankWatch.measures`."""
    z_loss: float | None = None


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step."""

    reason: Reason
    """The weightiest reason to stop that any rank knows."""
    verdict: Verdict
    """The guard's decision."""
    commands: bool
    """A command from another terminal waits."""


class Session(ABC):
    """The state of training on one rank. All ranks make one, with equal arguments except for the device."""

    engine_name: str
    """Engine, as `megazh pretrain -t` names it."""
    decides: bool = True
    """Whether the guard decides before each update; else loss and norm are known after it."""
    bounds: list[int]
    """Cut into stages, over the parts of the model."""
    state: Any
    """What holds this rank's weights and optimizer state: has `pieces_to_save()`, `pieces_to_load()`, `name` and
    `updates`."""
    metrics: Metrics
    """Records of the run, while it trains."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        layout: Layout,
        device: torch.device,
        control: Control,
        startup: Startup | None = None,
    ) -> None:
        """Open the data, and agree with the other ranks on the checkpoint to go on from.

        Args:
            run: the run's folder.
            recipe: the recipe.
            layout: the arrangement of the ranks.
            device: this rank's device.
            control: requests to stop, if any come.
            startup: the clock of this start.

        Raises:
            MegazhError: data or checkpoints fail, as the functions called here document.
        """
        self.startup = startup or Startup()
        self.folder, self.recipe, self.layout, self.device, self.control = run, recipe, layout, device, control
        self.live = LiveRecipe(recipe, run.changes())
        self.course, self.steps = recipe.course, recipe.course.steps
        """Optimizer steps of the run."""
        self.precision = recipe.precision.on(Device(device.type))
        limit_memory(device, recipe.parallel.memory_limit_gib)
        self.mixture = recipe.open_mixture()
        run.check_data(self.mixture)  # on another machine or a moment later, the paths may lead to other data
        self.tokenizer = run.tokenizer()
        self.prompting = Prompting(self.tokenizer, self.mixture.template)
        self.startup.done("data")
        self.run_id = run.info().run_id
        self.checkpoints = Checkpoints(self)
        found = self.checkpoints.found
        if found:
            check_consumed(run.path, found[1], course_of(found), self.course)
        self.step = found[1].step if found else 0
        """Optimizer steps done."""
        self.recipe = self.live.at(self.step)
        """The recipe of the step that comes next."""
        self.commands = Commands(self)
        spike = recipe.guard.spike if self.decides else Spike.IGNORE
        self.guard = Guard(recipe.guard.model_copy(update={"spike": spike}), found[1].guard if found else None)
        self.evaluations = Evaluations(self)
        self.held_out: HeldOut | None = None
        """The samples of a validation, where `open_held_out` has opened them; None without held-out documents."""
        self.has_stepped = False
        """Whether this attempt has taken a step."""
        self._samples = self._sample_log() if recipe.logging.samples else None
        self._pace = Pace(self.step, self.course)
        self.slow_ranks = SlowRankWatch(self)
        self._flops_per_token = recipe.flops_per_token.total
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self._peak_flops = peak_flops(name, recipe.logging.peak_tflops)

    # What each engine does in its own way.

    @abstractmethod
    def run(self) -> None:
        """Train all remaining steps, validate and sample, and mark the run as complete.

        Raises:
            MegazhError: data, checkpoint or machine fail, as the functions called here document.
            DivergedError: steps or weights are not finite; nothing more was saved.
            Interrupted: a rank was requested to stop; a checkpoint of the last finished step is written.
        """

    @abstractmethod
    def compute_validation(self, held_out: HeldOut) -> Validation | None:
        """Validate; None where a rank was requested to stop meanwhile."""

    @abstractmethod
    def generate(self, prompt: str, tokens: int, seed: int, options: SamplingOptions) -> str | None:
        """Continue a prompt by up to `tokens` tokens; None where it was stopped. Raises DataError: logits are not
        finite, UsageError: the prompt has no token."""

    def complete_folder(self, folder: Path) -> None:  # noqa: B027 (most engines add nothing)
        """Add files to the folder of a checkpoint, before it gets its name; called in a thread of rank 0."""

    # What they do alike.

    @property
    def recorded_recipe(self) -> Recipe:
        """The recipe with what the ranks have decided."""
        return self.recipe

    def log(self, line: str) -> None:
        """Print a line once, on rank 0."""
        if dist.get_rank() == 0:
            print(line, flush=True)

    def _sample_log(self) -> SampleLog:
        rank = dist.get_rank()
        stage = rank // self.layout.replicas
        return SampleLog(self.folder.logs, rank, len(self.folder.info().attempts), stage)

    def watched(self, feed: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """A feed whose micro-batches are noted where the recipe has `logging.samples`."""
        return self._samples.watch(feed) if self._samples else feed

    def open_held_out(self, replica: int) -> None:
        """Open the samples of a validation, where the manifest holds out documents.

        Args:
            replica: number of this rank's replica.
        """
        validation, limit = self.mixture.manifest.validation, self.recipe.evaluation.validation_samples
        if validation and validation.fraction:
            held_out = HeldOut(self.mixture.validation, self.layout, replica, limit, self.tokenizer)
            self.held_out = held_out if held_out.samples else None

    def restart_feed(self) -> None:
        """Feed from the current step on; called after a rollback, and so only where the guard decides."""
        raise NotImplementedError

    def record(self, result: StepResult) -> Agreed:
        """Count and record a step; returns what all ranks know of it."""
        self.step += 1
        beat("training", step=self.step)
        if not self.has_stepped:
            self.has_stepped = True
            limit_collectives(step_limit(self.recipe.control.hang_minutes * 60))
            self.startup.done("first step")
            self.log(self.startup.describe())
            collect_on_request_only()
        reason, data_seconds, memory, reserved, verdict, saving, commands, *busy_seconds = largest(
            [
                float(self.control.reason),
                result.data_seconds,
                *peak_memory(self.device),
                float(self.guard.verdict),
                float(self.checkpoints.saver.busy),
                float(self.commands.waiting),
                *self.slow_ranks.shared(self.step, result.busy_seconds),
            ],
            self.device,
        )
        if self._samples:
            self._samples.note(self.step)
        self.checkpoints.saver.poll(saving > 0)
        self.commands.settle()
        agreed = Agreed(_noted(reason), Verdict(int(verdict)), commands > 0)
        self.guard.count(self.step, agreed.verdict)
        rate_all = self.course.tokens(self.step - 1) / result.seconds
        rate = rate_all / self.layout.ranks
        self.metrics.step(
            StepRecord(
                step=self.step,
                steps=self.steps,
                tokens=self.course.tokens_before(self.step),
                loss=result.loss,
                learning_rate=result.learning_rate,
                grad_norm=result.grad_norm,
                step_seconds=result.seconds,
                tokens_per_second=rate_all,
                tokens_per_second_per_gpu=rate,
                mfu=mfu(rate, self._flops_per_token, self._peak_flops),
                memory_bytes=int(memory) if memory else None,
                memory_reserved=int(reserved) if memory else None,
                data_seconds=data_seconds,
                skipped=self.decides and agreed.verdict is not Verdict.ACCEPTED,
                skipped_so_far=self.guard.skipped if self.decides else 0,
                z_loss=result.z_loss,
                eta_seconds=self._pace.remaining(self.step, result.seconds),
            )
        )
        self.slow_ranks.follow(self.step, busy_seconds)
        self.recipe = self.live.at(self.step)
        return agreed

    def after_step(self, agreed: Agreed) -> None:
        """Save, validate and sample after a step that is recorded, as far as each is due.

        Raises:
            DivergedError: as `end_if_diverged`.
            DataError: as `end_without_data`.
            Interrupted: a rank was requested to stop; the step is saved.
        """
        self.evaluations.done = set()
        end_if_diverged(self)
        went_back = skip_or_go_back(self)
        if not went_back:
            self.checkpoints.save_if_due(bool(agreed.reason))
        if agreed.reason:
            raise record_stop(self, self.agreed_reason())  # a person may have stopped the run while it was saved
        end_without_data(self)
        if not went_back:
            self.evaluate()
        if agreed.commands and not self.last:
            self.commands.carry_out()
        if self.step < self.steps and (self.checkpoints.saved_or_saving or VALIDATION in self.evaluations.done):
            self.metrics.draw()
            gc.collect()
        elif due(COLLECT_EVERY, self.step):
            gc.collect()

    def go_back(self, step: int) -> None:
        """Go on from step `step`, whose state is read."""
        self.step = step
        self.recipe = self.live.at(step)
        self.checkpoints.go_back(step)
        self.evaluations.look_up()
        self._pace = Pace(step, self.course)
        self.restart_feed()

    @property
    def last(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps

    def begin_evaluating(self) -> None:
        """Evaluate a new run, or what an interruption prevented, before the first step.

        Raises:
            Interrupted: a rank was requested to stop.
            UsageError: the deadline is over before the first step.
        """
        limit_collectives(start_limit(self.recipe.control.hang_minutes * 60))
        reason = self.agreed_reason()
        self.control.begin()
        if reason:
            raise record_stop(self, reason)  # there is nothing to save
        self.evaluations.look_up()
        self.evaluate()
        end_without_data(self)
        self.commands.state(State.TRAINING)
        self.commands.carry_out()
        self.startup.done("validation")

    def evaluate(self) -> None:
        """Validate and sample, as far as each is due now and not done.

        Raises:
            Interrupted: a rank was requested to stop; the current step is saved.
        """
        self.evaluations.evaluate()

    def change(self, changes: list[Change]) -> None:
        """Go on with changed settings from the next step on; `changes` are all those of the run."""
        self.live.change(changes)
        self.recipe = self.live.at(self.step)

    def rate(self, step: int) -> float:
        """The learning rate of the optimizer step after `step` steps."""
        return self.live.rate(step)

    def agreed_reason(self) -> Reason:
        """The weightiest reason to stop that any rank knows."""
        return _noted(largest([float(self.control.reason)], self.device)[0])

    def stop_is_agreed(self) -> bool:
        """Whether any rank was requested to stop."""
        return bool(self.agreed_reason())

    def interrupt(self) -> NoReturn:
        """Save the current step, unless that was done or it is the first, and end."""
        self.commands.state(State.STOPPING)
        self.agreed_reason()  # which the launcher learns, in case that it has to end ranks that save for too long
        self.checkpoints.save_now()
        raise record_stop(self, self.agreed_reason())


def train_as(engine: type[Session], path: Path, device: torch.device, control: Control, startup: Startup) -> None:
    """Train the run in folder `path` to its end, with an engine. All ranks call it.

    Args:
        engine: the engine's class.
        path: the run folder; its config.yaml holds the recipe with the layout.
        device: this rank's device.
        control: requests to stop, if any come.
        startup: the clock of this start.

    Raises:
        MegazhError, Interrupted: as `Session.run`.
    """
    run = RunFolder(path)
    recipe = run_recipe(run)
    session = engine(run, recipe, make_layout(recipe, dist.get_world_size()), device, control, startup)
    devices = describe_devices(device)
    if dist.get_rank() == 0:
        run.record(session.recorded_recipe.to_yaml())
        run.add_devices(devices, {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {})
    try:
        session.run()
    except Interrupted as error:
        session.commands.close(error.reason)
        raise
    finally:
        session.commands.close(Reason.NONE)


def _noted(number: float) -> Reason:
    """The reason of that number; where there is one, the launcher learns of it, too."""
    reason = Reason(int(number))
    if reason:
        beat("stopping", reason=reason)
    return reason
