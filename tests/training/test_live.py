"""Settings changed while a run runs: which can be, and the recipe of each step, also after a resume."""

import re

import pytest
from recipes import make_recipe

from megazh.errors import UsageError
from megazh.run.changes import Change
from megazh.training.live import LIVE, LiveRecipe, changed, describe, recipe_at, with_changes
from megazh.training.recipe import Recipe, keys

RECIPE = make_recipe(learning_rate=1e-3, checkpoint_every=5)


def applied(changes: list[Change]) -> Recipe:
    """The recipe after all changes."""
    return with_changes(RECIPE, changes)


def rates(changes: list[Change], *steps: int) -> list[float]:
    """Peak learning rate of some steps."""
    return [recipe_at(applied(changes), changes, step).optimizer.learning_rate for step in steps]


def test_every_key_exists() -> None:
    assert set(LIVE) <= {name for name, _ in keys()}


def test_a_rate_holds_from_its_step_on_also_where_earlier_steps_are_taken_again() -> None:
    changes = changed(RECIPE, [], 4, ["learning_rate=3e-4"])
    changes = changed(recipe_at(applied(changes), changes, 7), changes, 7, ["optimizer.learning_rate=1e-4"])
    assert rates(changes, 0, 3, 4, 6, 7, 9) == [1e-3, 1e-3, 3e-4, 3e-4, 1e-4, 1e-4]
    resumed_at_5 = recipe_at(applied(changes), changes, 5)
    changes = changed(resumed_at_5, changes, 6, ["learning_rate=2e-3"])
    assert rates(changes, 3, 5, 6, 7, 9) == [1e-3, 3e-4, 2e-3, 2e-3, 2e-3]


def test_the_schedule_keeps_its_shape() -> None:
    live = LiveRecipe(RECIPE, [])
    before = [live.rate(step) for step in range(10)]
    live.change(changed(RECIPE, [], 4, ["learning_rate=2e-3"]))
    after = [live.rate(step) for step in range(10)]
    assert after[:4] == before[:4]
    assert after[4:] == pytest.approx([2 * rate for rate in before[4:]])
    assert [live.at(step).optimizer.learning_rate for step in (3, 4)] == [1e-3, 2e-3]


def test_a_rate_that_is_set_back_before_it_changed_stays() -> None:
    """A run that was resumed from before a change takes that back."""
    changes = changed(RECIPE, [], 8, ["learning_rate=3e-4"])
    changes = changed(recipe_at(applied(changes), changes, 4), changes, 4, ["learning_rate=1e-3"])
    assert rates(changes, 3, 4, 8, 9) == [1e-3] * 4


def test_other_keys_hold_as_they_were_set_last() -> None:
    changes = changed(RECIPE, [], 4, ["checkpoint_every=2", "keep_last=7", 'sample_prompts=["从前", "小狗"]'])
    for step in (0, 9):
        recipe = recipe_at(applied(changes), changes, step)
        assert (recipe.checkpoint.checkpoint_every, recipe.checkpoint.keep_last) == (2, 7)
        assert recipe.evaluation.sample_prompts == ["从前", "小狗"]
    assert [each.before for each in changes] == [5, 3, ["从前，"]]


def test_what_is_so_already_is_no_change() -> None:
    assert changed(RECIPE, [], 4, ["learning_rate=1e-3", "checkpoint_every=5"]) == []


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("learning_rate", "expected key=value"),
        ("learning_rat=1", "unknown key 'learning_rat'; did you mean 'optimizer.learning_rate'?"),
        ("learning_rate=0", "learning_rate=0: key 'optimizer.learning_rate': Input should be greater than 0"),
        ("learning_rate=fast", "valid number"),
        ("learning_rate=.inf", "finite number"),
        ("learning_rate=", "valid number"),
        ("checkpoint_every=-1", "greater than or equal to 0"),
        ("checkpoint_every=1.5", "valid integer"),
        ("sample_tokens=0", "greater than or equal to 1"),
        ("keep_best=1", "valid boolean"),
        ("seed=[", "not valid YAML"),
        ("micro_batch_size=4", "takes effect at a start: stop the run, and run its command again with micro_batch"),
        ("weight_decay=0", "takes effect at a start"),
        ("steps=20", "schedule.steps takes effect at a start"),
        ("seq_len=64", "batch.seq_len decides what the run computes and is fixed: begin another run with -r"),
        ("model.hidden_size=64", "model.hidden_size decides what the run computes"),
        ("checkpoint={keep_last: 1}", "checkpoint is a section: set its keys one by one"),
        ("checkpoint=1", "'checkpoint' is a section"),
    ],
)
def test_what_cannot_be_set_is_refused(setting: str, reason: str) -> None:
    with pytest.raises(UsageError, match=re.escape(reason)):
        changed(RECIPE, [], 4, ["keep_last=1", setting])


def test_the_command_line_wins() -> None:
    changes = changed(RECIPE, [], 4, ["learning_rate=3e-4", "checkpoint_every=2"])
    recipe = with_changes(RECIPE, changes, {"optimizer.learning_rate"})
    assert (recipe.optimizer.learning_rate, recipe.checkpoint.checkpoint_every) == (1e-3, 2)


def test_a_start_says_what_goes_on_as_it_was_set() -> None:
    changes = changed(RECIPE, [], 1_200, ["learning_rate=3e-4", "checkpoint_every=2"])
    later, now = describe(changes, {}, (), 1_000)
    assert later == (
        "optimizer.learning_rate is 0.0003, as 'megazh ctl' set it, from step 1,201 on, and 0.001 before; give "
        "learning_rate=VALUE for another"
    )
    assert now.startswith("checkpoint.checkpoint_every is 2, as 'megazh ctl' set it, since step 1,201; give")
    (given, _) = describe(changes, {"optimizer.learning_rate": 1e-3}, {"optimizer.learning_rate"}, 1_000)
    assert given == (
        "optimizer.learning_rate is the command line's, no longer 0.0003 as 'megazh ctl' set it after step 1,200"
    )
