"""Going back to an earlier checkpoint in a run that goes on, and past the data since then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megazh.training.guard_state import GuardState
from megazh.training.resume import agree_on_checkpoint
from megazh.training.saver import amend_manifest

if TYPE_CHECKING:
    from megazh.training.session import Session


def roll_back(session: Session) -> bool:
    """Go back to the last checkpoint of an interval, as a resume from it would, and on with other data.

    The steps since then are undone, their checkpoints are removed, and no later step takes their samples. The
    checkpoint's manifest notes that: a run that is stopped or killed soon afterwards resumes behind the rollback. All
    ranks call it, after a step that spikes.

    Returns:
        Whether that checkpoint is there and whole; without, nothing has changed. The checkpoint before it could be many
        steps older, and is never taken.

    Raises:
        DataError: the checkpoint cannot be read, or its numbers are not finite.
        WorkerError: a rank does not see it.
        WriteError: metrics.jsonl or the manifest cannot be written.
    """
    guard = session.guard
    session.checkpoints.wait()
    if guard.regular_step is None:
        return False
    found = agree_on_checkpoint(session.folder.checkpoints, session.run_id, session.log, only=guard.regular_step)
    if found is None:
        return False
    path, saved = found
    steps = session.step - saved.step
    samples = session.course.samples_before(session.step) - session.course.samples_before(saved.step)
    text = (
        f"step {session.step}: {guard.reason}: back to {path.name}, and past the data of {steps:,} steps "
        f"({samples:,} samples)"
    )
    session.metrics.event(
        session.step, "rollback", text, to=saved.step, samples=samples, rollbacks=guard.rollbacks + 1, **guard.judged
    )
    session.state.restart()
    session.checkpoints.read(path, saved)
    session.metrics.go_back(saved.step)
    guard.roll_back(saved.guard or GuardState(), steps, samples)
    consumed = session.course.samples_before(saved.step) + guard.samples_passed
    amend_manifest(path, {"guard": guard.state, "samples": consumed})
    session.go_back(saved.step)
    return True
