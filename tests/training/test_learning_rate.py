"""The learning rate at the edges of the schedule, and the ways to give a warm-up."""

import math
from itertools import pairwise

import pytest

from megazh.errors import UsageError
from megazh.training.learning_rate import learning_rate, warmup_steps


def test_values_at_the_edges() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, steps=101, peak=8e-4, warmup_steps=11, min_ratio=0.1)

    assert rate(0) == pytest.approx(8e-4 / 11, rel=1e-12)
    assert rate(9) == pytest.approx(8e-4 * 10 / 11, rel=1e-12)
    assert rate(10) == 8e-4
    assert rate(11) == pytest.approx(8e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi / 90)) / 2), rel=1e-12)
    assert rate(55) == pytest.approx(8e-4 * 0.55, rel=1e-12)  # half-way down
    assert rate(100) == pytest.approx(8e-5, rel=1e-12)
    assert rate(101) == rate(5000) == rate(100)


@pytest.mark.parametrize("warmup", [0, 1, 7, 39, 40])
def test_rises_to_the_peak_once_and_falls(warmup: int) -> None:
    rates = [learning_rate(step, 40, 1.0, warmup, 0.0) for step in range(40)]
    top = max(warmup - 1, 0)
    assert rates[top] == 1.0
    assert all(before < after for before, after in pairwise(rates[: top + 1]))
    assert all(before > after for before, after in pairwise(rates[top:]))
    if top < 39:
        assert rates[-1] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_run_of_one_step_is_at_the_peak(warmup: int) -> None:
    assert learning_rate(0, 1, 3e-4, warmup, 0.1) == 3e-4


def test_min_ratio_of_one_holds_the_peak() -> None:
    assert {learning_rate(step, 20, 2e-4, 0, 1.0) for step in range(20)} == {2e-4}


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0, 0), (0.0, 0), (0.02, 12), (0.0001, 1), (0.999, 599), (1, 1), (1.0, 1), (50, 50), (50.0, 50), (600, 600)],
)
def test_warmup_as_fraction_or_number(warmup: float, expected: int) -> None:
    assert warmup_steps(600, warmup) == expected


def test_warmup_fits_a_run_of_one_step() -> None:
    assert warmup_steps(1, 0.5) == 1


def test_warmup_longer_than_the_run_is_refused_with_the_numbers() -> None:
    with pytest.raises(UsageError, match=r"schedule\.warmup=2000: longer than the run of 600"):
        warmup_steps(600, 2000)


@pytest.mark.parametrize("warmup", [-1, -0.5, 1.5, math.nan, math.inf])
def test_warmup_that_is_neither_is_refused(warmup: float) -> None:
    with pytest.raises(UsageError, match="share of the steps"):
        warmup_steps(600, warmup)
