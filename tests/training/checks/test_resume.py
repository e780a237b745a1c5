"""What a resume changes: each setting old and new, the jump of the learning rate, and lengths below what is done."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from cases import make_case, on_cpu
from made_runs import RECIPE, make_run

from megazh.errors import UsageError
from megazh.training.checks.resume import describe_changes, same_run, steps_done
from megazh.training.job import Case, Request
from megazh.training.preflight import RUN, warnings_of


def resumed(tmp_path: Path, stories: Path, *settings: str, step: int = 6, steps: int = 6) -> Case:
    """A case that goes on with a run of `steps` steps of which `step` are done."""
    begun = make_case(tmp_path, stories, steps=steps, request=Request(stages=1))
    make_run(begun.run.path, tmp_path / "mini.yaml", step=step)
    begun.run.record(begun.job.recipe.to_yaml())
    assert steps_done(begun.run) == step
    return make_case(tmp_path, stories, list(settings), steps=steps, request=Request(stages=1))


def test_the_same_again_changes_nothing(tmp_path: Path, stories: Path) -> None:
    assert warnings_of(resumed(tmp_path, stories, step=3), RUN) == []


def test_settings_that_change_are_listed_in_one_block(tmp_path: Path, stories: Path) -> None:
    changes = ["weight_decay=0.2", "checkpoint_every=3", "sample_prompts=[小狗]", "resume=auto"]
    case = resumed(tmp_path, stories, *changes, step=3)
    assert list(describe_changes(case.job)) == [
        f"{case.run.path}: settings that changed since the last start:",
        "  optimizer.weight_decay           0.1 -> 0.2",
        "  checkpoint.checkpoint_every      0 -> 3",
        "  evaluation.sample_prompts        ['从前，'] -> ['小狗']",
    ]


def test_a_longer_run_says_that_its_learning_rate_jumps(tmp_path: Path, stories: Path) -> None:
    case = resumed(tmp_path, stories, "steps=60")
    *block, line = describe_changes(case.job)
    assert block[1:] == ["  schedule.steps                   6 -> 60"]
    peak = RECIPE["learning_rate"]
    old, new = (make_case(tmp_path, stories, steps=steps).recipe.course.rate(6) for steps in (6, 60))
    assert line.startswith(f"warning: {case.run.path}: the learning rate changes at step 7, the next one: ")
    assert re.findall(r"\d\.\d\de-\d\d", line) == [f"{rate:.2e}" for rate in (old, new, old)]
    assert old == pytest.approx(0.1 * peak)
    assert new > 9 * old


def test_the_same_course_says_nothing(tmp_path: Path, stories: Path) -> None:
    lines = list(describe_changes(resumed(tmp_path, stories, "steps=6", "min_lr_ratio=0.1001", step=2).job))
    assert not any(line.startswith("warning") for line in lines)


@pytest.mark.parametrize("length", ["steps=4", "tokens=1024"])
def test_fewer_steps_than_are_done_are_refused_while_the_run_goes_on(
    tmp_path: Path, stories: Path, length: str
) -> None:
    case = resumed(tmp_path, stories, f"schedule.{length}", step=5, steps=9)
    key = length.partition("=")[0]
    with pytest.raises(
        UsageError, match=rf"5 of 9 steps are done, and this run is to have 4; give schedule\.{key}= at"
    ):
        list(same_run(case))


def test_fewer_steps_than_a_complete_run_has_are_refused(tmp_path: Path, stories: Path) -> None:
    with pytest.raises(UsageError, match=r"6 of 6 steps are done, and this run is to have 4; give schedule\.steps= at"):
        list(same_run(resumed(tmp_path, stories, "steps=4")))


def test_a_complete_run_names_the_settings_that_come_too_late(tmp_path: Path, stories: Path) -> None:
    case = resumed(tmp_path, stories, "learning_rate=1e-3", "checkpoint_every=3")
    assert list(same_run(case)) == [
        f"{case.run.path}: the run is complete and nothing is left to do: optimizer.learning_rate=0.001, "
        "checkpoint.checkpoint_every=3 not applied"
    ]


def test_another_layout_is_a_change_like_others(tmp_path: Path, stories: Path) -> None:
    case = resumed(tmp_path, stories, "stage_bounds=[0, 1, 4]", step=3)
    lines = list(same_run(replace(case, request=Request(stages=2), devices=on_cpu(2))))
    assert f"  {'parallel.pipe_parallel_size':<32} 1 -> 2" in lines
    assert f"  {'parallel.stage_bounds':<32} not set -> [0, 1, 4]" in lines


@pytest.mark.parametrize("name", ["step_00000003", "{run}/checkpoints/step_00000003"])
def test_a_checkpoint_may_be_named(tmp_path: Path, stories: Path, name: str) -> None:
    setting = f"checkpoint.resume={name.format(run=make_case(tmp_path).run.path)}"
    assert any("checkpoint.resume" in line for line in same_run(resumed(tmp_path, stories, setting, step=3)))


def test_a_checkpoint_that_cannot_be_resumed_from(tmp_path: Path, stories: Path) -> None:
    with pytest.raises(UsageError, match=r"resume=nevr: no such checkpoint; expected auto, never, or the path of one"):
        list(same_run(resumed(tmp_path, stories, "checkpoint.resume=nevr", step=3)))
    there = make_case(tmp_path).run.checkpoints / "step_00000003"
    (tmp_path / "other").mkdir()
    other = make_case(tmp_path / "other", stories, [f"checkpoint.resume={there}"])
    with pytest.raises(UsageError, match=r"other/run holds no run that could be resumed; .*initial_checkpoint="):
        list(same_run(other))


def test_a_damaged_newest_one_does_not_keep_a_run_from_its_resume(tmp_path: Path, stories: Path) -> None:
    case = resumed(tmp_path, stories, step=3)
    (case.run.checkpoints / "step_00000005").mkdir()
    assert steps_done(case.run) == 3
    assert list(same_run(case)) == []
