"""What a run folder holds, as far as it can be read: of a run that is under way, old, damaged or incomplete, too."""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from megazh.errors import DataError, MegazhError, UsageError
from megazh.run.folder import DESCRIPTION, RunFolder, RunInfo
from megazh.run.history import SKIP, History, read_history
from megazh.run.metrics import METRICS
from megazh.training.checkpoint_list import CheckpointManifest, list_checkpoints, read_manifest
from megazh.training.recipe import Recipe, run_recipe

Found = TypeVar("Found")

REQUIRED = object()
"""Stands for the default of a key that has none."""


@dataclass
class Gathered:
    """The contents of a run folder. What is missing or damaged is None or empty, and has a line in `problems`."""

    path: Path
    recipe: Recipe | None = None
    info: RunInfo | None = None
    history: History = field(default_factory=lambda: History(Path()))
    checkpoints: dict[str, CheckpointManifest | str] = field(default_factory=dict)
    """Manifests by the names of checkpoints, oldest first; in place of one that is damaged, what is wrong."""
    problems: list[str] = field(default_factory=list)
    """One-line errors."""


@dataclass(frozen=True)
class Setting:
    """A key of the recipe."""

    key: str
    """Dotted name, without that of the section."""
    value: Any
    default: Any
    """Its default; `REQUIRED` where it has none."""

    @property
    def changed(self) -> bool:
        """Whether the value is another than the default, or the key has no default."""
        return self.default is REQUIRED or self.value != self.default


def gather(folder: Path) -> Gathered:
    """Read a run folder.

    Raises:
        UsageError: it is no folder, or holds nothing of a run.
    """
    run, found = RunFolder(folder), Gathered(folder, history=History(folder))
    known = (run.config, folder / DESCRIPTION, folder / METRICS)
    if not folder.is_dir() or not any(path.exists() for path in known):
        raise UsageError(f"{folder}: not the folder of a run: it has none of {', '.join(path.name for path in known)}")
    found.recipe = _try(found, lambda: run_recipe(run))
    found.info = _try(found, run.info)
    found.history = _try(found, lambda: read_history(folder)) or found.history
    for path in list_checkpoints(run.checkpoints):
        try:
            found.checkpoints[path.name] = read_manifest(path)
        except DataError as error:
            found.checkpoints[path.name] = str(error).partition("; ")[0].removeprefix(f"{path}/")
            found.problems.append(str(error))
    return found


def _try(found: Gathered, read: Callable[[], Found]) -> Found | None:
    try:
        return read()
    except MegazhError as error:
        found.problems += str(error).splitlines()
        return None


def settings(recipe: Recipe) -> dict[str, list[Setting]]:
    """The keys of a recipe by section, each with whether its value is another than the default."""
    return {name: list(_settings(getattr(recipe, name), "")) for name in Recipe.model_fields}


def _settings(section: BaseModel, prefix: str) -> Iterator[Setting]:
    for key, description in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            yield from _settings(value, f"{prefix}{key}.")
            continue
        required = description.is_required()
        yield Setting(prefix + key, value, REQUIRED if required else description.get_default(call_default_factory=True))


def all_events(history: History) -> list[dict[str, Any]]:
    """Events, oldest first, and steps that changed no weight, which older versions recorded with the step alone."""
    told = {event["step"] for event in history.events if event["name"] == SKIP}
    skipped = [
        {"step": record["step"], "time": record["time"], "name": SKIP, "text": "the gradients were not finite"}
        for record in history.steps
        if record["skipped"] and record["step"] not in told
    ]
    # By time, since the step goes back with the run; what has no time is of older versions, and comes first.
    return sorted([*history.events, *skipped], key=lambda event: event["time"] or 0.0)


def median(history: History, name: str) -> float | None:
    """Median of a number over the steps, without the first one, which compiles and allocates; None without one."""
    values = [record[name] for record in history.steps[1:] or history.steps if record[name] is not None]
    values = [value for value in values if math.isfinite(value)]
    return statistics.median(values) if values else None


def training_hours(history: History) -> float:
    """Hours that the recorded steps took."""
    return sum(record["step_seconds"] for record in history.steps) / 3600
