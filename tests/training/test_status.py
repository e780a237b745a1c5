"""The state of a run from its files: running or not, before the first step, and with files that are cut off."""

import json
from pathlib import Path

import pytest
from made_runs import make_run, write_metrics, write_recipe

from megazh.errors import UsageError
from megazh.files import locked
from megazh.run.changes import Change
from megazh.run.folder import RunFolder
from megazh.run.requests import Inbox
from megazh.run.state import State, StateFile, read_state
from megazh.training.status import status


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A complete run of six steps with a checkpoint."""
    folder = make_run(tmp_path / "run", write_recipe(tmp_path / "recipe.yaml", stories))
    write_metrics(folder, 6)
    return folder


def test_a_complete_run(run: RunFolder) -> None:
    found = status(run)
    assert (found.running, found.state, found.step, found.steps) == (False, "complete", 6, 6)
    assert (found.loss, found.validation_loss, found.validation_step, found.tokens) == (1.5, 2.5, 6, 1536)
    assert (found.checkpoint_step, found.eta_seconds) == (6, None)
    assert "state       complete" in list(found.lines(found.recorded or 0))


def test_a_running_run_says_what_it_does(run: RunFolder) -> None:
    with locked(run.lock, "in use"):
        Inbox.clear(run)
        assert status(run).state == "starting"
        states = StateFile(run, quiet=False)
        states.set(State.TRAINING)
        with states.during(State.VALIDATING):
            assert status(run).state == "validating"
        found = status(run)
        assert (found.running, found.state, found.eta_seconds) == (True, "training", 0)
        assert found.since is not None
        assert f"state       training for 0:00:{2:02d}" in list(found.lines(found.since + 2))
        frozen = list(found.lines(found.since + 120))
        assert "state       training for 0:02:00, but no sign of progress for 0:02:00" in frozen
        (run.control / "state.json").write_text('{"state": "flying", "since": 0}')
        assert read_state(run) is None
    assert not status(run).running


def test_only_one_rank_writes_the_state_and_only_beside_requests(run: RunFolder) -> None:
    StateFile(run, quiet=False).set(State.TRAINING)
    assert not run.control.exists()
    Inbox.clear(run)
    StateFile(run, quiet=True).set(State.TRAINING)
    assert read_state(run) is None


def test_no_state_is_written_where_a_run_takes_no_commands(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    run.control.symlink_to(tmp_path / "elsewhere")
    StateFile(run, quiet=False).set(State.TRAINING)
    run.control.unlink()
    run.control.mkdir()
    run.control.chmod(0o777)
    StateFile(run, quiet=False).set(State.TRAINING)
    assert not any((tmp_path / "elsewhere").iterdir())
    assert not any(run.control.iterdir())


def test_a_run_that_has_done_nothing(stories: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", write_recipe(tmp_path / "recipe.yaml", stories), step=0)
    found = status(run)
    assert (found.state, found.step, found.loss) == ("ended", 0, None)
    assert not any(line.startswith("loss") for line in found.lines(0))
    values = json.loads(found.to_json())
    assert (values["running"], values["loss"]) == (False, None)


def test_the_end_of_a_run_has_its_reason(stories: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", write_recipe(tmp_path / "recipe.yaml", stories), step=2)
    assert "ended       without saying why: killed, or its machine went down" in list(status(run).lines(0))
    run.end(130, "stopped by 'megazh ctl'")
    found = status(run)
    assert (found.state, found.reason, found.exit_code) == ("stopped", "stopped by 'megazh ctl'", 130)
    assert f"ended       {found.ended}: stopped by 'megazh ctl' (exit code 130)" in list(found.lines(0))
    run.end(6, "the last 20 steps were skipped, since loss nan is not finite; " + "lower the learning rate " * 9)
    found = status(run)
    lines = list(found.lines(0))
    assert "state       failed" in lines
    begin = f"ended       {found.ended}: the last 20 steps were skipped, since loss nan is not finite (exit code 6)"
    assert lines[lines.index(begin) + 1].startswith("            lower the learning rate lower")
    assert max(map(len, lines)) <= 120
    run.end(75, "stopped by SIGTERM")
    assert status(run).state == "stopped"


def test_lines_that_are_cut_off_or_foreign_are_passed_over(run: RunFolder) -> None:
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "step": "seven"}\n[]\n\xff\n' + b'{"kind": "sample", "text": "' + b"a" * 300_000)
    assert (status(run).step, status(run).validation_step) == (6, 6)


def test_numbers_that_are_not_finite_are_text(run: RunFolder) -> None:
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 1.5', '"loss": "nan"'))
    assert json.loads(status(run).to_json())["loss"] == "nan"


def test_it_names_what_was_set(run: RunFolder) -> None:
    run.set_changes([Change(key="checkpoint.keep_last", step=2, before=3, value=9, time="2026-11-28T01:02:03Z")])
    assert status(run).changes == {"checkpoint.keep_last": 9}
    assert "set         checkpoint.keep_last=9" in list(status(run).lines(0))


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not the folder of a run"):
        status(RunFolder(tmp_path))
