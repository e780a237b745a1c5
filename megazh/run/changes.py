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
    """Number of optimizer steps done when the setting was changed. Steps up to this one have the old value, also when a
    resumed run takes them again; later steps have the new value."""
    before: Value
    """Value up to `step`."""
    value: Value
    """Value after `step`."""
    time: str
    """Date and time in UTC, such as 2026-11-28T01:02:03Z."""


def with_change(changes: Sequence[Change], new: Change) -> list[Change]:
    """Add a change to the changes of a run.

    A run that was resumed from an earlier checkpoint may have changes of steps that it has not reached again. Those of
    the same key are dropped.

    Args:
        changes: the changes so far, oldest first.
        new: the change to add. Its `before` becomes that of the first dropped change, if one is dropped.

    Returns:
        The changes, oldest first.
    """
    replaced = [each for each in changes if each.key == new.key and each.step >= new.step]
    if replaced:
        new = new.model_copy(update={"before": replaced[0].before})
    return [*(each for each in changes if each not in replaced), new]


def without(changes: Iterable[Change], keys: Collection[str]) -> list[Change]:
    """The changes of all keys but `keys`."""
    return [each for each in changes if each.key not in keys]


def newest(changes: Iterable[Change]) -> dict[str, Value]:
    """The value of each changed key after its last change."""
    return {each.key: each.value for each in changes}


def value_at(changes: Iterable[Change], key: str, step: int, last: Value) -> Value:
    """The value of a key for the optimizer step after `step` steps.

    Args:
        changes: the changes of the run, oldest first.
        key: dotted key.
        step: number of optimizer steps done.
        last: the key's value after all changes.
    """
    for each in changes:
        if each.key == key and each.step > step:
            return each.before
    return last
