"""A place that cannot be written is refused before any work, in one line that names it and the option to change."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import drop_root
from textdata import finish, is_one_line_error, json_lines, megazh, start, texts, tokenizer_path

from megazh.errors import UsageError, WorkerError

SETUP = Path(__file__).parents[2] / "jobs" / "setup.sh"


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder of another user, as far as this one can tell."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    yield folder
    folder.chmod(0o700)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(texts(50)))
    return path


def refused(place: Path, *arguments: object, **options: object) -> str:
    """The one line with which a command is refused; nothing is made in `place`."""
    code, out, err = megazh(*arguments, preexec_fn=drop_root, **options)
    assert (code, out) == (UsageError.exit_code, ""), err
    assert is_one_line_error(err, "cannot be written: user ", " has no permission to write"), err
    assert not list(place.iterdir())
    return err


def test_stories(closed: Path) -> None:
    err = refused(closed, "stories", "--count", 3, "--output", closed / "new" / "s.jsonl")
    assert err.startswith(f"error: --output {closed}/new/s.jsonl: ")
    assert err.endswith(f"in {closed}; choose another --output\n")


@pytest.mark.slow
def test_tokenizer_train(closed: Path, corpus: Path) -> None:
    arguments = ["tokenizer", "train", "--input", corpus, "--vocab-size", 300]
    assert "choose another --output" in refused(closed, *arguments, "--output", closed / "tokenizer.json")


@pytest.mark.slow
def test_index_build_and_merge(closed: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ["index", "build", "--input", corpus, "--tokenizer", tokenizer_path(), "--output"]
    assert "choose another --output" in refused(closed, *arguments, closed / "x")
    assert megazh(*arguments, tmp_path / "x")[0] == 0
    merge = ["index", "merge", tmp_path / "x", tmp_path / "x", "--output", closed / "y"]
    assert "choose another --output" in refused(closed, *merge)


def test_the_run_folder(closed: Path) -> None:
    err = refused(closed, "pretrain", "--device", "cpu", "-c", "demo", "-r", closed / "run")
    assert err.startswith(f"error: -r {closed}/run: ")
    assert err.endswith("give a folder of its own, such as -r runs/NAME\n")


@pytest.mark.slow
def test_data_below_a_current_folder_that_is_closed(closed: Path, tmp_path: Path) -> None:
    words = ["env", f"--chdir={closed}", f"PYTHONPATH={SETUP.parents[1]}", sys.executable, "-P"]
    arguments = ["-m", "megazh", "pretrain", "--device", "cpu", "-c", "demo", "-r", tmp_path / "run"]
    code, out, err = finish(start(*words, *arguments, preexec_fn=drop_root))
    assert (code, out) == (UsageError.exit_code, ""), err
    data = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(data) == 1
    assert data[0].startswith("error: data_index/demo: cannot be written: ")
    assert data[0].endswith("start in a folder that you can write to, and name the run folder with -r")


def test_an_environment_that_its_user_cannot_make(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    (root / "jobs").mkdir(parents=True)
    (root / "jobs" / "setup.sh").write_bytes(SETUP.read_bytes())
    root.chmod(0o500)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEGAZH_")}
    finished = subprocess.run(
        ["bash", root / "jobs" / "setup.sh"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        preexec_fn=drop_root,
    )
    root.chmod(0o700)
    assert finished.returncode == WorkerError.exit_code
    assert finished.stderr.count("\n") == 1
    assert finished.stderr.startswith(f"error: setup: {root}/.venv cannot be written by user ")
    assert finished.stderr.endswith(f"have the owner of {root} run jobs/setup.sh, or set MEGAZH_PYTHON\n")
