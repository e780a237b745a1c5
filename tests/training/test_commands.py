"""Runs of two ranks that are controlled from another process, by both engines, and what a resume makes of it."""

import contextlib
import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from forked_runs import Ended, ForkedRuns, start_forks
from made_runs import write_recipe
from processes import wait_until

from megazh.cli import main
from megazh.errors import INTERRUPTED
from megazh.files import holder
from megazh.run.folder import RunFolder
from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import list_checkpoints, read_manifest

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

STEPS = 100_000
LAYOUT = (2, 1)


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
                self.recipe, self.path, self.layout, *self.settings, engine=self.engine, kill_after=1 << 40, limit=90
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
    """Drive a run of two ranks through all commands."""
    recipe = write_recipe(
        folder / "recipe.yaml", stories, steps=STEPS, warmup=1, checkpoint_every=20, keep_last=0, sample_tokens=4
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


def test_all_commands_are_carried_out(driven: Driven) -> None:
    said, step = driven.said, driven.paused["step"]
    sample = json.loads(said["sample"])
    assert (sample["outcome"], sample["details"]["prompt"]) == ("done", "从前")
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


def test_what_makes_no_sense_is_refused(driven: Driven) -> None:
    said = driven.said
    assert said["resume"].endswith("the run is not paused")
    assert "batch.seq_len decides what the run computes" in said["fixed"]
    assert "and the model is trained on 32: give less" in said["long"]
    assert said["again"].endswith("the run is paused already")


def test_the_state_is_told(driven: Driven) -> None:
    assert (driven.before["running"], driven.before["state"]) == (True, "training")
    assert (driven.paused["state"], driven.paused["steps"]) == ("paused", STEPS)
    assert driven.before["loss"] > 0
    assert max(driven.seconds) < 5


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
