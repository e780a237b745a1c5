"""Runs of two ranks that are controlled from another process, by both engines, and what a resume makes of it.

Before that what one rank answers, without training.
"""

import contextlib
import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from forked_runs import Ended, ForkedRuns, start_forks
from indexes import set_template
from made_runs import write_recipe
from processes import wait_until
from recipes import make_recipe

from megazh.cli import main
from megazh.errors import INTERRUPTED, UsageError, WriteError
from megazh.files import holder
from megazh.run.folder import RunFolder
from megazh.run.metrics import read_metrics
from megazh.run.requests import Answer, Command, Inbox, Request, read_private
from megazh.training import commands
from megazh.training.checkpoint_list import list_checkpoints, read_manifest
from megazh.training.checkpoints import Checkpoints
from megazh.training.control import Reason
from megazh.training.live import with_changes

STEPS = 100_000
LAYOUT = (2, 1)


class Requests:
    """A `Control` that handles no signals."""

    reason = Reason.NONE

    def request(self, reason: Reason) -> None:
        """See `Control`."""
        self.reason = reason


def letters(text: str) -> list[int]:
    """Ids of a tokenizer that drops blanks."""
    return [ord(each) for each in text if not each.isspace()]


class Rank:
    """A rank 0 that takes no steps: a session as far as commands know it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = RunFolder(folder)
        self.run.path.mkdir()
        assert Inbox.clear(self.run) == ""
        monkeypatch.setattr(commands.dist, "get_rank", lambda: 0)
        monkeypatch.setattr(commands.Commands, "_listen", mock.Mock())
        self.session: Any = SimpleNamespace(
            folder=self.run,
            step=7,
            recipe=make_recipe(),
            live=SimpleNamespace(changes=[]),
            control=Requests(),
            checkpoints=SimpleNamespace(saver=SimpleNamespace(step=None, saved_at=None, failure="")),
            held_out=None,
            prompting=SimpleNamespace(ids=letters, tokenizer=SimpleNamespace(encode=letters)),
        )
        self.commands = commands.Commands(self.session)

    def send(self, name: str, **request: Any) -> None:
        """Let the rank receive a request."""
        self.commands._receive(f"{name}.json", Request(**request))

    def answer(self, name: str) -> tuple[str, str]:
        """The answer to a request so far."""
        found = read_private(self.run.control / "answers" / f"{name}.json", Answer)
        return found.outcome.value, found.text


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rank:
    """Rank 0 after step 7."""
    return Rank(tmp_path / "run", monkeypatch)


def test_a_stop_is_known_at_once_and_answered_at_the_end(rank: Rank) -> None:
    rank.send("1", command=Command.SAVE)
    rank.send("2", command=Command.STOP)
    assert rank.session.control.reason is Reason.COMMAND
    assert rank.answer("2") == ("accepted", "accepted: the run saves and ends after this step")
    rank.send("3", command=Command.STOP)
    rank.send("4", command=Command.PAUSE)
    assert rank.answer("3") == ("refused", "the run is stopping already")
    assert rank.answer("4") == ("refused", "the run is stopping")
    rank.session.checkpoints.saver.saved_at = 7
    rank.commands.close(Reason.COMMAND)
    rank.commands.close(Reason.NONE)
    assert rank.answer("1") == ("ended", "the run has ended before that was done")
    assert rank.answer("2") == ("done", "stopped after step 7; step 7 is saved")


def test_a_command_that_a_stop_has_cut_off_is_answered(rank: Rank) -> None:
    rank.send("1", command=Command.SAVE)
    assert rank.commands._next() is not None, "it is being carried out"
    rank.send("2", command=Command.STOP)
    rank.commands.close(Reason.COMMAND)
    assert rank.answer("1") == ("ended", "the run has ended before that was done")
    assert rank.answer("2") == ("done", "stopped after step 7; nothing to save")


def test_a_run_that_ends_before_it_stops_says_so(rank: Rank) -> None:
    rank.send("1", command=Command.STOP)
    rank.commands.close(Reason.NONE)
    assert rank.answer("1") == ("ended", "the run has ended first")


def test_a_person_stops_a_run_that_a_scheduler_is_stopping(rank: Rank) -> None:
    rank.session.control.reason = Reason.TERMINATED
    rank.send("1", command=Command.STOP)
    assert rank.answer("1")[0] == "accepted"
    assert rank.session.control.reason is Reason.COMMAND
    rank.commands.close(Reason.COMMAND)
    assert rank.answer("1")[0] == "done"


def test_a_stop_that_comes_too_late_for_the_exit_code_is_no_stop(rank: Rank) -> None:
    """The ranks have agreed on the scheduler's, which starts the run again."""
    rank.session.control.reason = Reason.TERMINATED
    rank.send("1", command=Command.STOP)
    rank.commands.close(Reason.TERMINATED)
    assert rank.answer("1") == ("ended", "the run has ended first: terminated (SIGTERM)")
    rank.send("2", command=Command.STOP)
    assert rank.answer("2") == ("ended", "the run has ended")


