"""The console: outputs that are closed, gone, full, stuck, or lack characters; and the log of what was shown."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import run_command

from megazh import console
from megazh.console import MARK, Console, ReaderGone, Stream, lenient, open_console
from megazh.errors import WorkerError
from megazh.progress import Progress


@contextlib.contextmanager
def writing(path_or_descriptor: int | str | Path, encoding: str = "utf-8") -> Iterator[Console]:
    """A console whose stdout and stderr are a file or a descriptor."""
    before = sys.stdout, sys.stderr
    with open(path_or_descriptor, "w", encoding=encoding) as file:
        sys.stdout = sys.stderr = file
        try:
            with open_console() as made:
                yield made
        finally:
            sys.stdout, sys.stderr = before


@pytest.mark.parametrize(
    ("encoding", "shown"), [("gbk", "蜂蜜 ?\n"), ("ascii", "?? ?\n"), ("latin-1", "?? ?\n"), ("utf-8", "蜂蜜 🐝\n")]
)
def test_what_the_terminal_cannot_show_is_a_question_mark(tmp_path: Path, encoding: str, shown: str) -> None:
    with writing(tmp_path / "out", encoding):
        print("蜂蜜 🐝")
        print("蜂蜜 🐝", file=sys.stderr)
    assert (tmp_path / "out").read_text(encoding=encoding) == shown * 2


def test_half_of_a_surrogate_pair_is_a_question_mark(tmp_path: Path) -> None:
    with writing(tmp_path / "out"):
        print("bytes that are not UTF-8 in a file's name: \udcff")
    assert (tmp_path / "out").read_text() == "bytes that are not UTF-8 in a file's name: ?\n"


def test_a_begun_line_waits_for_its_end_or_for_flush(tmp_path: Path) -> None:
    with writing(tmp_path / "out"):
        sys.stdout.write("从")
        sys.stdout.write("前\nand")
        assert (tmp_path / "out").read_text() == "从前\n"
        sys.stdout.flush()
        assert (tmp_path / "out").read_text() == "从前\nand"


def test_a_strict_stdout_says_that_its_reader_has_gone_and_stderr_does_not() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with writing(writer):
        print("nobody reads this", file=sys.stderr)
        with pytest.raises(ReaderGone):
            print("nor this")


def test_a_strict_stdout_says_that_the_disk_is_full() -> None:
    with writing("/dev/full"), pytest.raises(WorkerError, match="standard output: No space left on device"):
        print("lost")


def test_work_outlives_the_reader_of_a_pipe() -> None:
    reader, writer = os.pipe()
    with writing(writer) as made:
        made.outlive()
        print("one")
        assert os.read(reader, 100) == b"one\n"
        os.close(reader)
        for _ in range(100):
            print("two")
            print("three", file=sys.stderr)


def test_work_outlives_a_full_disk_and_an_output_that_is_closed() -> None:
    with writing("/dev/full") as made:
        made.outlive()
        print("lost")
    stream = Stream(None)
    assert (stream.write("lost\n"), stream.isatty()) == (5, False)


def test_work_outlives_its_terminal() -> None:
    terminal, end = pty.openpty()
    with writing(end) as made:
        made.outlive()
        print("one", flush=True)
        assert os.read(terminal, 100) == b"one\r\n"
        os.close(terminal)
        print("two", flush=True)
        print("three", file=sys.stderr, flush=True)


def test_nobody_waits_for_a_reader_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_PATIENCE_SECONDS", 0.2)
    reader, writer = os.pipe()
    begin = time.monotonic()
    with writing(writer) as made:
        made.outlive()
        for _ in range(20_000):
            print("a line that nobody reads" * 4)
    assert time.monotonic() - begin < 5
    os.close(reader)


def test_a_reader_that_is_too_far_behind_gets_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(console, "_MOST_WAITING", 1 << 20)
    reader, writer = os.pipe()
    with writing(writer) as made:
        made.outlive()
        for _ in range(40):
            print("x" * (1 << 16))
        (thread,) = made._writers.values()
        assert thread._bytes == 0, "the lines that wait are forgotten"
    os.close(reader)


def test_a_slow_reader_gets_every_line_in_order() -> None:
    reader, writer = os.pipe()
    script = "import sys, time; time.sleep(0.3); print(sys.stdin.read() == ''.join(f'{n}\\n' for n in range(30000)))"
    with subprocess.Popen([sys.executable, "-c", script], stdin=reader, stdout=subprocess.PIPE) as slow:
        os.close(reader)
        with writing(writer) as made:
            made.outlive()
            for number in range(0, 30_000, 2):
                print(number)
                print(number + 1, file=sys.stderr)
        assert slow.stdout is not None
        assert slow.stdout.read() == b"True\n"


def test_a_terminal_that_does_not_block_is_waited_for() -> None:
    """Another program may have set the terminal so."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with writing(writer) as made:
        made.outlive()
        print("x" * 200_000)
        received = 0
        while received < 200_001:
            received += len(os.read(reader, 1 << 20))
    os.close(reader)


