"""Intervals, and the time that remaining steps take."""

import pytest
from recipes import make_recipe

from megazh.training.pace import Pace, due


def test_multiples_of_an_interval_are_due_and_an_interval_of_zero_never() -> None:
    assert [step for step in range(1, 10) if due(3, step)] == [3, 6, 9]
    assert not any(due(0, step) for step in range(10))


def test_the_average_starts_anew_at_the_second_step_of_a_process() -> None:
    pace = Pace(10, make_recipe(steps=20).course)
    assert pace.remaining(11, 60.0) == pytest.approx(9 * 60.0)  # the first warms up
    assert pace.remaining(12, 2.0) == pytest.approx(8 * 2.0)
    assert pace.remaining(13, 4.0) == pytest.approx(7 * (0.9 * 2.0 + 0.1 * 4.0))
    assert pace.remaining(20, 4.0) == 0.0


def test_larger_steps_take_longer_in_proportion() -> None:
    course = make_recipe(steps=6, **{"schedule.batch": {0: 8, 512: 32}}).course
    assert [course.samples(step) for step in range(6)] == [8, 8, 8, 8, 32, 32]
    assert Pace(0, course).remaining(1, 2.0) == pytest.approx(3 * 2.0 + 2 * 8.0)