def test_a_stop_after_ctrl_c_changes_nothing(rank: Rank) -> None:
    rank.session.control.reason = Reason.PERSON
    rank.send("1", command=Command.STOP)
    assert rank.answer("1") == ("refused", "the run is stopping already")


def test_a_bug_in_a_check_does_not_end_the_thread(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "changed", mock.Mock(side_effect=ZeroDivisionError("of\nnothing")))
    rank.send("1", command=Command.SET, settings=["learning_rate=1"])
    assert rank.answer("1") == ("refused", "failed: ZeroDivisionError: of nothing")


def test_a_save_is_answered_when_it_is_whole_or_has_failed(rank: Rank) -> None:
    saver, waiting = rank.session.checkpoints.saver, rank.commands._saves
    for name in "123":
        rank.send(name, command=Command.SAVE)
        assert rank.commands._next() is not None
    waiting += [("1.json", 7), ("2.json", 8), ("3.json", 9)]
    saver.step, saver.saved_at, saver.failure = 9, 7, "runs/x: cannot be written"
    rank.commands.settle()
    assert rank.answer("1")[0] == "done"
    assert rank.answer("2") == ("refused", "runs/x: cannot be written")
    assert rank.answer("3")[0] == "accepted"
    rank.commands.close(Reason.NONE)
    assert rank.answer("3") == ("ended", "the run has ended before that was done")


def test_a_save_that_another_one_waits_for_is_answered_before_that_begins(rank: Rank) -> None:
    """Step 7 is being saved when the run is stopped at step 8."""
    session, checkpoints, saver = rank.session, rank.session.checkpoints, rank.session.checkpoints.saver
    rank.send("1", command=Command.SAVE)
    assert rank.commands._next() is not None
    rank.commands._saves.append(("1.json", 7))
    saver.step, session.step, session.commands = 7, 8, rank.commands
    saver.wait = lambda: vars(saver).update(step=None, saved_at=7)
    checkpoints._session, checkpoints.saved_or_saving = session, False
    checkpoints.save = lambda: vars(saver).update(saved_at=8)
    checkpoints.wait = lambda: Checkpoints.wait(checkpoints)
    Checkpoints.save_now(checkpoints)
    rank.commands.close(Reason.COMMAND)
    assert rank.answer("1")[1].startswith("step 7 is saved: ")


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"command": Command.SET, "settings": ["seq_len=8"]}, "batch.seq_len decides"),
        ({"command": Command.SET}, "set: expected key=value"),
        ({"command": Command.VALIDATE}, "the run has no validation data"),
        ({"command": Command.RESUME}, "the run is not paused"),
        ({"command": Command.SAMPLE}, "sample: the text is empty"),
        ({"command": Command.SAMPLE, "text": " "}, "sample: ' ' has no token to continue from; give at least one"),
        ({"command": Command.SET, "settings": ['sample_prompts=["从前", ""]']}, "sample_prompts: '' has no token to"),
        ({"command": Command.SET, "settings": ['sample_prompts=[" "]']}, "sample_prompts: ' ' has no token to"),
        (
            {"command": Command.SET, "settings": ["sample_tokens=1000000000"]},
            "with sample_tokens=1000000000 that is more",
        ),
        (
            {"command": Command.SET, "settings": [f'sample_prompts=["{"从" * 15}"]', "sample_tokens=2"]},
            "has 15 tokens, and",
        ),
    ],
)
def test_a_command_that_cannot_work_is_refused(rank: Rank, request_: dict[str, Any], reason: str) -> None:
    rank.send("1", **request_)
    assert rank.commands._next() is None
    outcome, text = rank.answer("1")
    assert (outcome, reason in text) == ("refused", True), text


