"""A rank without a launcher that watches it, and limits of collectives. Hangs of runs are in the launcher's tests."""

import datetime
import faulthandler
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from ranks import run_ranks

from megazh.run import pulse
from megazh.run.pulse import START_FACTOR, beat
from megazh.training.hang import start_limit, step_limit, watch_alone, write_stacks_to


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin without beats; no signal writes stacks afterwards."""
    monkeypatch.setattr(pulse, "_own", pulse._Own())
    yield
    faulthandler.unregister(signal.SIGUSR2)


def test_a_rank_that_nobody_watches_gives_up_by_itself(tmp_path: Path) -> None:
    said: SimpleQueue[str] = SimpleQueue()
    log = tmp_path / "logs" / "rank_0.log"
    write_stacks_to(log)
    beat("training", step=3)
    watch_alone(2.0, said.put)
    for _ in range(7):
        time.sleep(0.4)
        beat("training")
    assert said.empty(), "it gets on"
    assert said.get(timeout=8).startswith("phase 'training', step 3: no progress for 2 s")
    assert "in test_a_rank_that_nobody_watches_gives_up_by_itself\n" in log.read_text()


def test_stacks_go_to_stderr_where_the_log_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").touch()
    write_stacks_to(tmp_path / "logs" / "rank_0.log")
    signal.raise_signal(signal.SIGUSR2)
    assert "Current thread" in capfd.readouterr().err


def test_collectives_wait_longer_than_the_launcher() -> None:
    for hang in (60.0, 1800.0, 7200.0):
        assert datetime.timedelta(seconds=hang) < step_limit(hang) < start_limit(hang)
        assert start_limit(hang) > datetime.timedelta(seconds=START_FACTOR * hang)
    assert step_limit(0) >= datetime.timedelta(days=30), "0 turns it off"


@pytest.mark.ranks
def test_a_limit_holds_in_all_process_groups(tmp_path: Path) -> None:
    first, _ = run_ranks(Path(__file__).parent / "limits_rank.py", 2, [], tmp_path, timeout=60)
    assert len(first["found"]) == 3
    for seconds, error in first["found"]:
        assert 1.5 < seconds < 10
        assert "Timed out" in error
