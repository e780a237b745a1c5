"""Whether a Slurm job starts again: exit code, state, and starts without progress, with made-up answers of Slurm."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_runs import add_checkpoint, make_run, write_recipe

from megazh.cluster.slurm import requeue
from megazh.cluster.slurm.requeue import LIMIT, requeueing, starts_without_progress
from megazh.errors import DivergedError, Stopped, UsageError, WorkerError
from megazh.run.folder import RunFolder
from megazh.training.recipe import load_recipe

SQUEUE = '#!/bin/sh\necho "$@" >> {calls}\ncat {state}\n'
SCONTROL = '#!/bin/sh\necho "$@" >> {calls}\n{end}\n'


class Slurm:
    """Commands of Slurm that record how they were called."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "calls").touch()
        self.set("RUNNING")
        self.refuse("exit 0")
        self._write("squeue", SQUEUE.format(calls=folder / "calls", state=folder / "state"))

    def set(self, state: str) -> None:
        (self._folder / "state").write_text(state)

    def refuse(self, end: str) -> None:
        self._write("scontrol", SCONTROL.format(calls=self._folder / "calls", end=end))

    def requeued(self) -> list[str]:
        calls = (self._folder / "calls").read_text().splitlines()
        return [call.removeprefix("requeue ") for call in calls if call.startswith("requeue ")]

    def _write(self, name: str, text: str) -> None:
        (self._folder / name).write_text(text)
        (self._folder / name).chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """Job 17 of Slurm, in its first start, which may be requeued three times."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(requeue, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name, value in {"SLURM_JOB_ID": "17", LIMIT: "3"}.items():
        monkeypatch.setenv(name, value)
    yield Slurm(folder)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@pytest.fixture
def run(tmp_path: Path, stories: Path, slurm: Slurm) -> RunFolder:
    """A run whose first attempt, in job 17, has saved step 6."""
    return make_run(tmp_path / "run", write_recipe(tmp_path / "r.yaml", stories, steps=20, model={"vocab_size": 400}))


def begin_again(run: RunFolder, monkeypatch: pytest.MonkeyPatch, restarts: int, steps: int) -> None:
    """Record the attempt of a later start of the job."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    recipe = load_recipe(run.config)
    run.begin(recipe.to_yaml(), recipe.open_mixture(), steps=steps)


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (4, False), (5, True), (6, False),
                                             (7, False), (75, True), (130, False)])  # fmt: skip
def test_the_exit_code_decides(run: RunFolder, slurm: Slurm, code: int, again: bool) -> None:
    assert requeueing(run, lambda: code) == code
    assert slurm.requeued() == (["17"] if again else [])


@pytest.mark.parametrize(("error", "again"), [(WorkerError("x"), True), (Stopped(), True), (DivergedError("x"), False),
                                              (KeyboardInterrupt(), False)])  # fmt: skip
def test_errors_are_passed_on(run: RunFolder, slurm: Slurm, error: BaseException, again: bool) -> None:
    def fail() -> int:
        raise error

    with pytest.raises(type(error)):
        requeueing(run, fail)
    assert bool(slurm.requeued()) == again


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", ""])
def test_a_job_that_slurm_ends_is_slurms(
    run: RunFolder, slurm: Slurm, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.set(state)
    requeueing(run, lambda: 75)
    assert not slurm.requeued()
    assert (
        f"Slurm job 17 is {state or 'unknown to Slurm'}: whether it starts again is Slurm's" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "value"), [(LIMIT, "0"), (LIMIT, None), ("SLURM_JOB_ID", None), ("SLURM_JOB_ID", "$(x)")]
)
def test_other_jobs_are_left_alone(
    run: RunFolder, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    assert requeueing(run, lambda: 75) == 75
    assert not slurm.requeued()


def test_a_limit_that_is_no_number_is_refused(run: RunFolder, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "often")
    with pytest.raises(UsageError, match="MEGAZH_REQUEUE=often: expected a number of requeues"):
        requeueing(run, lambda: 0)


def test_a_task_of_an_array_is_requeued_alone(run: RunFolder, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeueing(run, lambda: 75)
    assert slurm.requeued() == ["16_3"]


def test_a_controller_that_is_busy_is_asked_again(run: RunFolder, slurm: Slurm) -> None:
    slurm.refuse('test "$(grep -c requeue "$(dirname "$0")/calls")" -gt 2')
    assert requeueing(run, lambda: 75) == 75
    assert slurm.requeued() == ["17"] * 3


def test_a_refusal_of_slurm_is_one_line(run: RunFolder, slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.refuse("echo 'Requested operation\n is disabled' >&2; exit 1")
    assert requeueing(run, lambda: 75) == 75
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "Slurm job 17 cannot be requeued: Requested operation is disabled; submit it again by hand"


def test_starts_without_progress_are_limited(
    run: RunFolder, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first start has saved six steps; each later one saves none."""
    assert starts_without_progress(run) == 0
    for restarts in (1, 2, 3):
        begin_again(run, monkeypatch, restarts, 6)
        requeueing(run, lambda: 5)
        assert slurm.requeued() == ["17"] * restarts
    begin_again(run, monkeypatch, 4, 6)
    requeueing(run, lambda: 5)
    assert len(slurm.requeued()) == 3
    assert "requeued 3 times in a row without progress (MEGAZH_REQUEUE=3): not again" in capsys.readouterr().err
    add_checkpoint(run, load_recipe(run.config), 9)
    requeueing(run, lambda: 5)
    assert len(slurm.requeued()) == 4, "progress counts anew"


def test_starts_that_fail_before_the_run_begins_are_limited_too(
    run: RunFolder, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for restarts in range(5):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        requeueing(run, lambda: 5)
        requeueing(RunFolder(tmp_path / "never begun"), lambda: 5)
    assert len(slurm.requeued()) == (4 + 3)


def test_other_jobs_in_the_folder_do_not_count(run: RunFolder, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in ("18", "19"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        begin_again(run, monkeypatch, 0, 6)
        assert starts_without_progress(run) == 1
