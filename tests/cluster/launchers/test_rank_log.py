"""The log of a rank: the lines that are copied to the terminal, and the reason of a failure that is found in it."""

import os
from pathlib import Path

import pytest

from megazh.cluster.launchers.rank_log import Output, RankLog

TRACEBACK = 'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log with the output of an earlier attempt."""
    path = tmp_path / "rank_0.log"
    path.write_text("error: of an earlier attempt\n")
    return path


def append(path: Path, text: str | bytes) -> None:
    """Add to the log, as a rank does."""
    with open(path, "ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def test_whole_lines_are_shown_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RankLog(path)
    log.show()
    append(path, "one\ntw")
    log.show()
    assert capsys.readouterr().err == "one\n"
    append(path, "o\n")
    log.show()
    log.show()
    assert capsys.readouterr().err == "two\n"
    log.hide()
    append(path, "three\n")
    log.show()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("final", ["error: disk full", "[rank3]: error: disk full", "interrupted", TRACEBACK])
def test_nothing_is_shown_from_a_final_error_on(path: Path, capsys: pytest.CaptureFixture[str], final: str) -> None:
    log = RankLog(path)
    append(path, f"loading\n{final}\nmore\n")
    log.show()
    append(path, "still more\n")
    log.show()
    assert capsys.readouterr().err == "loading\n"


@pytest.mark.parametrize(
    ("text", "own_error", "last_words"),
    [
        ("", "", ""),
        ("loading\n\n", "", "loading"),
        ("error: one\nerror: two\nleft over\n", "error: two", "left over"),
        (f"{TRACEBACK}ValueError: seven stages\nleft over\n", "", "ValueError: seven stages"),
        ("[rank2]: torch.OutOfMemoryError: 8 GiB\n[rank2]:[W1] not destroyed\n", "", "torch.OutOfMemoryError: 8 GiB"),
        (f"{TRACEBACK}KeyboardError\n", "", "KeyboardError"),
        ("x" * 1000, "", "x" * 300),
    ],
)
def test_the_reason_is_taken_from_this_attempt(path: Path, text: str, own_error: str, last_words: str) -> None:
    log = RankLog(path)
    append(path, text)
    assert (log.own_error(), log.last_words()) == (own_error, last_words)


def test_only_the_end_of_a_long_log_is_searched(path: Path) -> None:
    log = RankLog(path)
    append(path, "error: long ago\n" + "step\n" * 20_000 + "error: now\n")
    assert log.own_error() == "error: now"
    assert len(log.tail()) < 20_000


def test_output_that_was_shown_takes_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    output, lines = Output("stdout"), [f"step {step:9}\n" for step in range(700_000)]
    for at in range(0, len(lines), 70_000):
        os.write(output.descriptor, "".join(lines[at : at + 70_000]).encode())
        output.show()
        assert os.fstat(output.descriptor).st_blocks * 512 < 3 << 20, "a piece, and what the last one has left"
    assert os.fstat(output.descriptor).st_size > 9 << 20
    output.close()
    assert capsys.readouterr().out == "".join(lines)


def test_without_a_file_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RankLog(tmp_path / "nowhere.log")
    log.show()
    assert (log.tail(), log.own_error(), log.last_words()) == ([], "", "")
    append(log.path, b"\xff\n")
    log.show()
    assert (log.last_words(), capsys.readouterr().err) == ("\ufffd", "\ufffd\n")
