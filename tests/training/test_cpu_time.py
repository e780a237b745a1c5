"""The time that a run takes on the CPU, in words."""

import re

import pytest

from megazh.training.cpu_time import describe_cpu_time, duration_in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 seconds"),
        (40, "40 seconds"),
        (170, "2.8 minutes"),
        (5.2 * 3600, "5.2 hours"),
        (30 * 3600, "30 hours"),
        (12 * 86400, "12 days"),
        (147 * 365.25 * 86400, "147 years"),
        (1.9e3 * 365.25 * 86400, "1,900 years"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration_in_words(seconds) == words


def test_it_follows_the_speed_of_this_machine() -> None:
    line = describe_cpu_time(1e21)
    match = re.fullmatch(r"at least ([\d,.]+) years on this CPU: 1,000,000,000 TFLOP at ([\d,]+) GFLOP/s, .*fp32", line)
    assert match, line
    years, rate = (float(text.replace(",", "")) for text in match.groups())
    assert years * 365.25 * 86400 * rate * 1e9 == pytest.approx(1e21, rel=0.5 / rate + 0.05)
