"""What a resume may change of the course of a run: a curve that bends, batches and lengths of later tokens."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cases import make_case
from made_runs import add_checkpoint, make_run

from megazh.errors import MegazhError
from megazh.training.checkpoint_list import read_manifest
from megazh.training.checks.course import bends, course_of, with_first_warmup
from megazh.training.checks.resume import same_run
from megazh.training.job import Case, Request
from megazh.training.preflight import requested_case
from megazh.training.recipe import load_recipe


def resumed(folder: Path, stories: Path, settings: list[str], now: list[str], done: int) -> Case:
    """A run that was begun with the settings `settings`, of which some steps are done, to go on with those of `now`."""
    begun = make_case(folder, stories, settings)
    recipe = folder / "begun.yaml"
    recipe.write_text(begun.job.recipe.to_yaml())
    if not begun.run.exists:
        make_run(begun.run.path, recipe, step=done)
    case = make_case(folder, stories, now)
    return replace(case, recipe=with_first_warmup(case.recipe, case.run))


def outcome(folder: Path, stories: Path, settings: list[str], now: list[str], done: int) -> list[str]:
    """The lines that a resume prints, or those that refuse it."""
    try:
        return list(same_run(resumed(folder, stories, settings, now, done)))
    except MegazhError as error:
        return str(error).split("\nerror: ")


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "done"), [(80, 20), (80, 40), (30, 20)])
def test_a_curve_to_the_end_bends_only_where_that_is_allowed(
    tmp_path: Path, stories: Path, kind: str, steps: int, done: int
) -> None:
    settings = [f"kind={kind}", "steps=40"]
    (line,) = outcome(tmp_path, stories, settings, [f"kind={kind}", f"steps={steps}"], done)
    assert f"by {kind} over {steps} steps ({kind} over 40 before), the steps that are done would have had other" in line
    assert "or add schedule.allow_bend=true, to follow the new curve from the next step on (" in line
    lines = outcome(tmp_path, stories, settings, [f"kind={kind}", f"steps={steps}", "allow_bend=true"], done)
    assert f"  {'schedule.steps':<32} 40 -> {steps}" in lines
    assert f"the learning rate changes at step {done + 1}, the next one: " in lines[-1]


def test_within_the_warm_up_nothing_bends(tmp_path: Path, stories: Path) -> None:
    """The warm-up keeps its four steps, although a tenth of 80 are eight."""
    case = resumed(tmp_path, stories, ["steps=40"], ["steps=80"], 3)
    assert case.recipe.course.schedule.warmup == 4
    lines = list(same_run(case))
    assert f"  {'schedule.warmup':<32} 0.1 -> 4.0" in lines
    assert "learning rate" not in "".join(lines), "it stays"


def test_wsd_goes_on_until_its_decay_begins(tmp_path: Path, stories: Path) -> None:
    wsd = ["kind=wsd", "decay=10"]
    lines = outcome(tmp_path, stories, [*wsd, "steps=40"], [*wsd, "steps=80"], 25)
    assert f"  {'first step of the decay':<32} 31 -> 71" in lines
    assert "learning rate" not in "".join(lines), "it stays"
    lines = outcome(tmp_path, stories, [*wsd, "steps=40"], [*wsd, "steps=36"], 25)
    assert f"  {'first step of the decay':<32} 31 -> 27" in lines, "a shorter one ends earlier"


def test_wsd_in_its_decay_names_the_checkpoint_before_it(tmp_path: Path, stories: Path) -> None:
    wsd = ["kind=wsd", "decay=10"]
    case = resumed(tmp_path, stories, [*wsd, "steps=40"], [*wsd, "steps=80"], 30)
    add_checkpoint(case.run, load_recipe(tmp_path / "begun.yaml"), 40)
    (line,) = outcome(tmp_path, stories, [], [*wsd, "steps=80"], 40)
    assert line.endswith(
        ", or go on from before the decay with checkpoint.resume=step_00000030, which drops the records of the steps "
        "behind it and sets later checkpoints aside"
    )
    again = outcome(tmp_path, stories, [], [*wsd, "steps=80", "checkpoint.resume=step_00000030"], 40)
    assert f"  {'first step of the decay':<32} 31 -> 71" in again
    bent = outcome(tmp_path, stories, [], [*wsd, "steps=80", "allow_bend=true"], 40)
    assert (
        "the learning rate changes at step 41, the next one: 1.00e-03 by the settings so far, 1.00e-02 now" in bent[-1]
    )


@pytest.mark.parametrize("kind", ["constant", "inverse_sqrt"])
def test_kinds_without_an_end_go_on(tmp_path: Path, stories: Path, kind: str) -> None:
    lines = outcome(tmp_path, stories, [f"kind={kind}", "steps=40"], [f"kind={kind}", "steps=80"], 40)
    assert f"  {'schedule.steps':<32} 40 -> 80" in lines
    assert not any("warning" in line for line in lines)


def test_another_kind_bends_and_another_peak_does_not(tmp_path: Path, stories: Path) -> None:
    (line,) = outcome(tmp_path, stories, ["steps=40"], ["steps=40", "kind=linear"], 20)
    assert "by linear over 40 steps (cosine over 40 before)" in line
    lines = outcome(tmp_path, stories, ["steps=40"], ["steps=40", "learning_rate=2e-3"], 20)
    assert "the learning rate changes at step 21" in lines[-1]


@pytest.mark.parametrize("key", ["batch", "length"])
def test_batches_and_lengths_may_change_for_later_tokens(tmp_path: Path, stories: Path, key: str) -> None:
    """Steps of 8 samples of 32 tokens; 20 of them are done."""
    start, later = (8, 16) if key == "batch" else (32, 16)
    now = ["steps=40", f"schedule.{key}={{0: {start}, 5120: {later}}}", "allow_bend=true"]
    lines = outcome(tmp_path, stories, ["steps=40"], now, 20)
    assert any(line.startswith(f"  schedule.{key}") for line in lines), lines
    now = ["steps=40", f"schedule.{key}={{0: {start}, 4K: {later}}}", "allow_bend=true"]
    (line,) = outcome(tmp_path, stories, ["steps=40"], now, 20)
    assert (
        f"step 17 was trained with a {key} of {start}, and by this recipe it would have had {later}; 20 steps" in line
    )
    assert f"change schedule.{key} for later tokens only, or start another run with -r" in line


def test_what_a_checkpoint_says_to_have_consumed_must_fit(tmp_path: Path, stories: Path) -> None:
    case = resumed(tmp_path, stories, ["steps=40"], ["steps=40"], 20)
    manifest = case.run.checkpoints / "step_00000020" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"samples": 161, "sha256": None}))
    (line,) = outcome(tmp_path, stories, [], ["steps=40"], 20)
    assert "its 20 steps have consumed 161 samples, and by this recipe it would have been 160" in line


def test_a_start_keeps_the_warm_up_of_the_first_one(tmp_path: Path, stories: Path) -> None:
    case = resumed(tmp_path, stories, ["steps=40"], [], 20)
    request = Request(recipe=str(tmp_path / "begun.yaml"), run=case.run.path, settings=["steps=400"])
    assert requested_case(request).recipe.schedule.warmup == 4.0
    fresh = Request(recipe=str(tmp_path / "begun.yaml"), run=tmp_path / "other", settings=["steps=400"])
    assert requested_case(fresh).recipe.schedule.warmup == 0.1
    given = Request(recipe=str(tmp_path / "begun.yaml"), run=case.run.path, settings=["steps=400", "warmup=7"])
    assert requested_case(given).recipe.schedule.warmup == 7.0


def test_the_rate_of_no_step_bends_before_the_first(tmp_path: Path, stories: Path) -> None:
    case = resumed(tmp_path, stories, ["steps=40"], ["steps=80"], 1)
    saved = case.run.checkpoints / "step_00000001"
    before = course_of((saved, read_manifest(saved)))
    assert not bends(before, case.recipe.course, 0)


def test_a_shorter_wsd_names_a_checkpoint_before_its_own_decay(tmp_path: Path, stories: Path) -> None:
    wsd = ["kind=wsd", "decay=10"]
    case = resumed(tmp_path, stories, [*wsd, "steps=40"], [*wsd, "steps=30"], 20)
    add_checkpoint(case.run, load_recipe(tmp_path / "begun.yaml"), 24)
    (line,) = outcome(tmp_path, stories, [], [*wsd, "steps=30"], 24)
    assert "checkpoint.resume=step_00000020, " in line
    assert outcome(tmp_path, stories, [], [*wsd, "steps=30", "checkpoint.resume=step_00000020"], 24)[-1] == (
        f"  {'first step of the decay':<32} 31 -> 21"
    )


def test_the_step_whose_rates_differ_most_is_named(tmp_path: Path, stories: Path) -> None:
    """Only the warm-up differs, and the decay of neither has begun: a checkpoint of before the decay helps nothing."""
    wsd = ["kind=wsd", "decay=10", "steps=40"]
    case = resumed(tmp_path, stories, [*wsd, "warmup=4"], [*wsd, "warmup=8"], 20)
    add_checkpoint(case.run, load_recipe(tmp_path / "begun.yaml"), 25)
    (line,) = outcome(tmp_path, stories, [], [*wsd, "warmup=8"], 25)
    assert "other learning rates: step 4 had 1.00e-02, and would have had 5.00e-03; keep the settings" in line
    assert "decay" not in line
    assert "checkpoint.resume" not in line


def test_rates_that_differ_by_little_are_shown_with_more_digits(tmp_path: Path, stories: Path) -> None:
    ratio = ["kind=linear", "steps=40"]
    (line,) = outcome(tmp_path, stories, [*ratio], [*ratio, "min_lr_ratio=0.1001"], 20)
    assert "step 20 had 6.000000e-03, and would have had 6.000444e-03" in line


def test_steps_that_end_a_run_where_it_stands_bend_its_curve(tmp_path: Path, stories: Path) -> None:
    wsd = ["kind=wsd", "decay=10"]
    case = resumed(tmp_path, stories, [*wsd, "steps=40"], [*wsd, "steps=25"], 15)
    add_checkpoint(case.run, load_recipe(tmp_path / "begun.yaml"), 25)
    (line,) = outcome(tmp_path, stories, [], [*wsd, "steps=25"], 25)
    assert "step 25 had 1.00e-02, and would have had 1.00e-03" in line
    assert "allow_bend=true, to end the run here, without the rest of the curve" in line
    assert "checkpoint.resume=step_00000015, " in line
    bent = outcome(tmp_path, stories, [], [*wsd, "steps=25", "allow_bend=true"], 25)
    assert f"  {'schedule.steps':<32} 40 -> 25" in bent
