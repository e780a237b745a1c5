"""Metrics are read as they are written, and only once."""

import os
from pathlib import Path

import pytest
from made_runs import write_metrics

from megazh.run.folder import RunFolder
from megazh.run.metrics import METRICS, Metrics
from megazh.run.tail import Tail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The metrics of four steps, two validations and three samples."""
    write_metrics(RunFolder(tmp_path), 4)
    return tmp_path / METRICS


def test_each_record_comes_once(path: Path) -> None:
    tail = Tail(path)
    anew, records = tail.read()
    assert (anew, len(records)) == (False, 9)
    assert tail.read() == (False, [])
    with open(path, "ab") as file:
        file.write(b'{"kind": "event", "st')
        file.flush()
        assert tail.read() == (False, [])
        file.write(b'ep": 4}\n{"kind": "event", "step": 5}\n')
        file.flush()
        assert [record["step"] for record in tail.read()[1]] == [4, 5]


def test_what_was_read_is_not_read_again(path: Path) -> None:
    tail = Tail(path)
    tail.read()
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"x" * size)
        file.write(b'{"kind": "event", "step": 9}\n')
    assert [record["step"] for record in tail.read()[1]] == [9]
    assert tail.unreadable == 0


def test_a_resume_that_drops_records_begins_anew(path: Path) -> None:
    tail = Tail(path)
    tail.read()
    with Metrics(path.parent, 2, quiet=False):
        anew, records = tail.read()
    assert anew
    assert [(record["kind"], record["step"]) for record in records] == [("validation", 0), ("step", 1), ("step", 2)]
    os.truncate(path, 0)
    assert tail.read() == (True, [])


def test_a_long_file_comes_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megazh.run.tail._CHUNK", 400)
    tail, steps = Tail(path), []
    while True:
        steps += [record["step"] for record in tail.read()[1] if record["kind"] == "step"]
        if not tail.behind:
            break
    assert steps == [1, 2, 3, 4]


def test_a_file_that_comes_and_goes(path: Path) -> None:
    tail = Tail(path.parent / "later")
    assert tail.read() == (False, [])
    path.rename(path.parent / "later")
    assert len(tail.read()[1]) == 9
    (path.parent / "later").unlink()
    assert tail.read() == (True, [])
    assert tail.read() == (False, [])


@pytest.mark.parametrize("line", [b"x", b"[]", b"3", b'{"kind": 1, "step": 2}', b'{"kind": "step"}', b"\xff", b""])
def test_a_damaged_line_is_counted_and_passed_over(path: Path, line: bytes) -> None:
    with open(path, "ab") as file:
        file.write(line + b"\n" + b'{"kind": "event", "step": 9}\n')
    tail = Tail(path)
    assert len(tail.read()[1]) == 10
    assert tail.unreadable == 1
