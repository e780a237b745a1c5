"""Signs of progress: what a rank writes is what its launcher reads."""

import os
import time

import pytest

from megazh.run import pulse
from megazh.run.pulse import PULSE, Pulses, beat, open_pulse, own_pulse


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without memory and without beats."""
    monkeypatch.setattr(pulse, "_own", pulse._Own())


def test_each_rank_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pulses = Pulses(3)
    assert [each.beats for each in pulses.read()] == [0, 0, 0]
    monkeypatch.setenv(PULSE, str(pulses.descriptor))
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert open_pulse()
    begun = time.monotonic()
    beat("validation", step=7)
    beat("等待" * 40, reason=3)
    first, second, third = pulses.read()
    assert (first.beats, second.beats) == (0, 0)
    assert (third.beats, third.step, third.reason) == (2, 7, 3)
    assert third.phase.startswith("等待等待")
    assert begun <= third.time <= time.monotonic()
    pulses.close()


def test_without_a_launcher_a_rank_reads_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PULSE, raising=False)
    assert not open_pulse()
    beat("step", step=1)
    assert own_pulse()[:3] == (1, 1, 0)


def test_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pulses = Pulses(1)
    assert pulses.read()[0].step == -1
    monkeypatch.setenv(PULSE, str(pulses.descriptor))
    assert open_pulse()
    beat("after imports")
    assert pulses.read()[0].step == -1
    pulses.close()


def test_a_descriptor_that_is_none_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    monkeypatch.setenv(PULSE, str(descriptor))
    assert not open_pulse()
    beat("step")
