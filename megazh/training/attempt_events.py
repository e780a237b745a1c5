"""The first and the last event of an attempt in the records of its run: how it begins, and why it is stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megazh.errors import UsageError
from megazh.run.metrics import Metrics
from megazh.run.trackers.start import TRACKERS
from megazh.run.trackers.tracker import TrackedRun
from megazh.training.control import Interrupted, Reason

if TYPE_CHECKING:
    from megazh.training.session import Session


def open_metrics(session: Session) -> Metrics:
    """The records of the run, from its current step on; notes there how it begins."""
    metrics = Metrics(session.folder.path, session.step, quiet=dist.get_rank() != 0)
    root, config = session.folder.path, session.recipe.model_dump(mode="json")
    tracked = TrackedRun(session.run_id, root.name, session.recipe.logging.project, config, root / TRACKERS)
    metrics.track(session.recipe.logging.trackers, tracked)
    layout, size = session.layout, session.recipe.batch.micro_batch_size
    shape = f"{layout.stages} x {layout.replicas}"
    now: dict[str, Any] = {"stages": layout.stages, "replicas": layout.replicas, "micro_batch_size": size}
    if session.checkpoints.found is None:
        metrics.event(0, "start", f"started by {shape} ranks (stages x replicas)", **now)
        return metrics
    path, saved = session.checkpoints.found
    metrics.event(session.step, "resume", f"resumed at step {session.step} of {session.steps} from {path.name}", **now)
    if (saved.stages, saved.replicas) != (layout.stages, layout.replicas):
        before = {"stages_before": saved.stages, "replicas_before": saved.replicas}
        text = f"the layout was {saved.stages} x {saved.replicas}, and is now {shape} ranks (stages x replicas)"
        metrics.event(session.step, "relayout", text, **before, **now)
    return metrics


def record_stop(session: Session, reason: Reason) -> Interrupted | UsageError:
    """Record a stop; returns what ends the run: an error, where no attempt would ever get to a step.

    Nothing is printed: the launcher does so, when it hears of the stop and when the ranks have ended.
    """
    ends: Interrupted | UsageError = Interrupted(reason)
    code = reason.exit_code
    if reason is Reason.DEADLINE and not session.has_stepped and not session.last:
        ends = UsageError(
            f"max_hours={session.recipe.control.max_hours:g}: this attempt was at its deadline before its first step, "
            "and so would be the next one; set a larger max_hours"
        )
        code = ends.exit_code
    session.metrics.silent_event(
        session.step,
        "stop",
        f"stopped at step {session.step} of {session.steps}: {reason.text}",
        reason=reason.name.lower(),
        exit_code=code,
    )
    return ends
