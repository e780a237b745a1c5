"""What both engines do around a step: how a stop ends the run."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from recipes import make_recipe

from megazh.errors import UsageError
from megazh.training.control import Interrupted, Reason
from megazh.training.session import Session


def stopped(reason: Reason, **session: object) -> tuple[Exception, int]:
    """What ends a run at that reason, and the exit code in its record; by default before the first step."""
    recipe, metrics = make_recipe(control={"max_hours": 0.25}), Mock()
    values = {"_has_stepped": False, "last": False, "step": 40, "steps": 80, "recipe": recipe, "metrics": metrics}
    ends = Session._stopped(SimpleNamespace(**values | session), reason)
    return ends, metrics.event.call_args.kwargs["exit_code"]


def test_a_deadline_before_the_first_step_is_an_error() -> None:
    """With 75, a scheduler would start the run again and again, and none of the attempts would take a step."""
    ends, code = stopped(Reason.DEADLINE)
    assert (type(ends), code) == (UsageError, 2)
    assert str(ends).startswith("max_hours=0.25: this attempt was at its deadline before its first step")


@pytest.mark.parametrize(
    ("reason", "session", "expected"),
    [
        (Reason.DEADLINE, {"_has_stepped": True}, 75),
        (Reason.DEADLINE, {"last": True}, 75),
        (Reason.TERMINATED, {}, 75),
        (Reason.COMMAND, {}, 130),
    ],
)
def test_other_stops_are_none(reason: Reason, session: dict[str, bool], expected: int) -> None:
    ends, code = stopped(reason, **session)
    assert isinstance(ends, Interrupted)
    assert (ends.reason, code) == (reason, expected)