def lines_of(log: Path) -> list[str]:
    """The lines of a log without marks."""
    return [line for line in log.read_text(encoding="utf-8").splitlines() if not MARK.match(line)]


def test_the_log_has_every_line_also_where_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["megazh", "pretrain", "-c", "my recipe.yaml"])
    reader, writer = os.pipe()
    with writing(writer, "ascii") as made:
        made.outlive(log_follows=True)
        print("before there is a folder")
        made.log_to(tmp_path / "logs" / "console.log")
        os.close(reader)
        print("步 1")
        print("warning", file=sys.stderr)
        sys.stdout.write("no line break")
        made.finish(130)
    assert lines_of(tmp_path / "logs" / "console.log") == [
        "before there is a folder", "步 1", "warning", "no line break"
    ]  # fmt: skip
    first, *_, last = (tmp_path / "logs" / "console.log").read_text().splitlines()
    start = rf"--- \d{{4}}-\d\d-\d\d [\d:+-]+ {re.escape(os.uname().nodename)}, process {os.getpid()}: "
    assert re.fullmatch(start + re.escape("megazh pretrain -c 'my recipe.yaml'"), first)
    assert last.endswith(f"process {os.getpid()} ended with exit code 130")


def test_the_log_is_appended_to(tmp_path: Path) -> None:
    for number in range(2):
        with writing("/dev/null") as made:
            made.log_to(tmp_path / "console.log")
            print(f"attempt {number}")
    assert lines_of(tmp_path / "console.log") == ["attempt 0", "attempt 1"]


def test_a_log_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "console.log").symlink_to("/dev/full")
    with writing(tmp_path / "out") as made:
        made.log_to(tmp_path / "console.log")
        print("one")
        print("two")
    warning, *rest = (tmp_path / "out").read_text().splitlines()
    assert warning == f"warning: {tmp_path}/console.log: No space left on device; lines will be missing there"
    assert rest == ["one", "two"]


def test_a_progress_bar_leaves_nothing_in_the_log(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    with writing(end) as made:
        made.log_to(tmp_path / "console.log")
        with Progress("reading", 100) as progress:
            for _ in range(10):
                progress.advance(10)
        print("done")
        sys.stdout.write("a line of Windows\r")
        sys.stdout.write("\n")
        made.finish()
        shown = ""
        while "Windows" not in shown:
            shown += os.read(terminal, 1 << 16).decode()
    assert "reading" in shown
    assert [line.strip() for line in lines_of(tmp_path / "console.log")] == ["done", "a line of Windows"]
    os.close(terminal)


def test_progress_on_a_dead_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    for dead in (None, open(os.devnull, "w")):  # noqa: SIM115
        if dead is not None:
            dead.close()
        monkeypatch.setattr(sys, "stderr", dead)
        monkeypatch.setattr("megazh.progress._LOG_SECONDS", 0)
        with Progress("reading", 100) as progress:
            progress.advance(100)
    assert isinstance(lenient(None), Stream)


def test_a_closed_stdout_is_not_the_next_file_that_is_opened(tmp_path: Path) -> None:
    script = f"""
import sys
from megazh.console import open_console
with open_console() as console:
    with open({str(tmp_path / "data")!r}, "w") as file:
        print("lost", flush=True)
        print("lost", file=sys.stderr, flush=True)
        file.write("data")
"""
    root = str(Path(__file__).parents[1])
    shell = ["bash", "-c", '"$1" -c "$2" <&- >&- 2>&-', "bash", sys.executable, script]
    assert run_command(shell, env={"PYTHONPATH": root}).returncode == 0
    assert (tmp_path / "data").read_text() == "data"
