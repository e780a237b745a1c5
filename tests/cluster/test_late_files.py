"""Files of another machine that a shared disk shows late: they are waited for, and a line says so."""

import threading
import time
from pathlib import Path

import pytest
from made_runs import make_run, write_recipe
from recipes import make_recipe

from megazh.cluster import late_files
from megazh.cluster.late_files import await_checkpoint, await_data
from megazh.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path, stories: Path) -> RunFolder:
    """A run that has ended on another machine, with a checkpoint of step 6."""
    run = make_run(tmp_path / "run", write_recipe(tmp_path / "r.yaml", stories, model={"vocab_size": 400}))
    run.end(75, "stopped")
    return run


def late(path: Path, seconds: float = 0.6) -> threading.Thread:
    """Hide a path, and show it again later, in a thread."""
    hidden = path.rename(path.with_name(f".hidden-{path.name}"))

    def show() -> None:
        time.sleep(seconds)
        hidden.rename(path)

    thread = threading.Thread(target=show)
    thread.start()
    return thread


@pytest.mark.parametrize("part", [".", "manifest.json"])
def test_a_checkpoint_of_another_machine(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    path = run.checkpoints / "step_00000006"
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    await_checkpoint(run)
    assert capsys.readouterr().err == ""
    thread = late((path / part).resolve())
    await_checkpoint(run)
    assert not thread.is_alive() or (path / "manifest.json").exists()
    thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: not there, or not whole; the last attempt wrote it on ")
    assert line.endswith("a shared disk may show it late: waiting for it")


def test_nobody_waits_for_what_this_machine_has_lost(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoints / "step_00000006").rename(run.path / "away")
    await_checkpoint(run)
    await_checkpoint(RunFolder(run.path / "no run"))
    assert capsys.readouterr().err == ""


def test_a_checkpoint_that_does_not_come(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    monkeypatch.setattr(late_files, "_SECONDS", 0.2)
    (run.checkpoints / "step_00000006").rename(run.path / "away")
    await_checkpoint(run)
    assert capsys.readouterr().err.splitlines()[-1].endswith("; going on without it")


@pytest.mark.parametrize(("given", "file"), [("mixture.yaml", "mixture.yaml"), ("wiki", "wiki.idx")])
def test_data_of_the_job_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str, file: str
) -> None:
    manifest, recipe = tmp_path / file, make_recipe(data={"manifest": str(tmp_path / given)})
    await_data(recipe)
    assert capsys.readouterr().err == "", "no job before"
    manifest.touch()
    monkeypatch.setenv("SLURM_JOB_DEPENDENCY", "afterok:17")
    await_data(recipe)
    assert capsys.readouterr().err == "", "it is there"
    thread = late(manifest)
    await_data(recipe)
    assert manifest.exists()
    thread.join()
    assert "the job before this one may have written it" in capsys.readouterr().err
