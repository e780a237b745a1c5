"""The startup clock: phases in order, from the start of the command."""

import re
import time

import pytest

from megazh.training.startup import BEGUN, PREPARED, Startup, command_begun, preparing, process_begun, start_times


def phases(line: str) -> dict[str, float]:
    """Seconds by phase."""
    return {name: float(seconds) for name, seconds in re.findall(r"([a-z ]+) (\d+\.\d)(?:,|$)", line.split(": ")[1])}


def test_each_part_is_what_passed_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BEGUN, str(process_begun() - 3))
    startup = Startup()
    now = process_begun()
    startup.done("imports", now + 2)
    startup.done("nothing", now + 2.01)
    startup.done("first step", now + 7.5)
    line = startup.describe()
    assert line.startswith("first step after 10.5 s: ")
    assert {name.strip(): value for name, value in phases(line).items()} == {
        "launcher": 3.0, "imports": 2.0, "first step": 5.5,
    }  # fmt: skip


def test_without_a_launcher_it_begins_with_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BEGUN, raising=False)
    startup = Startup()
    startup.done("first step")
    assert "launcher" not in startup.describe()
    assert float(re.findall(r"after (\d+\.\d)", startup.describe())[0]) <= time.time() - process_begun() + 0.1


def test_preparing_data_is_a_phase_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with preparing():
        time.sleep(0.1)
    assert 0.1 <= float(start_times()[PREPARED]) < 5
    monkeypatch.setenv(BEGUN, str(process_begun() - 10))
    monkeypatch.setenv(PREPARED, "8")
    assert Startup().describe().endswith("preparing data 8.0, launcher 2.0")


def test_the_setup_before_python_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that becomes Python by exec leaves the time of that; an older time is that of another process."""
    own = process_begun()
    for given, expected in ((own + 0.5, own + 0.5), (own - 100, own), (time.time() + 1000, None), ("", own)):
        monkeypatch.setenv(BEGUN, str(given))
        found = command_begun()
        assert found == expected if expected else found <= time.time()
    monkeypatch.delenv(BEGUN)
    assert command_begun() == own
