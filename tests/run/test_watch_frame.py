"""Pictures of a watched run, for terminals of any size."""

import json
import math
import time
from pathlib import Path

import pytest
from made_runs import write_metrics

from megazh.run.folder import DESCRIPTION, RunFolder
from megazh.run.metrics import METRICS, Metrics
from megazh.run.records import CorpusValidation
from megazh.run.screen import width_of
from megazh.run.watch_frame import Look, frame
from megazh.run.watched import Watched


@pytest.fixture
def run(tmp_path: Path) -> Watched:
    """A run of 300 steps, with samples and events."""
    folder = RunFolder(tmp_path / "小故事")
    write_metrics(folder, 300)
    with Metrics(folder.path, 300, quiet=False) as metrics:
        metrics.sample(300, "从前", "有一只小猫\x1b[2J\n它在树下睡觉。" * 20)
        metrics.validation(
            300,
            76_800,
            2.4,
            1.9,
            4,
            {"法律": CorpusValidation.of(2.25, 1.8, 2), "诗": CorpusValidation.of(2.5, 2.0, 2)},
        )
        metrics.event(200, "rollback", "back to step\x1b[2J 150")
    run = Watched(folder.path)
    run.update()
    return run


def shown(run: Watched, width: int = 120, height: int = 40, unicode: bool = True) -> list[str]:
    return frame(run, Look(width, height, False, unicode), time.time(), "q quit")


def test_all_that_matters_is_there(run: Watched) -> None:
    text = "\n".join(shown(run))
    for part in (
        "小故事", "complete", "100.0%", "step 300 of 300", "76.8k tokens", "loss -145.5000", "lr 0.001",
        "validation 2.4000  1.9000 bits/byte  after step 300", "by corpus 法律 2.2500  诗 2.5000",
        "loss of all 300 recorded steps", "the last 200",
        "step 300: 从前 → 有一只小猫", " step 200: back to step [2J 150", "q quit",
    ):  # fmt: skip
        assert part in text, part
    assert "\x1b" not in text


@pytest.mark.parametrize("unicode", [True, False])
def test_every_size_is_kept(run: Watched, unicode: bool) -> None:
    for width in (20, 40, 79, 80, 100, 137, 250):
        for height in (6, 8, 10, 14, 24, 60):
            lines = shown(run, width, height, unicode)
            assert len(lines) <= height
            assert max(map(width_of, lines)) <= width
            assert "step" in "".join(lines)
            if not unicode:
                assert not [line for line in lines if "\u2800" <= max(line, default=" ") <= "\u28ff"]


def test_colours_take_no_columns(run: Watched) -> None:
    plain = frame(run, Look(80, 24, False, True), 0.0)
    coloured = frame(run, Look(80, 24, True, True), 0.0)
    assert len(plain) == len(coloured)
    assert any("\x1b[1m" in line for line in coloured)


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = Watched(tmp_path / "later")
    run.update()
    title, bar, foot = shown(run)
    assert title == "later  waiting for the run to begin"
    assert (bar, foot.startswith("q quit")) == ("no step yet", True)


def test_a_run_whose_losses_are_not_finite(tmp_path: Path) -> None:
    write_metrics(RunFolder(tmp_path), 3)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["kind"] == "step":
            line |= {"loss": str(math.nan), "grad_norm": str(math.inf), "eta_seconds": str(math.inf), "skipped": True}
    (tmp_path / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, {"kind": "step", "step": 4}]))
    run = Watched(tmp_path)
    run.update()
    text = "\n".join(shown(run))
    for part in ("no loss is finite", "skipped 3", "1 lines of metrics.jsonl are damaged"):
        assert part in text, part


def test_an_event_is_told_once_and_like_skips_are_one_line(tmp_path: Path) -> None:
    write_metrics(RunFolder(tmp_path), 40)
    with Metrics(tmp_path, 40, quiet=False) as metrics:
        metrics.event(18, "resume", "resumed at step 18 of 60 from step_18")
        for step in range(19, 39):
            metrics.event(step, "skip", f"step {step}: loss {step / 7:.3f} is above 3.1: the step changes no weight")
        metrics.event(38, "stop", "stopped at step 38 of 60: Ctrl-C")
        metrics.event(39, "skip", "step 39: loss nan is not finite: the step changes no weight")
    run = Watched(tmp_path)
    run.update()
    lines = [line.split(maxsplit=1)[1] for line in shown(run)[-5:-1]]
    assert lines == [
        "resumed at step 18 of 60 from step_18",
        "20 x, steps 19 to 38: loss 5.429 is above 3.1: the step changes no weight",
        "stopped at step 38 of 60: Ctrl-C",
        "step 39: loss nan is not finite: the step changes no weight",
    ]


def test_each_sample_has_its_own_step(tmp_path: Path) -> None:
    write_metrics(RunFolder(tmp_path), 6)
    with Metrics(tmp_path, 6, quiet=False) as metrics:
        metrics.sample(6, "从前", "有")
    run = Watched(tmp_path)
    run.update()
    run.samples["从前"]["step"] = 0
    text = "\n".join(shown(run))
    assert "step 0: 从前 → 有" in text
    assert "step 6: 问2 → 三" in text


def test_the_reason_of_an_end_is_whole_below_its_code(run: Watched) -> None:
    reason = "the last 20 steps were skipped, since loss nan is not finite; " + "lower the learning rate " * 3
    attempt = {"ended": "2026-11-28T09:12:48Z", "reason": reason, "exit_code": 6}
    (run.folder / DESCRIPTION).write_text(json.dumps({"attempts": [attempt]}))
    run.update()
    lines = shown(run, 60, 30)
    assert lines[0] == "小故事  failed (exit code 6)"
    assert " ".join(line.strip() for line in lines[1:4]) == reason.strip()


def test_up_to_200_steps_are_one_curve(tmp_path: Path) -> None:
    write_metrics(RunFolder(tmp_path), 200)
    run = Watched(tmp_path)
    run.update()
    assert "the last" not in "\n".join(shown(run))
