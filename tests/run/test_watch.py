"""The live view of a run, in a terminal and in a pipe."""

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_runs import write_metrics
from processes import Finished, run_command
from terminals import Terminal, in_terminal

from megazh.files import locked
from megazh.run.folder import DESCRIPTION, RunFolder
from megazh.run.metrics import METRICS, Metrics

ROOT = Path(__file__).parents[2]
ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "megazh", "ctl", str(folder), "watch", *words]


def environment(**more: str) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of six steps that has not said that it ended."""
    write_metrics(RunFolder(tmp_path / "小故事"), 6)
    return tmp_path / "小故事"


@contextlib.contextmanager
def working_at(folder: Path) -> Iterator[None]:
    """Hold the lock of a run for the time of the block, as a process that trains."""
    with locked(RunFolder(folder).lock, "busy"):
        yield


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    """A live view of the run, which a process works at, in a terminal of 100 by 30."""
    with working_at(folder), in_terminal(command(folder), environment()) as terminal:
        terminal.resize(100, 30)
        terminal.expect(ENTER)
        yield terminal


def end_run(folder: Path) -> None:
    attempt = {"started": "2026-11-28T09:11:48Z", "ended": "2026-11-28T09:12:48Z", "reason": "done", "exit_code": 0}
    (folder / DESCRIPTION).write_text(json.dumps({"attempts": [attempt]}))


def piped(folder: Path, *words: str, **more: str) -> Finished:
    return run_command(command(folder, *words), 60, environment(**more))


def test_a_live_view_shows_new_steps_and_ends_with_q(folder: Path, terminal: Terminal) -> None:
    terminal.expect("小故事")
    terminal.expect("step 6 of 6")
    with open(folder / METRICS, "ab") as file:
        file.write(b'{"kind": "event", "step": 6, "name": "command", "text": "\xe7\x8c\xab", "details": {}}\n')
    terminal.expect("猫")
    terminal.type("xq")
    assert terminal.end() == 0
    assert terminal.output.rindex(LEAVE) > terminal.output.rindex("猫")


def test_a_resized_terminal_is_filled_anew(terminal: Terminal) -> None:
    terminal.expect("q quit")
    terminal.resize(60, 20)
    for _ in range(10):  # pictures of the old size may be on their way
        terminal.expect("\x1b[H")
        lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.expect("q quit")).split("\r\n")
        if max(map(len, lines)) <= 60 and len(lines) <= 20:
            break
    else:
        raise AssertionError(lines)
    assert len(lines) > 10
    terminal.type("q")
    assert terminal.end() == 0


def test_the_view_leaves_when_the_run_has_ended(folder: Path) -> None:
    with in_terminal(command(folder), environment()) as terminal:
        with working_at(folder):
            terminal.expect("starting")
            end_run(folder)
        terminal.expect(LEAVE)
        after = terminal.expect("complete")
        assert "小故事" in after
        assert terminal.end() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_signals_give_the_terminal_back(terminal: Terminal, number: int, code: int) -> None:
    terminal.expect("q quit")
    terminal.process.send_signal(number)
    assert terminal.end() == code
    assert LEAVE in terminal.output
    assert "Traceback" not in terminal.output


def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path) -> None:
    with in_terminal(command(tmp_path / "later"), environment()) as terminal:
        terminal.expect("waiting for the run to begin")
        with working_at(tmp_path / "later"), Metrics(tmp_path / "later", 0, quiet=False) as metrics:
            metrics.event(0, "start", "begins")
            terminal.expect("starting")
        terminal.type("q")
        assert terminal.end() == 0


def test_in_a_pipe_it_is_shown_once(folder: Path) -> None:
    finished = piped(folder)
    assert finished.returncode == 0, finished
    assert "step 6 of 6" in finished.stdout
    assert finished.stdout.endswith("(shown once, since the output is no terminal; in a terminal, it is a live view)\n")
    assert "\x1b" not in finished.stdout
    again = piped(folder, "--once", PYTHONIOENCODING="ascii")
    assert "step 6 of 6" in again.stdout
    assert "shown once" not in again.stdout
    assert "#####" in again.stdout


def test_shown_once_a_run_has_to_have_begun(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        finished = piped(folder, "--once")
        assert (finished.returncode, finished.stdout) == (2, ""), finished
        assert finished.stderr.startswith(f"error: {folder}: no run has begun here; ")


def test_a_file_is_refused(folder: Path) -> None:
    finished = piped(folder / METRICS)
    assert (finished.returncode, len(finished.stderr.splitlines())) == (2, 1), finished
    assert "a file, not the folder of a run; give the folder" in finished.stderr
