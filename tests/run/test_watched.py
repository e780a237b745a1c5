"""The state of a watched run, from its files."""

import json
import time
from pathlib import Path

from made_runs import write_metrics

from megazh.files import locked
from megazh.run.folder import DESCRIPTION, RunFolder
from megazh.run.metrics import Metrics
from megazh.run.requests import write_private
from megazh.run.state import STATE, State, StateRecord
from megazh.run.watched import Watched


def state(run: Watched, later: float = 0.0) -> tuple[str, bool]:
    """What the run is said to do, `later` seconds from now, and whether it has ended."""
    run.update()
    standing = run.standing(time.time() + later)
    return standing.text, standing.ended


def say(folder: RunFolder, state: State) -> None:
    """Record a state, as the run does."""
    write_private(folder.control / STATE, StateRecord(state=state, since=time.time()))


def test_the_course_of_a_run(tmp_path: Path) -> None:
    run, folder = Watched(tmp_path), RunFolder(tmp_path)
    assert state(run) == ("waiting for the run to begin", False)
    folder.control.mkdir(mode=0o700)
    with locked(folder.lock, "busy"):
        assert state(run) == ("starting", False)
        say(folder, State.TRAINING)
        write_metrics(folder, 6)
        assert state(run, 30) == ("training", False)
        assert state(run, 185) == ("training, but no step for 3m05s", False)
        say(folder, State.VALIDATING)
        assert state(run, 185) == ("validating", False)
        say(folder, State.PAUSED)
        assert state(run, 185) == ("paused for 3m05s", False)
        with Metrics(tmp_path, 5, quiet=False):
            run.update()
            assert len(run.losses) == 5
    assert state(run) == ("no end was recorded: killed, or the machine failed", True)


def test_how_a_run_has_ended(tmp_path: Path) -> None:
    run, attempt = Watched(tmp_path), {"started": "2026-11-28T09:11:48Z"}
    write_metrics(RunFolder(tmp_path), 6)
    assert state(run) == ("complete", True)
    ended = {**attempt, "ended": "2026-11-28T09:12:48Z", "reason": "ctl\x1b stop", "exit_code": 10}
    (tmp_path / DESCRIPTION).write_text(json.dumps({"attempts": [ended]}))
    assert state(run) == ("failed (exit code 10)", True)
    assert run.standing(time.time()).reason == "ctl stop"
    (tmp_path / DESCRIPTION).write_text("{")
    assert state(run) == ("failed (exit code 10)", True), "a damaged file changes nothing"
    for code, word in ((0, "complete"), (75, "stopped (exit code 75)"), (130, "stopped (exit code 130)")):
        (tmp_path / DESCRIPTION).write_text(json.dumps({"attempts": [{**ended, "exit_code": code}]}))
        assert state(run) == (word, True)
    with locked(RunFolder(tmp_path).lock, "busy"):
        assert state(run) == ("starting", False), "again"


def test_the_newest_samples_and_validations_are_kept(tmp_path: Path) -> None:
    write_metrics(RunFolder(tmp_path), 6)
    with Metrics(tmp_path, 6, quiet=False) as metrics:
        metrics.sample(6, "问0", "新")
    run = Watched(tmp_path)
    run.update()
    run.update()
    assert [(prompt, sample["text"]) for prompt, sample in run.samples.items()] == [
        ("问1", "二\n二"),
        ("问2", "三"),
        ("问0", "新"),
    ]
    assert [record["loss"] for record in run.validations] == [5.0, 2.5]
    assert list(run.losses) == [4.0, 3.5, 3.0, 2.5, 2.0, 1.5]
