"""Settings that can be changed while a run runs: which ones, and the recipe that follows from them at each step."""

import datetime
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from megazh.config import from_mapping, nested_model
from megazh.errors import UsageError
from megazh.run.changes import Change, Value, newest, value_at, with_change
from megazh.settings import Settings, override, resolve_key
from megazh.training.course import Course
from megazh.training.recipe import ALTERNATIVES, MAY_CHANGE, Recipe, keys

LEARNING_RATE = "optimizer.learning_rate"

LIVE = (
    LEARNING_RATE,
    "checkpoint.checkpoint_every",
    "checkpoint.keep_best",
    "checkpoint.keep_every",
    "checkpoint.keep_last",
    "evaluation.sample_every",
    "evaluation.sample_prompts",
    "evaluation.sample_tokens",
    "evaluation.validate_every",
    "parallel.check_tied_every",
)
"""Keys that a running run reads anew at each step."""


def changed(recipe: Recipe, changes: Sequence[Change], step: int, settings: Iterable[str]) -> list[Change]:
    """Change settings of a run.

    Args:
        recipe: the recipe of this step, see `recipe_at`.
        changes: the changes so far, oldest first.
        step: number of optimizer steps done.
        settings: new settings, `key=value` each.

    Returns:
        The changes so far and the new ones.

    Raises:
        UsageError: a key is unknown or cannot be changed while the run runs, or a value cannot work.
    """
    found = list(changes)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    for setting in settings:
        layers = override(Settings(recipe.model_dump(mode="json", exclude_none=True)), [setting], Recipe, ALTERNATIVES)
        key = resolve_key(setting.partition("=")[0], Recipe)
        _check_live(key)
        before, value = recipe.value(key), from_mapping(layers.values, Recipe, setting).value(key)
        if value != before or any(each.key == key and each.step > step for each in found):
            found = with_change(found, Change(key=key, step=step, before=before, value=value, time=now))
    return found


def recipe_at(recipe: Recipe, changes: Iterable[Change], step: int) -> Recipe:
    """The recipe of the optimizer step after `step` steps.

    Of the keys in `LIVE`, only the learning rate decides what a step computes, so a step that is taken again gets the
    rate that it had. All other keys have their newest values.

    Args:
        recipe: the recipe after all changes.
        changes: the changes of the run, oldest first.
        step: number of optimizer steps done.
    """
    peak = peak_at(recipe, changes, step)
    return recipe if peak == recipe.optimizer.learning_rate else recipe.replaced({LEARNING_RATE: peak})


def peak_at(recipe: Recipe, changes: Iterable[Change], step: int) -> float:
    """The peak learning rate of the optimizer step after `step` steps; arguments as for `recipe_at`."""
    found = value_at(changes, LEARNING_RATE, step, recipe.optimizer.learning_rate)
    assert isinstance(found, float | int)
    return found


class LiveRecipe:
    """The recipe of a run by step, while settings are changed.

    Args:
        recipe: the recipe after all changes.
        changes: the changes so far, oldest first.
    """

    def __init__(self, recipe: Recipe, changes: Iterable[Change]) -> None:
        self._newest, self.changes = recipe, list(changes)
        self._by_peak: dict[float, tuple[Recipe, Course]] = {}

    def change(self, changes: Iterable[Change]) -> None:
        """Replace the changes."""
        self.changes = list(changes)
        self._newest, self._by_peak = with_changes(self._newest, self.changes), {}

    def at(self, step: int) -> Recipe:
        """The recipe of the optimizer step after `step` steps."""
        return self._at(step)[0]

    def rate(self, step: int) -> float:
        """The learning rate of the optimizer step after `step` steps."""
        return self._at(step)[1].rate(step)

    def _at(self, step: int) -> tuple[Recipe, Course]:
        peak = peak_at(self._newest, self.changes, step)
        if peak not in self._by_peak:
            recipe = recipe_at(self._newest, self.changes, step)
            self._by_peak[peak] = recipe, recipe.course
        return self._by_peak[peak]


def with_changes(recipe: Recipe, changes: Iterable[Change], given: Collection[str] = ()) -> Recipe:
    """A recipe with what was set while the run ran, but for some keys.

    Args:
        recipe: the recipe.
        changes: what was set.
        given: keys that keep the recipe's values, since the command line gives them anew.

    Raises:
        UsageError: a value does not fit the recipe.
    """
    values = {key: value for key, value in newest(changes).items() if key not in given}
    return recipe.replaced(values)


def given_on_command_line(settings: Settings) -> dict[str, Value]:
    """The settings of the command line that can be changed while the run runs: value by dotted key."""
    return {key: settings.value(key) for key in LIVE if key in settings.on_command_line}


def describe(changes: Sequence[Change], given: Mapping[str, Value], anew: Collection[str], done: int) -> Iterator[str]:
    """Lines for a start: which settings go on as they were set while the run ran.

    Args:
        changes: the changes of the run.
        given: settings of the command line, see `given_on_command_line`.
        anew: the keys of those that win, see `RunFolder.given_anew`.
        done: optimizer steps of the checkpoint that the run goes on from.
    """
    last = {each.key: each for each in changes}
    for key, each in last.items():
        if key in anew:
            yield f"{key} is the command line's, no longer {each.value} as 'megazh ctl' set it after step {each.step:,}"
            continue
        later = key == LEARNING_RATE and each.step > done
        when = f"from step {each.step + 1:,} on, and {each.before} before" if later else f"since step {each.step + 1:,}"
        name = key.rpartition(".")[2]
        remedy = f"give {name}=VALUE for another"
        if key in given:
            remedy = f"the command's {name}={given[key]} is the last start's, and older; give another"
        yield f"{key} is {each.value}, as 'megazh ctl' set it, {when}; {remedy}"


def _check_live(key: str) -> None:
    if key in LIVE:
        return
    field = dict(keys())[key]
    if nested_model(field.annotation) is field.annotation:
        raise UsageError(f"{key} is a section: set its keys one by one")
    if MAY_CHANGE in field.metadata:
        raise UsageError(
            f"{key} takes effect at a start: stop the run, and run its command again with {key.rpartition('.')[2]}=..."
        )
    raise UsageError(f"{key} decides what the run computes and is fixed: begin another run with -r")
