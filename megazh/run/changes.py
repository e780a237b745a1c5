"""Settings of a run that were changed while it ran (`megazh ctl RUN set`), and from which step on each holds."""

from collections.abc import Collection, Iterable, Sequence
from typing import Annotated

from pydantic import Field

from megazh.config import Config

Value = bool | int | float | str | list[str] | None
"""Value of a setting, as JSON holds it."""


class Change(Config):
    """A setting that was changed."""

    key: str
    """Dotted key of the recipe."""
    step: Annotated[int, Field(ge=0)]
    """Optimizer steps done when it was changed: the new value holds from the step after these on, the old one before,
    also where a resumed run takes those steps again."""
    before: Value
    """Value up to there."""
    value: Value
    """Value from there on."""
    time: str
    """Date and time in UTC, such as 2026-11-28T01:02:03Z."""


def with_change(changes: Sequence[Change], new: Change) -> list[Change]:
    """The changes with another one, which replaces those of its key that the run has not come to yet.

    Args:
        changes: those so far, by time.
        new: the new one; its `before` is replaced by what held until then, where a change says what that was.
    """
    replaced = [each for each in changes if each.key == new.key and each.step >= new.step]
    if replaced:
        new = new.model_copy(update={"before": replaced[0].before})
    return [*(each for each in changes if each not in replaced), new]


def without(changes: Iterable[Change], keys: Collection[str]) -> list[Change]:
    """The changes of other keys."""
    return [each for each in changes if each.key not in keys]


def newest(changes: Iterable[Change]) -> dict[str, Value]:
    """The value of each changed key after its last change."""
    return {each.key: each.value for each in changes}


def value_at(changes: Iterable[Change], key: str, step: int, last: Value) -> Value:
    """The value of a key for the optimizer step after `step` steps; `last` is that after all changes."""
    for each in changes:
        if each.key == key and each.step > step:
            return each.before
    return last