def test_samples_that_work_are_set(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "set_changes", mock.Mock())
    rank.send("1", command=Command.SET, settings=['sample_prompts=["从前"]', "sample_tokens=14"])
    order = rank.commands._next()
    assert order is not None
    assert [each.value for each in order.changes] == [["从前"], 14]


def test_a_sample_that_fails_ends_no_run(rank: Rank) -> None:
    rank.send("1", command=Command.SAMPLE, text="从前")
    order = rank.commands._next()
    assert order is not None
    rank.session.metrics = mock.Mock()
    sample_once = mock.Mock(side_effect=UsageError("the prompt has no token"))
    rank.session.evaluations = SimpleNamespace(sample_once=sample_once)
    rank.commands._carry_out(order)
    assert rank.answer("1") == ("refused", "the prompt has no token")


@pytest.mark.parametrize(("rate", "warned"), [("1e9", True), ("1.001e-3", False)])
def test_a_jump_of_the_learning_rate_is_pointed_out(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, rate: str, warned: bool
) -> None:
    monkeypatch.setattr(RunFolder, "set_changes", mock.Mock())
    session = rank.session
    session.metrics, session.rate = mock.Mock(), lambda step: session.recipe.optimizer.learning_rate
    session.change = lambda changes: vars(session).update(recipe=with_changes(session.recipe, changes))
    rank.send("1", command=Command.SET, settings=[f"learning_rate={rate}"])
    order = rank.commands._next()
    assert order is not None
    rank.commands._carry_out(order)
    outcome, text = rank.answer("1")
    assert outcome == "done"
    assert text.startswith("warning: the learning rate jumps: ") == warned
    assert f"optimizer.learning_rate is {float(rate)} from step 8 on (was 0.001)" in text


def test_a_change_that_cannot_be_recorded_is_not_made(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "set_changes", mock.Mock(side_effect=WriteError("run.json: no space")))
    rank.send("1", command=Command.SET, settings=["learning_rate=1"])
    assert rank.answer("1")[0] == "accepted"
    assert rank.commands._next() is None
    assert rank.answer("1") == ("refused", "run.json: no space")


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    """A process that starts runs quickly."""
    with start_forks(tmp_path_factory.mktemp("forks"), "megazh.training.hf.loop") as started:
        yield started


