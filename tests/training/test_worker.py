"""A rank: what it leaves in its log, and how it ends when something fails that nobody expected."""

import faulthandler
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import start_command, wait_until

from megazh.console import LAST_WORDS
from megazh.errors import DataError
from megazh.run.folder import RunFolder
from megazh.training import worker
from megazh.training.control import SIGNALS


@pytest.fixture(autouse=True)
def rank_1(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be rank 1; its handlers of signals are taken away afterwards."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv(LAST_WORDS, raising=False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    faulthandler.unregister(signal.SIGUSR2)
    for number, handler in before.items():
        signal.signal(number, handler)


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Have the rank fail with `error` where it reads its recipe."""

    def fail(run: RunFolder) -> None:
        raise error

    monkeypatch.setattr(worker, "run_recipe", fail)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("boom"), SystemExit("boom"), MemoryError("boom")])
def test_what_nobody_expected_is_a_traceback_and_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    failing(monkeypatch, error)
    assert worker.work(tmp_path) == 1
    begin, *trace, end = (tmp_path / "logs" / "rank_1.log").read_text().splitlines()
    assert re.match(
        rf"--- [-\d]+ [\d:+-]+ rank 1: process {os.getpid()} on {os.uname().nodename}: megazh \S+, torch \S+, "
        r"deepspeed \S+, Python 3",
        begin,
    )
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1].startswith(f"{type(error).__name__}: ")
    assert re.match(r"--- [-\d]+ [\d:+-]+ rank 1: ended with exit code 1 after 0:00:0", end)
    assert "boom" in capsys.readouterr().err


def test_an_error_is_a_line_in_the_log_and_reaches_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    monkeypatch.setenv(LAST_WORDS, str(writer))
    failing(monkeypatch, DataError("语料: damaged"))
    assert worker.work(tmp_path) == DataError.exit_code
    assert capsys.readouterr().err == "error: 语料: damaged\n"
    assert "\nerror: 语料: damaged\n" in (tmp_path / "logs" / "rank_1.log").read_text()
    os.close(writer)
    assert os.read(reader, 1000).decode() == "error: 语料: damaged\n"
    os.close(reader)


def test_a_full_disk_of_the_log_does_not_end_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_1.log").symlink_to("/dev/full")
    monkeypatch.setattr("sys.stderr", open("/dev/full", "w"))  # noqa: SIM115
    failing(monkeypatch, DataError("damaged"))
    assert worker.work(tmp_path) == DataError.exit_code


def test_a_signal_before_training_ends_the_rank_with_its_reason(tmp_path: Path) -> None:
    script = "import sys, time; from megazh.training import worker; from pathlib import Path\n"
    script += "worker.run_recipe = lambda run: (print('ready', flush=True), time.sleep(60))\n"
    script += "worker.leave(worker.work(Path('.')))"
    with start_command([sys.executable, "-c", script], cwd=tmp_path) as started:
        log = tmp_path / "logs" / "rank_1.log"
        wait_until(lambda: log.exists() and "process" in log.read_text(), 20, "the rank has begun")
        time.sleep(0.2)
        started.process.send_signal(signal.SIGUSR1)
        assert started.wait(5).returncode == 75
    stopped, end = log.read_text().splitlines()[-2:]
    assert stopped.endswith("rank 1: stopped before the first step: the time limit is near (SIGUSR1)")
    assert " rank 1: ended with exit code 75 after 0:00:0" in end
