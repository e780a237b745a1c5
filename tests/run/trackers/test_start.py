"""Trackers of a run, with stand-ins for their packages: what they are sent, over resumes, kills and faults."""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until
from run.test_metrics import record

from megazh.run.metrics import Metrics
from megazh.run.records import CorpusValidation
from megazh.run.trackers import start
from megazh.run.trackers.tracker import TrackedRun, TrackerName, is_installed

FAKES = Path(__file__).parent / "fakes"
CORPORA = {"维基": CorpusValidation.of(2.0, 1.0, 3), "C++": CorpusValidation.of(4.0, 1.5, 1)}


@pytest.fixture(autouse=True)
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the stand-ins on the path; the file of the calls that they get."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.jsonl"))
    for name in ("WANDB_MODE", "WANDB_PROJECT", "SWANLAB_MODE", "SWANLAB_PROJ_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(start, "_FINISH_SECONDS", 60.0)  # on a busy machine
    return tmp_path / "calls.jsonl"


def made(path: Path, name: str) -> list[dict[str, Any]]:
    """The calls of a name."""
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    return [each for each in found if each["call"] == name]


def train(folder: Path, name: str, first: int, last: int) -> None:
    """An attempt of a run: each step is recorded, and after every fourth one a validation and two samples."""
    run = TrackedRun("20261128-ab", "demo", "china", {"batch": {"seq_len": 64}}, folder / "run" / "trackers")
    with Metrics(folder / "run", first, quiet=False) as metrics:
        metrics.track([TrackerName(name)], run)
        metrics.event(first, "resume" if first else "start", f"begun at {first}")
        for step in range(first + 1, last + 1):
            metrics.step(record(step))
            if step % 4 == 0:
                metrics.validation(step, step * 16_384, 2.5, 1.25, 4, CORPORA)
                metrics.sample(step, "从前", "有")
                metrics.sample(step, "后来", "没")


@pytest.mark.parametrize("name", TrackerName)
def test_a_tracker_gets_each_record_once(
    name: str, tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, name, 0, 9)
    train(tmp_path, name, 4, 8)  # from an earlier checkpoint, and not as far
    train(tmp_path, name, 6, 13)
    assert made(calls, "start") == 3 * [
        {"call": "start", "id": "20261128-ab", "name": "demo", "project": "china", "config": {"batch": {"seq_len": 64}}}
    ]
    points = made(calls, "scalars")
    assert [each["step"] for each in points if "train/loss" in each] == list(range(1, 14))
    validations = [each for each in points if "validation/loss" in each]
    assert [each["step"] for each in validations] == [4, 8, 12]
    assert (validations[0]["validation/loss"], validations[0]["validation/维基/loss"]) == (2.5, 2.0)
    assert points[0]["train/lr"] == 4.87e-4
    texts = [(each["step"], each["text"]) for each in made(calls, "text")]
    assert [each for each in texts if "begun" in each[1]] == [(0, "begun at 0"), (4, "begun at 4"), (6, "begun at 6")]
    assert [each for each in texts if "begun" not in each[1]] == [
        (step, text) for step in (4, 8, 12) for text in ("从前有", "后来没")
    ]
    assert len(made(calls, "finish")) == 3
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "noise" not in captured.out
    assert "noise of finish" in (tmp_path / "run" / "trackers" / f"{name}.log").read_text()
    assert name not in sys.modules, "only its own process imports it"


def test_a_run_that_goes_back_sends_what_comes_after_the_steps_it_takes_anew(tmp_path: Path, calls: Path) -> None:
    run = TrackedRun("20261128-ab", "demo", "china", {"batch": {"seq_len": 64}}, tmp_path / "run" / "trackers")
    with Metrics(tmp_path / "run", 0, quiet=False) as metrics:
        metrics.track([TrackerName.WANDB], run)
        for first, last in ((0, 6), (2, 4), (3, 9)):
            if first:
                metrics.event(last, "rollback", f"back to {first}")
                metrics.go_back(first)
            for step in range(first + 1, last + 1):
                metrics.step(record(step))
            sent = len({*range(1, last + 1), *range(1, 7)})
            wait_until(lambda sent=sent: len(made(calls, "scalars")) == sent, 30, "steps that are sent")
    assert [each["step"] for each in made(calls, "scalars")] == list(range(1, 10))
    assert [each["text"] for each in made(calls, "text")] == ["back to 2", "back to 3"]


def test_a_tracker_that_is_named_later_gets_the_history(tmp_path: Path, calls: Path) -> None:
    with Metrics(tmp_path / "run", 0, quiet=False) as metrics:
        for step in range(1, 4):
            metrics.step(record(step))
    assert not (tmp_path / "run" / "trackers").exists()
    train(tmp_path, "wandb", 3, 5)
    assert [each["step"] for each in made(calls, "scalars") if "train/loss" in each] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("fault", ["raise start", "raise scalars", "raise finish"])
def test_a_fault_is_a_line_and_the_next_attempt_sends_the_rest(
    fault: str, tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAULT", fault)
    train(tmp_path, "wandb", 0, 3)
    out = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step") for line in out) == 3
    assert [line for line in out if line.startswith("warning")] == [
        f"warning: wandb: ConnectionError: no route to host ({fault[6:]}); the rest is sent later"
    ]
    assert "Traceback" in (tmp_path / "run" / "trackers" / "wandb.log").read_text()
    monkeypatch.delenv("FAKE_FAULT")
    train(tmp_path, "wandb", 3, 6)
    found = [each["step"] for each in made(calls, "scalars") if "train/loss" in each]
    assert found == [2, 3, 4, 5, 6] if fault == "raise scalars" else [1, 2, 3, 4, 5, 6], "none is sent twice"


@pytest.mark.parametrize("wait", [0.0, 3600.0])
def test_a_service_that_was_down_is_sent_the_rest_by_the_same_attempt(
    wait: float, tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the run goes on or, where the wait is not over, at its end."""
    for name in ("_FIRST_WAIT_SECONDS", "_LONGEST_WAIT_SECONDS"):
        monkeypatch.setattr(start, name, wait)
    monkeypatch.setenv("FAKE_FAULT", "raise start")
    lines: list[str] = []
    monkeypatch.setattr("megazh.run.metrics._print", lines.append)
    run = TrackedRun("20261128-ab", "demo", "china", {}, tmp_path / "run" / "trackers")
    with Metrics(tmp_path / "run", 0, quiet=False) as metrics:

        def takes_a_step_until(found: bool) -> bool:
            metrics.step(record(1 + sum(line.startswith("step") for line in lines)))
            return found

        metrics.track([TrackerName.WANDB], run)
        failed = "warning: wandb: ConnectionError: no route to host (start); the rest is sent later"
        wait_until(lambda: takes_a_step_until(lines.count(failed) == (1 if wait else 2)), 30, "failures")
        monkeypatch.delenv("FAKE_FAULT")
        if wait:
            wait_until(lambda: takes_a_step_until(not metrics._trackers._running), 30, "the end of its process")
        else:
            wait_until(lambda: takes_a_step_until(bool(made(calls, "start"))), 30, "a start")
        assert len(made(calls, "start")) == (0 if wait else 1)
    steps = [line for line in lines if line.startswith("step")]
    assert [each["step"] for each in made(calls, "scalars")] == list(range(1, 1 + len(steps)))


def test_each_wait_is_twice_as_long_up_to_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, starts = [1e6], []
    monkeypatch.setattr(start.time, "monotonic", lambda: now[0])

    def fail(name: TrackerName, metrics: Path, run: TrackedRun) -> None:
        starts.append(now[0] - 1e6)
        raise OSError("no memory")

    monkeypatch.setattr(start, "_start", fail)
    run = TrackedRun("20261128-ab", "demo", "china", {}, tmp_path)
    trackers = start.Trackers([TrackerName.WANDB], tmp_path / "metrics.jsonl", run, print)
    for _ in range(4 * 60 * 60):
        now[0] += 1.0
        trackers.poll()
    minutes = [(after - before) / 60 for before, after in itertools.pairwise(starts)]
    assert minutes == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("fault", ["hang start", "hang scalars", "hang finish"])
def test_a_service_that_hangs_keeps_no_run(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAULT", fault)
    monkeypatch.setattr(start, "_FINISH_SECONDS", 1.0)
    begun = time.monotonic()
    train(tmp_path, "wandb", 0, 20)
    assert time.monotonic() - begun < 30
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "is still being sent" in line]
    os.kill(int(line.split()[-1]), signal.SIGKILL)


def test_a_package_that_is_missing_or_broken_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise ImportError('its protobuf is too old')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "broken"), os.environ["PYTHONPATH"]]))
    train(tmp_path, "wandb", 0, 3)
    assert "warning: wandb: ImportError: its protobuf is too old; the rest is sent later" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAZH_WARNED", "")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trackers").touch()
    train(tmp_path, "wandb", 0, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("wandb is sent the records later")


@pytest.fixture
def killed(tmp_path: Path) -> int:
    """The number of steps of a run that was killed while a tracker followed it."""
    child = os.fork()
    if not child:
        try:
            train(tmp_path, "wandb", 0, 4)
            train(tmp_path, "wandb", 4, 10**6)
        finally:
            os._exit(1)
    calls = tmp_path / "calls.jsonl"
    wait_until(lambda: len(made(calls, "scalars")) > 50, 60, "steps that are sent")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b'"kind": "step"')


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a process with threads that forks
def test_what_a_killed_run_has_recorded_is_sent_all_the_same(killed: int, tmp_path: Path, calls: Path) -> None:
    wait_until(lambda: len(made(calls, "finish")) == 2, 60, "the end of the tracker")
    found = [each["step"] for each in made(calls, "scalars") if "train/loss" in each]
    assert found == list(range(1, len(found) + 1))
    assert killed - 1 <= len(found) <= killed, "the last line may be torn"


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    before = is_installed(TrackerName.WANDB)
    monkeypatch.syspath_prepend(str(FAKES))
    assert is_installed(TrackerName.WANDB)
    try:
        import wandb  # noqa: F401
    except ImportError:
        assert not before