@dataclass
class Controlled:
    """A run in the background, and commands to it; it is stopped at the end of the block."""

    forks: ForkedRuns
    recipe: Path
    path: Path
    settings: tuple[str, ...] = ()
    layout: tuple[int, int] = LAYOUT
    engine: str = "ds_pp"
    ended: list[Ended] = field(default_factory=list)

    def __enter__(self) -> "Controlled":
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_until(self._lives, 60, "the run has begun")
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.ctl("stop")
        self._thread.join(60)
        assert not self._thread.is_alive()

    def ctl(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `megazh ctl RUN WORDS`."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main(["ctl", str(self.path), *words])
        return int(ended.value.code or 0), out.getvalue(), err.getvalue()

    def done(self, *words: str) -> str:
        """The answer to a command that is carried out."""
        code, out, err = self.ctl(*words)
        assert code == 0, (words, out, err)
        return out

    def refused(self, *words: str) -> str:
        """The reason of a refusal."""
        code, out, err = self.ctl(*words)
        assert (code, out) == (2, ""), (words, out, err)
        return err.splitlines()[-1]

    def status(self) -> dict[str, Any]:
        """The values of `status --json`."""
        return json.loads(self.done("status", "--json"))  # type: ignore[no-any-return]

    def reach(self, step: int) -> None:
        """Wait until a step is done."""
        wait_until(lambda: self._has_reached(step), 60, f"step {step}")

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Records of a kind so far."""
        return [record for record in read_metrics(self.path) if record["kind"] == kind]

    def _has_reached(self, step: int) -> bool:
        found = self.status()
        assert not self.ended, self.ended
        return found["state"] == "training" and found["step"] >= step

    def _lives(self) -> bool:
        run = RunFolder(self.path)
        return bool(self.ended) or (run.exists and holder(run.lock) is not None and (run.control / "answers").is_dir())

    def _run(self) -> None:
        # A number of micro-batches that is never reached: the exit code is the caller's to judge.
        self.ended.append(
            self.forks.train(
                self.recipe, self.path, self.layout, *self.settings, engine=self.engine, kill_after=1 << 40, limit=180
            )
        )


@dataclass
class Driven:
    """What came of a run that was driven through all commands."""

    path: Path
    ended: Ended
    said: dict[str, str]
    before: dict[str, Any]
    paused: dict[str, Any]
    seconds: list[float]


def drive(forks: ForkedRuns, stories: Path, folder: Path, engine: str) -> Driven:
    """Drive a run of two ranks through all commands; that of `hf` is on data with a chat template."""
    manifest = stories
    if engine == "hf":
        manifest = shutil.copytree(stories.parent, folder / "chats") / stories.name
        for path in manifest.parent.glob("*.bin"):
            set_template(path.with_suffix(""))
    recipe = write_recipe(
        folder / "recipe.yaml", manifest, steps=STEPS, warmup=1, checkpoint_every=20, keep_last=0, sample_tokens=4
    )
    said: dict[str, str] = {}
    layout = LAYOUT if engine == "ds_pp" else (1, 2)
    with Controlled(forks, recipe, folder / "run", layout=layout, engine=engine) as run:
        said["while it starts"] = run.done("sample", "从前", "-n", "1")
        run.reach(25)
        before = run.status()
        said["resume"] = run.refused("resume")
        said["fixed"] = run.refused("set", "seq_len=16")
        said["sample"] = run.done("sample", "从前", "-n", "5", "--temperature", "0", "--json")
        said["long"] = run.refused("sample", "从前" * 50)
        said["validate"] = run.done("validate")
        said["pause"] = run.done("pause")
        paused = run.status()
        said["again"] = run.refused("pause")
        said["set"] = run.done("set", "learning_rate=3e-3", "checkpoint_every=0")
        said["unchanged"] = run.done("set", "learning_rate=3e-3")
        said["save"] = run.done("save", "--json")
        said["saved"] = run.done("save")
        said["in a pause"] = run.done("sample", "从前", "-n", "5", "--temperature", "0")
        assert run.status()["step"] == paused["step"]
        said["go on"] = run.done("resume")
        run.reach(paused["step"] + 10)
        seconds = []
        for _ in range(3):
            begun = time.monotonic()
            run.done("status")
            seconds.append(time.monotonic() - begun)
        said["stop"] = run.done("stop")
    (ended,) = run.ended
    return Driven(run.path, ended, said, before, paused, seconds)


@pytest.fixture(scope="module", params=["ds_pp", "hf"])
def driven(
    request: pytest.FixtureRequest, forks: ForkedRuns, stories: Path, tmp_path_factory: pytest.TempPathFactory
) -> Driven:
    """A run of each engine."""
    return drive(forks, stories, tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.ranks
@pytest.mark.slow
def test_all_commands_are_carried_out(driven: Driven) -> None:
    said, step = driven.said, driven.paused["step"]
    sample = json.loads(said["sample"])
    assert (sample["outcome"], sample["details"]) == ("done", {})
    assert len(sample["text"]) <= 20
    assert "loss" in said["validate"]
    assert said["pause"].startswith(f"paused after step {step:,}; resume goes on")
    assert (
        f"optimizer.learning_rate is 0.003 from step {step + 1:,} on (was 0.01); the rate of that step is 3.0"
        in (said["set"])
    )
    assert "checkpoint.checkpoint_every is 0" in said["set"]
    assert said["unchanged"].startswith("nothing changes")
    assert json.loads(said["save"])["details"]["checkpoint"].endswith(f"step_{step:08d}")
    assert said["go on"].startswith("training goes on after a pause of")
    assert said["stop"].startswith("stopped after step")


@pytest.mark.ranks
@pytest.mark.slow
def test_what_makes_no_sense_is_refused(driven: Driven) -> None:
    said = driven.said
    assert said["resume"].endswith("the run is not paused")
    assert "batch.seq_len decides what the run computes" in said["fixed"]
    assert "and the model is trained on 32: give less" in said["long"]
    assert said["again"].endswith("the run is paused already")


@pytest.mark.ranks
@pytest.mark.slow
def test_the_state_is_told(driven: Driven) -> None:
    assert (driven.before["running"], driven.before["state"]) == (True, "training")
    assert (driven.paused["state"], driven.paused["steps"]) == ("paused", STEPS)
    assert driven.before["loss"] > 0
    assert max(driven.seconds) < 5


@pytest.mark.ranks
@pytest.mark.slow
def test_records_and_checkpoints_tell_what_was_done(driven: Driven) -> None:
    records, step = read_metrics(driven.path), driven.paused["step"]
    names = [record["name"] for record in records if record["kind"] == "event"]
    assert [name for name in names if name in ("pause", "set", "resume_training")] == [
        "pause", "set", "set", "resume_training"
    ]  # fmt: skip
    samples = [(record["step"], record["prompt"]) for record in records if record["kind"] == "sample"]
    assert samples.count((step, "从前")) == 1
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    assert all(abs(record["learning_rate"] - 1e-2) < 1e-5 for record in steps[:step])
    assert all(abs(record["learning_rate"] - 3e-3) < 1e-5 for record in steps[step:])
    validations = [record["step"] for record in records if record["kind"] == "validation"]
    assert len(validations) == 2, "that of the untrained model, and the one that was asked for"
    names = [path.name for path in list_checkpoints(driven.path / "checkpoints")]
    assert f"step_{step:08d}" in names
    assert names[-1] == f"step_{len(steps):08d}", "the stop saves the last step"
    assert not [name for name in names if step < int(name[5:]) < len(steps)], "checkpoint_every=0"
    manifest = read_manifest(driven.path / "checkpoints" / names[-1])
    assert manifest.recipe["optimizer"]["learning_rate"] == 3e-3
    assert driven.ended.code == INTERRUPTED


@pytest.mark.ranks
@pytest.mark.slow
def test_a_resume_takes_each_step_with_its_own_rate(driven: Driven, forks: ForkedRuns, tmp_path: Path) -> None:
    """From a checkpoint before the change: the same rates and the same losses, bit by bit, without any setting."""
    copy, changed_at = tmp_path / "run", driven.paused["step"]
    shutil.copytree(driven.path, copy)
    for path in list_checkpoints(copy / "checkpoints"):
        if int(path.name[5:]) >= changed_at:
            shutil.rmtree(path)
    first = int(list_checkpoints(copy / "checkpoints")[-1].name[5:])
    engine = RunFolder(copy).info().engine
    layout = LAYOUT if engine == "ds_pp" else (1, 2)
    recipe = driven.path.parent / "recipe.yaml"
    with Controlled(forks, recipe, copy, layout=layout, engine=engine) as run:
        run.reach(changed_at + 8)
        assert run.status()["changes"] == {"optimizer.learning_rate": 3e-3, "checkpoint.checkpoint_every": 0}
    output = run.ended[0].output
    assert (
        f"optimizer.learning_rate is 0.003, as 'megazh ctl' set it, from step {changed_at + 1:,} on, and 0.01 before"
        in output
    )
    before, after = (
        {
            record["step"]: (record["learning_rate"], record["loss"], record["grad_norm"])
            for record in read_metrics(path)
            if record["kind"] == "step" and first < record["step"] <= changed_at + 8
        }
        for path in (driven.path, copy)
    )
    assert len(before) > 8
    assert before == after
