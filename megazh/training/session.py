"""Training of one run on one rank: what both engines do around a step.

A step is taken by the engine: `loop` has the pipelines of DeepSpeed, `hf.loop` the Trainer of Hugging Face. What comes
before and after it is here: the state that a run begins or goes on with, and then for each step its record, a
checkpoint, a validation and samples, as far as each is due. All ranks call all methods, in the same order.
"""

import gc
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megazh.errors import DataError, DivergedError, UsageError
from megazh.model.sampling import SamplingOptions
from megazh.run.changes import Change
from megazh.run.folder import RunFolder
from megazh.run.metrics import VALIDATION, Metrics, StepRecord, sample_of
from megazh.run.peaks import mfu, peak_flops
from megazh.run.pulse import beat
from megazh.run.state import State
from megazh.run.trackers.start import TRACKERS
from megazh.run.trackers.tracker import TrackedRun
from megazh.training.checkpoint_list import CheckpointManifest, checkpoint_path, step_of
from megazh.training.checkpoint_read import load_checkpoint
from megazh.training.checks.course import check_consumed, course_of
from megazh.training.collect import largest, of_rank_0
from megazh.training.commands import Commands
from megazh.training.control import Control, Interrupted, Reason
from megazh.training.describe import describe_devices
from megazh.training.evaluate import SAMPLING
from megazh.training.feed import MicroBatch
from megazh.training.garbage import COLLECT_EVERY, collect_on_request_only
from megazh.training.gpu_memory import limit_memory, peak_memory
from megazh.training.guard import Guard, Verdict
from megazh.training.hang import limit_collectives, start_limit, step_limit
from megazh.training.health import diverged, find_not_finite
from megazh.training.held_out import Validation
from megazh.training.layout import Layout, make_layout
from megazh.training.live import LiveRecipe
from megazh.training.pace import Pace, due
from megazh.training.prompting import Prompting
from megazh.training.recipe import Device, Recipe, Resume, Spike, run_recipe
from megazh.training.resume import Found, agree_on_checkpoint, agree_on_initial
from megazh.training.retention import keep_rule, prune, validation_losses
from megazh.training.rollback import roll_back
from megazh.training.sample_log import SampleLog
from megazh.training.saver import Saver, mark_complete
from megazh.training.startup import Startup


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
    saver: Saver
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
        resume = recipe.checkpoint.resume
        named = None if isinstance(resume, Resume) else resume
        self.found: Found | None = agree_on_checkpoint(run.checkpoints, self.run_id, self.log, named)
        """The checkpoint that the run goes on from; None where it begins."""
        if self.found:
            check_consumed(run.path, self.found[1], course_of(self.found), self.course)
        self.step = self.found[1].step if self.found else 0
        """Optimizer steps done."""
        self.recipe = self.live.at(self.step)
        """The recipe of the step that comes next."""
        self.commands = Commands(self)
        spike = recipe.guard.spike if self.decides else Spike.IGNORE
        self.guard = Guard(
            recipe.guard.model_copy(update={"spike": spike}), self.found[1].guard if self.found else None
        )
        self.evaluated: set[str] = set()
        """Evaluations that are done for the current step, see `evaluate`."""
        every, row = recipe.checkpoint.checkpoint_every, self.guard.skipped_in_row
        self._save_is_due = bool(every and row) and self.step // every > (self.step - row) // every
        """Whether a checkpoint waits for a step that is not skipped."""
        self._has_stepped = False
        self._samples = self._sample_log() if recipe.logging.samples else None
        self._pace = Pace(self.step, self.course)
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

    @property
    @abstractmethod
    def validation_samples(self) -> int:
        """Samples that a validation takes; 0 without held-out documents."""

    @abstractmethod
    def compute_validation(self) -> Validation | None:
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

    def load(self) -> None:
        """Restore the state of the checkpoint found or, where the run begins, the weights that the recipe names.

        Afterwards the run can be saved. To be called once, when `state` is there.
        """
        initial = self.recipe.checkpoint.initial_checkpoint
        found, begins = self.found, self.found is None
        if found is None and initial is not None:
            found = agree_on_initial(Path(initial))
        if found is not None:
            self._load(*found, begins)
        checkpoints, note = self.folder.checkpoints, self.note_failed_save
        self.saver = Saver(self.state, checkpoints, self.log, self._retain, self._complete, note)
        self.saver.saved_at = self.found[1].step if self.found else None
        self.saver.check_room()  # now, not after hours

    def _load(self, path: Path, manifest: CheckpointManifest, begins: bool) -> None:
        self.read(path, manifest, begins)
        self.startup.done("checkpoint")
        if begins:
            origin = f", step {manifest.step} of run {manifest.run_id}" if manifest.step else ""
            self.log(f"weights are those of {path}{origin}")

    def read(self, path: Path, manifest: CheckpointManifest, begins: bool = False) -> None:
        """Read a checkpoint into `state`, which is new; where the run begins, its weights alone.

        Raises:
            DataError: it cannot be read, or its numbers are not finite.
        """
        load_checkpoint(self.state, path, manifest, self.log, weights_only=begins)
        if wrong := find_not_finite(self.state, self.device):
            remedy = "name other weights" if begins else "remove this checkpoint to resume from the one before it"
            raise DataError(f"{path}: {wrong} is not finite: training had diverged; {remedy}")

    def restart_feed(self) -> None:
        """Feed from the current step on; called after a rollback, and so only where the guard decides."""
        raise NotImplementedError

    def open_metrics(self) -> Metrics:
        """The records of the run, from its current step on; notes there how it begins."""
        metrics = Metrics(self.folder.path, self.step, quiet=dist.get_rank() != 0)
        root, config = self.folder.path, self.recipe.model_dump(mode="json")
        tracked = TrackedRun(self.run_id, root.name, self.recipe.logging.project, config, root / TRACKERS)
        metrics.track(self.recipe.logging.trackers, tracked)
        layout, size = self.layout, self.recipe.batch.micro_batch_size
        shape = f"{layout.stages} x {layout.replicas}"
        now: dict[str, Any] = {"stages": layout.stages, "replicas": layout.replicas, "micro_batch_size": size}
        if self.found is None:
            metrics.event(0, "start", f"started by {shape} ranks (stages x replicas)", **now)
            return metrics
        path, saved = self.found
        metrics.event(self.step, "resume", f"resumed at step {self.step} of {self.steps} from {path.name}", **now)
        if (saved.stages, saved.replicas) != (layout.stages, layout.replicas):
            before = {"stages_before": saved.stages, "replicas_before": saved.replicas}
            text = f"the layout was {saved.stages} x {saved.replicas}, and is now {shape} ranks (stages x replicas)"
            metrics.event(self.step, "relayout", text, **before, **now)
        return metrics

    def note_failed_save(self, line: str, step: int) -> None:
        """Note that the checkpoint of `step` could not be written, and that training goes on."""
        self.metrics.event(self.step, "save_failed", line, checkpoint=step)

    def finish(self) -> None:
        """Wait for the last checkpoint, and mark the run as complete."""
        self.saver.wait()
        mark_complete(checkpoint_path(self.folder.checkpoints, self.step))

    def record(self, result: StepResult) -> Agreed:
        """Count and record a step; returns what all ranks know of it."""
        self.step += 1
        beat("training", step=self.step)
        if not self._has_stepped:
            self._has_stepped = True
            limit_collectives(step_limit(self.recipe.control.hang_minutes * 60))
            self.startup.done("first step")
            self.log(self.startup.describe())
            collect_on_request_only()
        reason, data_seconds, memory, reserved, verdict, saving, commands = largest(
            [
                float(self.control.reason),
                result.data_seconds,
                *peak_memory(self.device),
                float(self.guard.verdict),
                float(self.saver.busy),
                float(self.commands.waiting),
            ],
            self.device,
        )
        if self._samples:
            self._samples.note(self.step)
        self.saver.poll(saving > 0)
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
        self.recipe = self.live.at(self.step)
        return agreed

    def after_step(self, agreed: Agreed) -> None:
        """Save, validate and sample after a step that is recorded, as far as each is due.

        Raises:
            DivergedError: as `check_health`.
            DataError: as `check_data_left`.
            Interrupted: a rank was requested to stop; the step is saved.
        """
        self.evaluated = set()
        self.check_health()
        went_back = self._skip_or_go_back()
        if not went_back:
            self._save_if_due(bool(agreed.reason))
        if agreed.reason:
            raise self._stopped(self.agreed_reason())  # a person may have stopped the run while it was saved
        self.check_data_left()
        if not went_back:
            self.evaluate()
        if agreed.commands and not self.last:
            self.commands.carry_out()
        if self.step < self.steps and (self.saved_or_saving or VALIDATION in self.evaluated):
            self.metrics.draw()
            gc.collect()
        elif due(COLLECT_EVERY, self.step):
            gc.collect()

    def check_health(self) -> None:
        """End a run that has diverged, before anything is saved.

        Raises:
            DivergedError: the guard finds that it has; the last step was skipped, and the model is of no use; or a step
                is not finite that has changed the weights already.
        """
        guard = self.guard
        if not self.decides:
            if guard.verdict is not Verdict.ACCEPTED:
                raise self.diverged(guard.reason)
            return
        if fault := guard.fault(self.step, self.steps):
            raise self.diverged(fault)
        if self.last and guard.doubtful:
            found = self.validate()  # first: the steps skipped last hold nothing that a save could lose
            if found is None or not math.isfinite(found.loss):
                shown = "loss" if found is None else "validation loss"
                raise self.diverged(f"the last step was skipped, and the {shown} is not finite, either")

    def check_data_left(self) -> None:
        """End a run that rollbacks have left without data for its next step; the steps done are saved.

        Raises:
            DataError: names the number of steps that there is data for.
        """
        end, passed = self.mixture.end, self.guard.samples_passed
        if self.last or end is None or self.course.samples_before(self.step + 1) + passed <= end:
            return
        self._save_now()
        raise DataError(
            f"{self.recipe.data.manifest}: has no data for step {self.step + 1:,} of {self.steps:,}, since rollbacks "
            f"passed over {passed:,} samples (on_exhausted: stop); set schedule.steps={self.step} to end the run here"
        )

    def _skip_or_go_back(self) -> bool:
        """Note a step that was skipped, or go back where that is wanted and possible; returns whether it did."""
        guard = self.guard
        if guard.verdict is Verdict.ACCEPTED:
            return False
        instead = ""
        if guard.wants_rollback:
            if roll_back(self):
                return True
            instead = "the last checkpoint of an interval is not there to go back to, and "
        text = f"step {self.step}: {guard.reason}: {instead}the step changes no weight"
        self.metrics.event(self.step, "skip", text, skipped_so_far=guard.skipped, **guard.judged)
        return False

    def go_back(self, step: int) -> None:
        """Go on from step `step`, whose state is read."""
        self.step, self.saver.saved_at = step, step
        self.recipe = self.live.at(step)
        self._save_is_due = False
        self.evaluated = of_rank_0(self.metrics.evaluated_at(step))
        self._pace = Pace(step, self.course)
        self.restart_feed()

    def _save_if_due(self, stop: bool) -> None:
        """Save before anything that takes time or may fail: at the end, on a request to stop, and at intervals.

        At an interval, a checkpoint waits for a step that is not skipped: until then it would hold nothing new.
        """
        self._save_is_due |= due(self.recipe.checkpoint.checkpoint_every, self.step)
        if stop:
            self.commands.state(State.STOPPING)
        if stop or self.step == self.steps:
            self.save()
        elif self._save_is_regular:
            self.save(wait=False)

    @property
    def _save_is_regular(self) -> bool:
        """Whether a checkpoint of this moment is due by `checkpoint_every`, not only asked for by a stop or person."""
        return self._save_is_due and not self.guard.skipped_in_row

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
            raise self._stopped(reason)  # there is nothing to save
        self.evaluated = of_rank_0(self.metrics.evaluated_at(self.step))
        self.evaluate()
        self.check_data_left()
        self.commands.state(State.TRAINING)
        self.commands.carry_out()
        self.startup.done("validation")

    def evaluate(self) -> None:
        """Validate and sample, as far as each is due now and not done.

        Raises:
            Interrupted: a rank was requested to stop; the current step is saved.
        """
        every = self.recipe.evaluation
        if self.step == 0 or self.last or due(every.validate_every, self.step):
            self.validate()
        if self.step and (self.last or due(every.sample_every, self.step)):
            self.sample()

    def validate(self) -> Validation | None:
        """Validate, unless that is done for this step; None then, and without held-out documents."""
        if not self.validation_samples or VALIDATION in self.evaluated:
            return None
        with self.commands.during(State.VALIDATING):
            found = self.compute_validation()
        if found is None:
            self.interrupt()
        tokens = self.course.tokens_before(self.step)
        size = self.validation_samples
        self.metrics.validation(self.step, tokens, found.loss, found.bits_per_byte, size, found.corpora)
        self.evaluated.add(VALIDATION)
        return found

    def sample(self) -> None:
        """Sample a continuation of each prompt that has none at this step."""
        evaluation = self.recipe.evaluation
        for number, prompt in enumerate(evaluation.sample_prompts):
            if sample_of(prompt) in self.evaluated:
                continue
            seed = hash_seed(self.recipe.schedule.seed, self.step, number)
            try:
                self.sample_once(prompt, evaluation.sample_tokens, seed)
            except (DataError, UsageError) as error:  # the run needs no sample, and logits may become finite again
                self.log(f"no sample after step {self.step}: {error}")
                self.metrics.sample(self.step, prompt, "")
            self.evaluated.add(sample_of(prompt))

    def sample_once(self, prompt: str, tokens: int, seed: int, options: SamplingOptions = SAMPLING) -> str:
        """Continue a prompt by up to `tokens` tokens, and record it.

        Raises:
            DataError: the logits are not finite.
            UsageError: the prompt has no token.
            Interrupted: a rank was requested to stop; the current step is saved.
        """
        text: str | None = ""
        failure: DataError | UsageError | None = None
        with self.commands.during(State.SAMPLING):
            try:
                text = self.generate(prompt, tokens, seed, options)
            except (DataError, UsageError) as error:
                failure = error
        # Replicas draw for themselves, so a rank may know of the request that others have not seen yet.
        if self.stop_is_agreed() or text is None:
            self.interrupt()
        if failure is not None:
            raise failure
        self.metrics.sample(self.step, prompt, text)
        return text

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
        self._save_now()
        raise self._stopped(self.agreed_reason())

    def _save_now(self) -> None:
        """Save the current step, unless that was done or it is the first."""
        self._wait_for_save()
        if self.step and not self.saved_or_saving:
            self.save()

    def _wait_for_save(self) -> None:
        """Wait for the save under way, and answer who has asked for it before another one begins."""
        self.saver.wait()
        self.commands.settle()

    def _stopped(self, reason: Reason) -> Interrupted | UsageError:
        """Record a stop; returns what ends the run: an error, where no attempt would ever get to a step."""
        ends: Interrupted | UsageError = Interrupted(reason)
        code = reason.exit_code
        if reason is Reason.DEADLINE and not self._has_stepped and not self.last:
            ends = UsageError(
                f"max_hours={self.recipe.control.max_hours:g}: this attempt was at its deadline before its first step, "
                "and so would be the next one; set a larger max_hours"
            )
            code = ends.exit_code
        self.metrics.event(
            self.step,
            "stop",
            f"stopped at step {self.step} of {self.steps}: {reason.text}",
            reason=reason.name.lower(),
            exit_code=code,
        )
        return ends

    @property
    def saved_or_saving(self) -> bool:
        """Whether the current step has a checkpoint, or is being saved."""
        return self.step in (self.saver.saved_at, self.saver.step)

    def save(self, wait: bool = True) -> None:
        """Save the current step.

        Args:
            wait: whether to wait until the checkpoint is there. Without, a thread writes it while training goes on.

        Raises:
            DivergedError: a weight or an optimizer state is not finite, on any rank.
            WriteError: it cannot be written; only with `wait`.
            SaveError: the third save in a row has failed.
        """
        self._wait_for_save()
        if wrong := find_not_finite(self.state, self.device):
            raise self.diverged(f"{wrong} is not finite")
        if self._save_is_regular:
            self.guard.note_regular_save(self.step)
            self._save_is_due = False
        recipe = self.recipe
        manifest = CheckpointManifest(
            run_id=self.run_id,
            step=self.step,
            samples=self.course.samples_before(self.step) + self.guard.samples_passed,
            tokens=self.course.tokens_before(self.step),
            stages=self.layout.stages,
            replicas=self.layout.replicas,
            bounds=self.bounds,
            precision=self.precision.compute.value,
            engine=self.engine_name,
            recipe=recipe.model_dump(mode="json", exclude_none=True),
            data=self.mixture.fingerprint,
            versions={},
            template=self.mixture.template,
            guard=self.guard.state,
        )
        if wait:
            with self.commands.during(State.SAVING):
                self.saver.save(manifest)
        else:
            self.saver.begin(manifest)

    def diverged(self, what: str) -> DivergedError:
        """The error of a run that has diverged, once the save under way is done."""
        self.saver.wait()
        step = self.saver.saved_at
        saved = None if step is None else checkpoint_path(self.folder.checkpoints, step)
        return diverged(f"step {self.step}: training has diverged: {what}", self.recipe.optimizer, saved)

    def _complete(self, folder: Path) -> None:
        """Complete a checkpoint before it gets its name; called in a thread of rank 0."""
        self.complete_folder(folder)
        self.metrics.flush()  # a run that resumes from it shall find the records of its steps, even after a power cut

    def _retain(self, saved: Path) -> list[str]:
        """Remove the checkpoints that are no longer to be kept; called in a thread of rank 0."""
        losses = validation_losses(self.folder.path)
        return prune(saved.parent, keep_rule(self.recipe), losses, step_of(saved))


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


def hash_seed(*parts: int) -> int:
    """Derive a 63-bit seed from some numbers; the same on every machine."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
