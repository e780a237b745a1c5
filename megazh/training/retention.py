"""Which checkpoints of a run are kept: the newest, every so many steps for good, and the best by validation loss."""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megazh.errors import DataError
from megazh.run.metrics import METRICS
from megazh.training.checkpoint_list import checkpoint_path, list_checkpoints, read_manifest, remove_checkpoint
from megazh.training.recipe import Recipe, Spike


@dataclass(frozen=True)
class KeepRule:
    """The checkpoints to keep, as `checkpoint.keep_last`, `keep_every` and `keep_best` of a recipe have it."""

    last: int
    """Number of newest ones; 0: all."""
    every: int
    """Steps between those that are kept for good; 0: none."""
    best: bool
    """Whether that of the lowest validation loss is kept."""

    def removed(self, steps: Iterable[int], losses: Mapping[int, float]) -> list[int]:
        """Steps of the checkpoints that are no longer to be kept, oldest first.

        Args:
            steps: steps of the checkpoints that are whole.
            losses: validation loss by step, where known.
        """
        there = sorted(steps)
        if not self.last:
            return []
        kept = set(there[-self.last :])
        if self.every:
            kept |= {step for step in there if step % self.every == 0}
        known = [step for step in there if math.isfinite(losses.get(step, math.nan))]
        if self.best and known:
            kept.add(min(known, key=lambda step: (losses[step], -step)))
        return [step for step in there if step not in kept]

    def most_kept(self, saved: int, total_steps: int, validated: bool) -> int:
        """Largest number of checkpoints on disk at a time, the one being written included.

        Args:
            saved: number of checkpoints that the run writes.
            total_steps: steps of the run.
            validated: whether the run validates.
        """
        if not self.last:
            return saved
        for_good = total_steps // self.every if self.every else 0
        return min(saved, self.last + for_good + (self.best and validated) + 1)


def keep_rule(recipe: Recipe) -> KeepRule:
    """The rule of a recipe."""
    keep = recipe.checkpoint
    return KeepRule(keep.keep_last, keep.keep_every, keep.keep_best)


def validation_losses(run: Path) -> dict[int, float]:
    """Validation loss by step from a run's metrics; lines that cannot be read are passed over."""
    found: dict[int, float] = {}
    with contextlib.suppress(OSError), open(run / METRICS, "rb") as file:
        for line in file:
            if b'"validation"' in line:  # other lines, of which there are many, are not parsed
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    if record["kind"] == "validation":
                        found[record["step"]] = float(record["loss"])
    return found


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder whose manifest and sizes are right, oldest first."""
    found = []
    for path in list_checkpoints(folder):
        try:
            found.append(read_manifest(path).step)
        except DataError:
            continue
    return found


def superfluous(folder: Path, rule: KeepRule, losses: Mapping[int, float], newest: int | None = None) -> list[int]:
    """Steps of the checkpoints that a rule does not keep, oldest first; arguments as for `prune`.

    The one that a rollback of the newest would go back to is kept as well.
    """
    steps = [step for step in whole_steps(folder) if newest is None or step <= newest]
    needed = None
    if steps:
        saved = read_manifest(checkpoint_path(folder, steps[-1]))
        if saved.guard is not None and saved.recipe.get("guard", {}).get("spike") == Spike.ROLLBACK:
            needed = saved.guard.regular_step
    return [step for step in rule.removed(steps, losses) if step != needed]


def prune(folder: Path, rule: KeepRule, losses: Mapping[int, float], newest: int | None = None) -> list[str]:
    """Remove the checkpoints that a rule does not keep; damaged ones stay, and the newest always does.

    Args:
        folder: the folder of a run's checkpoints.
        rule: those to keep.
        losses: validation loss by step.
        newest: step of the checkpoint that was saved last; later ones, of an attempt that was rolled back, count not.

    Returns:
        Lines about those that could not be removed.
    """
    lines = []
    for step in superfluous(folder, rule, losses, newest):
        path = checkpoint_path(folder, step)
        try:
            remove_checkpoint(path)
        except OSError as error:
            lines.append(f"warning: {path}: cannot be removed: {error.strerror or error}; it stays")
    return lines
