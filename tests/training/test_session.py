"""What both engines do around a step: how a stop ends the run, and what it knows after a rollback."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from made_runs import write_metrics
from recipes import make_recipe

from megazh.errors import UsageError
from megazh.run.folder import RunFolder
from megazh.run.metrics import VALIDATION, Metrics
from megazh.training import checkpoints
from megazh.training.attempt_events import record_stop
from megazh.training.checkpoints import Checkpoints
from megazh.training.control import Interrupted, Reason
from megazh.training.evaluations import Evaluations
from megazh.training.guard import Guard, Verdict
from megazh.training.session import Agreed, Session


def stopped(reason: Reason, **session: object) -> tuple[Exception, int]:
    """What ends a run at that reason, and the exit code in its record; by default before the first step."""
    recipe, metrics = make_recipe(control={"max_hours": 0.25}), Mock()
    values = {"has_stepped": False, "last": False, "step": 40, "steps": 80, "recipe": recipe, "metrics": metrics}
    ends = record_stop(cast(Session, SimpleNamespace(**values | session)), reason)
    return ends, metrics.silent_event.call_args.kwargs["exit_code"]


def test_a_deadline_before_the_first_step_is_an_error() -> None:
    """With 75, a scheduler would start the run again and again, and none of the attempts would take a step."""
    ends, code = stopped(Reason.DEADLINE)
    assert (type(ends), code) == (UsageError, 2)
    assert str(ends).startswith("max_hours=0.25: this attempt was at its deadline before its first step")


@pytest.mark.parametrize(
    ("reason", "session", "expected"),
    [
        (Reason.DEADLINE, {"has_stepped": True}, 75),
        (Reason.DEADLINE, {"last": True}, 75),
        (Reason.TERMINATED, {}, 75),
        (Reason.COMMAND, {}, 130),
    ],
)
def test_other_stops_are_none(reason: Reason, session: dict[str, bool], expected: int) -> None:
    ends, code = stopped(reason, **session)
    assert isinstance(ends, Interrupted)
    assert (ends.reason, code) == (reason, expected)


def test_a_person_who_stops_the_run_while_it_is_saved_for_a_scheduler_decides_the_exit_code() -> None:
    recipe = make_recipe()
    session: Any = SimpleNamespace(
        step=4,
        steps=10,
        last=False,
        decides=True,
        has_stepped=True,
        recipe=recipe,
        guard=Guard(recipe.guard),
        metrics=Mock(),
        evaluations=Mock(),
        agreed_reason=lambda: Reason.TERMINATED,
    )
    save = Mock(side_effect=lambda stop: vars(session).update(agreed_reason=lambda: Reason.COMMAND))
    session.checkpoints = SimpleNamespace(save_if_due=save)
    with pytest.raises(Interrupted) as ended:
        Session.after_step(session, Agreed(Reason.TERMINATED, Verdict.ACCEPTED, commands=False))
    assert ended.value.reason is Reason.COMMAND


def test_the_best_checkpoint_is_kept_by_losses_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of steps that a rollback has undone count no longer."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoints, "agree_on_checkpoint", lambda *arguments: None)
    pruned: list[dict[int, float]] = []
    monkeypatch.setattr(checkpoints, "prune", lambda folder, rule, losses, step: pruned.append(dict(losses)))
    session: Any = SimpleNamespace(recipe=make_recipe(), folder=Mock(), run_id="", log=Mock(), step=0)
    kept = Checkpoints(session)
    kept.saver = Mock()
    for session.step, loss in ((3, 2.0), (6, 1.0)):
        kept.note_validation(loss)
        kept._retain(Path(f"step_{session.step:08d}"))
    kept.go_back(3)
    kept._retain(Path("step_00000003"))
    assert pruned == [{3: 2.0}, {3: 2.0, 6: 1.0}, {3: 2.0}]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_what_was_evaluated_at_a_step_is_not_evaluated_again_after_a_rollback_to_it(tmp_path: Path) -> None:
    """Neither by itself nor by `megazh ctl validate`."""
    write_metrics(RunFolder(tmp_path), steps=3)
    with Metrics(tmp_path, 3, quiet=False) as metrics:
        metrics.go_back(3)
        session: Any = SimpleNamespace(
            metrics=metrics,
            checkpoints=Mock(),
            course=make_recipe().course,
            live=Mock(),
            restart_feed=Mock(),
        )
        session.evaluations = Evaluations(session)
        Session.go_back(session, 3)
    assert VALIDATION in session.evaluations.done
    assert session.step == 3
    session.checkpoints.go_back.assert_called_once_with(3)
