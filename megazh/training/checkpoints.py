"""The checkpoints of a run while it trains: the one that it goes on from, and those that it saves and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megazh.errors import DataError, DivergedError
from megazh.run.state import State
from megazh.training.checkpoint_list import CheckpointManifest, checkpoint_path, step_of
from megazh.training.checkpoint_read import load_checkpoint
from megazh.training.health import diverged, find_not_finite
from megazh.training.pace import due
from megazh.training.recipe import Resume
from megazh.training.resume import Found, agree_on_checkpoint, agree_on_initial
from megazh.training.retention import keep_rule, prune, validation_losses
from megazh.training.saver import Saver, mark_complete

if TYPE_CHECKING:
    from megazh.training.session import Session


class Checkpoints:
    """Loads and saves the state of a session. All ranks make one, and call its methods in the same order.

    Args:
        session: the session, of which only folder, recipe and identity are known yet.

    Raises:
        MegazhError: checkpoints fail, as `agree_on_checkpoint` documents.
    """

    saver: Saver
    """Writes checkpoints; there once the state is loaded."""

    def __init__(self, session: Session) -> None:
        self._session = session
        resume = session.recipe.checkpoint.resume
        named = None if isinstance(resume, Resume) else resume
        self.found: Found | None = agree_on_checkpoint(session.folder.checkpoints, session.run_id, session.log, named)
        """The checkpoint that the run goes on from; None where it begins."""
        self._losses: dict[int, float] = {}  # validation loss by step, on rank 0
        self._is_due = False
        """Whether a checkpoint waits for a step that is not skipped."""

    def load(self) -> None:
        """Restore the state of the checkpoint found or, where the run begins, the weights that the recipe names.

        Afterwards the run can be saved. To be called once, when the session's `state` is there.
        """
        session = self._session
        initial = session.recipe.checkpoint.initial_checkpoint
        found, begins = self.found, self.found is None
        if found is None and initial is not None:
            found = agree_on_initial(Path(initial))
        if found is not None:
            path, manifest = found
            self.read(path, manifest, begins)
            session.startup.done("checkpoint")
            if begins:
                origin = f", step {manifest.step} of run {manifest.run_id}" if manifest.step else ""
                session.log(f"weights are those of {path}{origin}")
        self.saver = Saver(
            session.state, session.folder.checkpoints, session.log, self._retain, self._complete, self._note_failure
        )
        self.saver.saved_at = self.found[1].step if self.found else None
        if dist.get_rank() == 0:
            known = validation_losses(session.folder.path)  # once: a long run has millions of records
            self._losses = {at: loss for at, loss in known.items() if at <= session.step}
        self.saver.check_room()  # now, not after hours
        every, row = session.recipe.checkpoint.checkpoint_every, session.guard.skipped_in_row
        self._is_due = bool(every and row) and session.step // every > (session.step - row) // every

    def read(self, path: Path, manifest: CheckpointManifest, begins: bool = False) -> None:
        """Read a checkpoint into the session's `state`, which is new; where the run begins, its weights alone.

        Raises:
            DataError: it cannot be read, or its numbers are not finite.
        """
        session = self._session
        load_checkpoint(session.state, path, manifest, session.log, weights_only=begins)
        if wrong := find_not_finite(session.state, session.device):
            remedy = "name other weights" if begins else "remove this checkpoint to resume from the one before it"
            raise DataError(f"{path}: {wrong} is not finite: training had diverged; {remedy}")

    def go_back(self, step: int) -> None:
        """Take the checkpoint of `step`, which is read, for the newest one."""
        self.saver.saved_at, self._is_due = step, False
        self._losses = {at: loss for at, loss in self._losses.items() if at <= step}

    def note_validation(self, loss: float) -> None:
        """Note the validation loss of the current step, by which the best checkpoint is kept."""
        self._losses = {**self._losses, self._session.step: loss}

    def save_if_due(self, stop: bool) -> None:
        """Save before anything that takes time or may fail: at the end, on a request to stop, and at intervals.

        At an interval, a checkpoint waits for a step that is not skipped: until then it would hold nothing new.
        """
        session = self._session
        self._is_due |= due(session.recipe.checkpoint.checkpoint_every, session.step)
        if stop:
            session.commands.state(State.STOPPING)
        if stop or session.last:
            self.save()
        elif self._is_regular:
            self.save(wait=False)

    @property
    def _is_regular(self) -> bool:
        """Whether a checkpoint of this moment is due by `checkpoint_every`, not only asked for by a stop or person."""
        return self._is_due and not self._session.guard.skipped_in_row

    @property
    def saved_or_saving(self) -> bool:
        """Whether the current step has a checkpoint, or is being saved."""
        return self._session.step in (self.saver.saved_at, self.saver.step)

    def save_now(self) -> None:
        """Save the current step, unless that was done or it is the first."""
        self.wait()
        if self._session.step and not self.saved_or_saving:
            self.save()

    def wait(self) -> None:
        """Wait for the save under way, and answer who has asked for it before another one begins."""
        self.saver.wait()
        self._session.commands.settle()

    def save(self, wait: bool = True) -> None:
        """Save the current step.

        Args:
            wait: whether to wait until the checkpoint is there. Without, a thread writes it while training goes on.

        Raises:
            DivergedError: a weight or an optimizer state is not finite, on any rank.
            WriteError: it cannot be written; only with `wait`.
            SaveError: the third save in a row has failed.
        """
        session = self._session
        self.wait()
        if wrong := find_not_finite(session.state, session.device):
            raise self.diverged(f"{wrong} is not finite")
        if self._is_regular:
            session.guard.note_regular_save(session.step)
            self._is_due = False
        manifest = self._manifest()
        if wait:
            with session.commands.during(State.SAVING):
                self.saver.save(manifest)
        else:
            self.saver.begin(manifest)

    def _manifest(self) -> CheckpointManifest:
        session = self._session
        return CheckpointManifest(
            run_id=session.run_id,
            step=session.step,
            samples=session.course.samples_before(session.step) + session.guard.samples_passed,
            tokens=session.course.tokens_before(session.step),
            stages=session.layout.stages,
            replicas=session.layout.replicas,
            bounds=session.bounds,
            precision=session.precision.compute.value,
            engine=session.engine_name,
            recipe=session.recipe.model_dump(mode="json", exclude_none=True),
            data=session.mixture.fingerprint,
            versions={},
            template=session.mixture.template,
            guard=session.guard.state,
        )

    def finish(self) -> None:
        """Wait for the last checkpoint, and mark the run as complete."""
        self.saver.wait()
        mark_complete(checkpoint_path(self._session.folder.checkpoints, self._session.step))

    def diverged(self, what: str) -> DivergedError:
        """The error of a run that has diverged, once the save under way is done."""
        self.saver.wait()
        session, step = self._session, self.saver.saved_at
        saved = None if step is None else checkpoint_path(session.folder.checkpoints, step)
        return diverged(f"step {session.step}: training has diverged: {what}", session.recipe.optimizer, saved)

    def _note_failure(self, line: str, step: int) -> None:
        """Note that the checkpoint of `step` could not be written, and that training goes on."""
        self._session.metrics.event(self._session.step, "save_failed", line, checkpoint=step)

    def _complete(self, folder: Path) -> None:
        """Complete a checkpoint before it gets its name; called in a thread of rank 0."""
        self._session.complete_folder(folder)
        # A run that resumes from it shall find the records of its steps, even after a power cut.
        self._session.metrics.flush()

    def _retain(self, saved: Path) -> list[str]:
        """Remove the checkpoints that are no longer to be kept; called in a thread of rank 0."""
        return prune(saved.parent, keep_rule(self._session.recipe), self._losses, step_of(saved))
