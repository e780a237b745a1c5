"""Smoothed curves."""

import numpy as np
import pytest

from megazh.errors import UsageError
from megazh.run.smoothing import Smoothing, parse_smoothing


def test_a_moving_average_is_centred() -> None:
    values = np.array([9.0, 1.0, 2.0, 3.0, 10.0])
    assert Smoothing(window=3)(values).tolist() == [9.0, 4.0, 2.0, 5.0, 6.5]


def test_a_straight_line_stays_straight() -> None:
    values = np.arange(200.0)
    assert np.allclose(Smoothing()(values)[:190], values[:190])


def test_an_exponential_average_begins_at_the_first_value() -> None:
    smoothed = Smoothing(decay=0.5)(np.array([4.0, 1.0, 1.0]))
    assert np.allclose(smoothed, [4.0, (2 + 1) / 1.5, (1 + 0.5 + 1) / 1.75])


def test_what_is_given_is_read() -> None:
    assert parse_smoothing("auto") == Smoothing()
    assert parse_smoothing("50") == Smoothing(window=50)
    assert parse_smoothing("0").off
    assert not parse_smoothing("auto").off
    assert parse_smoothing("0.98") == Smoothing(decay=0.98)


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "nan", "inf"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected auto, a number of steps"):
        parse_smoothing(text)
