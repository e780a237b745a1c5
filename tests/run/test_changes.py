"""Changed settings: which value holds at which step, whatever is changed again, before or after."""

import pytest

from megazh.run.changes import Change, Value, newest, value_at, with_change, without


def change(step: int, before: Value, value: Value, key: str = "optimizer.learning_rate") -> Change:
    """A change at some time."""
    return Change(key=key, step=step, before=before, value=value, time="2026-11-28T01:02:03Z")


def test_each_value_holds_from_its_step_on() -> None:
    changes = [change(10, 1.0, 2.0), change(10, 0, 5, "checkpoint.keep_every"), change(20, 2.0, 3.0)]
    values = [value_at(changes, "optimizer.learning_rate", step, 3.0) for step in (0, 9, 10, 19, 20, 99)]
    assert values == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert value_at(changes, "checkpoint.keep_last", 0, 7) == 7
    assert newest(changes) == {"optimizer.learning_rate": 3.0, "checkpoint.keep_every": 5}
    assert newest(without(changes, ["optimizer.learning_rate"])) == {"checkpoint.keep_every": 5}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(30, [1.0, 2.0, 3.0, 9.0]), (20, [1.0, 2.0, 9.0, 9.0]), (15, [1.0, 2.0, 9.0, 9.0]), (10, [1.0, 9.0, 9.0, 9.0])],
)
def test_a_change_replaces_those_that_the_run_has_not_come_to(step: int, expected: list[float]) -> None:
    """A run that was resumed from before its second change is changed again."""
    changes = [change(10, 1.0, 2.0), change(20, 2.0, 3.0), change(20, 4, 5, "checkpoint.keep_every")]
    current = value_at(changes, "optimizer.learning_rate", step, 3.0)
    changes = with_change(changes, change(step, current, 9.0))
    values = [value_at(changes, "optimizer.learning_rate", at, 9.0) for at in (5, 12, 25, 31)]
    assert values == expected
    assert newest(changes)["checkpoint.keep_every"] == 5
