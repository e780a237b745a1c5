"""When a run is taken for one that hangs. Real hangs are in test_local.py."""

import pytest

from megazh.cluster.launchers import hang
from megazh.cluster.launchers.hang import Watch
from megazh.run.pulse import Pulse


class Clock:
    """A clock and the pulses of two ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.beats, self.step = 100.0, [0, 0], 0
        monkeypatch.setattr(hang.time, "monotonic", lambda: self.now)

    def read(self) -> list[Pulse]:
        """As of `Pulses`."""
        return [Pulse(beats, self.step, 0, self.now, "step") for beats in self.beats]


def seconds_until_it_hangs(clock: Clock, watch: Watch, most: int) -> int | None:
    for passed in range(1, most + 1):
        clock.now += 1
        if watch.hangs():
            return passed
    return None


def test_progress_of_any_rank_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = Watch(clock, 10)  # type: ignore[arg-type]
    for _ in range(5):
        assert seconds_until_it_hangs(clock, watch, 9) is None
        clock.beats[1] += 1
    assert seconds_until_it_hangs(clock, watch, 30) == 11, "it has seen the last beat a second later"


def test_the_time_in_which_the_launcher_itself_was_suspended_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = Watch(clock, 10)  # type: ignore[arg-type]
    assert seconds_until_it_hangs(clock, watch, 3) is None
    clock.now += 3600
    assert not watch.hangs()


def test_a_start_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.step = -1
    assert seconds_until_it_hangs(clock, Watch(clock, 10), 100) == 41  # type: ignore[arg-type]


def test_zero_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert seconds_until_it_hangs(clock, Watch(clock, 0), 100) is None  # type: ignore[arg-type]
