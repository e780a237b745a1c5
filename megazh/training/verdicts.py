"""What follows from the guard's verdict on a step: it is skipped, the run goes back, or it ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megazh.errors import DataError
from megazh.training.guard import Verdict
from megazh.training.rollback import roll_back

if TYPE_CHECKING:
    from megazh.training.session import Session


def end_if_diverged(session: Session) -> None:
    """End a run that has diverged, before anything is saved.

    Raises:
        DivergedError: the guard finds that it has; the last step was skipped, and the model is of no use; or a step
            is not finite that has changed the weights already.
    """
    guard = session.guard
    if not session.decides:
        if guard.verdict is not Verdict.ACCEPTED:
            raise session.checkpoints.diverged(guard.reason)
        return
    if fault := guard.fault(session.step, session.steps):
        raise session.checkpoints.diverged(fault)
    if session.last and guard.doubtful:
        found = session.evaluations.validate()  # first: the steps skipped last hold nothing that a save could lose
        if found is None or not math.isfinite(found.loss):
            shown = "loss" if found is None else "validation loss"
            raise session.checkpoints.diverged(f"the last step was skipped, and the {shown} is not finite, either")


def end_without_data(session: Session) -> None:
    """End a run that rollbacks have left without data for its next step; the steps done are saved.

    Raises:
        DataError: names the number of steps that there is data for.
    """
    end, passed = session.mixture.end, session.guard.samples_passed
    if session.last or end is None or session.course.samples_before(session.step + 1) + passed <= end:
        return
    session.checkpoints.save_now()
    manifest, step = session.recipe.data.manifest, session.step
    raise DataError(
        f"{manifest}: has no data for step {step + 1:,} of {session.steps:,}, since rollbacks passed over {passed:,} "
        f"samples (on_exhausted: stop); set schedule.steps={step} to end the run here"
    )


def skip_or_go_back(session: Session) -> bool:
    """Note a step that was skipped, or go back where that is wanted and possible; returns whether it did."""
    guard = session.guard
    if guard.verdict is Verdict.ACCEPTED:
        return False
    instead = ""
    if guard.wants_rollback:
        if roll_back(session):
            return True
        instead = "the last checkpoint of an interval is not there to go back to, and "
    text = f"step {session.step}: {guard.reason}: {instead}the step changes no weight"
    session.metrics.event(session.step, "skip", text, skipped_so_far=guard.skipped, **guard.judged)
    return False
