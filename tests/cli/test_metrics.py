"""`megazh metrics` as a user sees it: files, standard output, refusals."""

import csv
import sys
from pathlib import Path

import pytest
from processes import run_command
from run.test_metrics import write_run

from megazh.cli import main


def call(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["metrics", *words])
    return ended.value.code


def test_a_table_in_a_file_and_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, 4)
    capfd.readouterr()
    assert not call(str(tmp_path), "--csv", str(tmp_path / "steps.csv"))
    assert capfd.readouterr().out == f"{tmp_path}/steps.csv: 4 rows\n"
    text = (tmp_path / "steps.csv").read_text("utf-8")
    assert [row["step"] for row in csv.DictReader(text.splitlines())] == ["1", "2", "3", "4"]
    assert not call(str(tmp_path), "--csv", "-")
    assert capfd.readouterr().out == text
    assert not call(str(tmp_path))
    assert "validation          2  2 to 4" in capfd.readouterr().out


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    write_run(tmp_path, 600)
    command = f"{sys.executable} -m megazh metrics {tmp_path} --csv - | head -1"
    found = run_command(["bash", "-c", command], 60, {"PYTHONPATH": str(Path(__file__).parents[2])}, tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("step,steps,tokens,loss,")


def test_refusals_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(str(tmp_path)) == 2
    assert "metrics.jsonl: no such file; give the folder of a run" in capfd.readouterr().err
    write_run(tmp_path, 1)
    capfd.readouterr()
    assert call(str(tmp_path), "--csv", str(tmp_path / "." / "metrics.jsonl")) == 2
    assert "the records of the run themselves; give another file" in capfd.readouterr().err
    for path, reason in (
        (tmp_path / "metrics.jsonl" / "x.csv", "is no folder; make it first"),
        (tmp_path / "none" / "x.csv", f"{tmp_path}/none is no folder; make it first"),
        (tmp_path, "a folder; name a file in it"),
        (Path("/proc/x.csv"), "cannot be written"),
    ):
        assert call(str(tmp_path), "--csv", str(path)) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"error: --csv {path}: ")
        assert reason in line
    assert not (tmp_path / "none").exists()


def test_nothing_is_recorded_yet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    for words in ([], ["--csv", "-"]):
        assert call(str(tmp_path), *words) == 2
        assert "nothing is recorded yet" in capfd.readouterr().err
