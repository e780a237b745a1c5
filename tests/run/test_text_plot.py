"""Curves in characters."""

import math

import pytest

from megazh.run.text_plot import text_plot


def test_a_falling_line_goes_from_the_upper_left_to_the_lower_right() -> None:
    lines, low, high = text_plot([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 4, 2)
    assert (lines, low, high) == (["⠑⢄", "⠀⠀⠑⢄"], 1.0, 8.0)
    lines, _, _ = text_plot([3.0, 2.0, 1.0], 3, 3, braille=False)
    assert lines == ["*", " *", "  *"]


def test_steep_curves_are_joined() -> None:
    lines, _, _ = text_plot([0.0, 1.0], 2, 4, braille=False)
    assert lines == [" *", " *", " *", "*"]


def test_equal_values_and_a_single_one() -> None:
    for values in ([2.0] * 50, [2.0]):
        lines, low, high = text_plot(values, 5, 3)
        assert (low, high) == (1.5, 2.5)
        assert [bool(line.strip("\u2800")) for line in lines] == [False, True, False]
        assert len(lines[1]) == 5


def test_what_is_not_finite_leaves_a_gap() -> None:
    lines, low, high = text_plot([1.0, math.nan, math.inf, 1.0], 4, 1, braille=False)
    assert (lines, low, high) == (["*  *"], 0.5, 1.5)


def test_many_values_are_means_of_stretches() -> None:
    _, low, high = text_plot([1.0, 3.0] * 500, 10, 4)
    assert low == pytest.approx(1.5)
    assert high == pytest.approx(2.5)


def test_a_steep_begin_may_lie_above_the_edge() -> None:
    values = [100.0] + [2.0 - number / 99 for number in range(99)]
    lines, low, high = text_plot(values, 50, 5, above=0.04)
    assert (round(low), high < 2.01) == (1, True)
    assert lines[0][0] != "\u2800", "drawn at the edge"
