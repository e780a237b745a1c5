"""A rank: what it leaves in its log, and how it ends when something fails that nobody expected."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megazh.console import LAST_WORDS
from megazh.errors import DataError
from megazh.run.folder import RunFolder
from megazh.training import worker


@pytest.fixture(autouse=True)
def rank_1(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be rank 1; its handlers of signals are taken away afterwards."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv(LAST_WORDS, raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
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


def test_slurms_sigterm_requests_a_stop() -> None:
    stop = worker.StopRequest()
    assert not stop.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
