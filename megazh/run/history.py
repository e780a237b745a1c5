"""The records of a run in a form to draw: by kind, and their numbers as arrays over tokens, steps or hours."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from megazh.errors import DataError, UsageError
from megazh.progress import Progress
from megazh.run.metrics import METRICS, read_metrics

SKIP = "skip"
"""Name of the event of a step that changed no weight."""


class Axis(StrEnum):
    """What a curve is drawn over."""

    TOKENS = "tokens"
    """Tokens that the run has consumed."""
    STEPS = "steps"
    """Optimizer steps."""
    HOURS = "hours"
    """Hours that the steps took, one after another; validation, sampling, saving and pauses are not in them."""


class Measure(StrEnum):
    """What a curve shows."""

    LOSS = "loss"
    """Mean cross entropy in nats per token."""
    BITS = "bits"
    """Bits per byte of text. That of training is its loss times the ratio of the run's own validation: the tokens of
    the validation text per byte of it."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: an event, or a step that changed no weight."""

    step: int
    name: str


@dataclass
class History:
    """The records of a run, by kind and oldest first."""

    path: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def column(self, name: str) -> np.ndarray:
        """A number of each step; float64, nan where a step has none."""
        return _numbers(self.steps, name)

    def positions(self, steps: np.ndarray, axis: Axis) -> np.ndarray:
        """Where steps, by their numbers, lie on an axis: interpolated between recorded steps; step 0 lies at 0."""
        if axis is Axis.STEPS:
            return np.asarray(steps, dtype=np.float64)
        along = self.column("tokens") if axis is Axis.TOKENS else np.cumsum(self.column("step_seconds")) / 3600
        return np.interp(steps, np.concatenate(([0.0], self.column("step"))), np.concatenate(([0.0], along)))

    def x(self, axis: Axis) -> np.ndarray:
        """Where the recorded steps lie on an axis."""
        return self.positions(self.column("step"), axis)

    def training(self, measure: Measure) -> np.ndarray:
        """The measure of each step. Raises DataError as `bits_per_nat`."""
        return self.column("loss") * (1.0 if measure is Measure.LOSS else self.bits_per_nat())

    def validation(self, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the steps that validation came after, and its measure there."""
        return _numbers(self.validations, "step"), _numbers(self.validations, _KEYS[measure])

    def validation_of_corpora(self, measure: Measure) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """As `validation`, for each corpus by its name; empty where it is not recorded by corpus."""
        found: dict[str, list[tuple[int, Any]]] = {}
        for record in self.validations:
            for name, values in (record.get("corpora") or {}).items():
                found.setdefault(name, []).append((record["step"], values.get(_KEYS[measure])))
        return {
            name: (np.array([step for step, _ in points], float), np.array([_number(each) for _, each in points]))
            for name, points in found.items()
        }

    def bits_per_nat(self) -> float:
        """Bits per byte of text for each nat per token: those of the newest validation that has both.

        Raises:
            DataError: no validation has both.
        """
        for record in reversed(self.validations):
            loss, bits = record["loss"], record.get("bits_per_byte")
            if bits is not None and math.isfinite(bits) and math.isfinite(loss) and loss > 0:
                return bits / loss
        raise DataError(
            f"{self.path}: no validation with bits per byte is recorded, which says how many bytes a token stands for; "
            "draw the loss"
        )

    def marks(self) -> list[Mark]:
        """Steps that changed no weight, and the other events, oldest first."""
        skipped = {record["step"] for record in self.steps if record["skipped"]}
        skipped |= {event["step"] for event in self.events if event["name"] == SKIP}
        marks = [Mark(step, SKIP) for step in skipped]
        marks += [Mark(event["step"], event["name"]) for event in self.events if event["name"] != SKIP]
        return sorted(marks, key=lambda mark: mark.step)


_LONG = 20_000_000  # bytes, which take about a second

_KEYS = {Measure.LOSS: "loss", Measure.BITS: "bits_per_byte"}


def read_history(folder: Path) -> History:
    """Read the records of the run in `folder`.

    Raises:
        UsageError: the folder holds no metrics.
        DataError: they are damaged.
    """
    history = History(folder)
    lists = {
        "step": history.steps,
        "validation": history.validations,
        "sample": history.samples,
        "event": history.events,
    }
    path = folder / METRICS
    size = path.stat().st_size if path.is_file() else 0
    with Progress(f"read {path}", size, quiet=size < _LONG) as progress:
        for record in read_metrics(folder, progress.advance):
            lists[record["kind"]].append(record)
    return history


def drawable_history(folder: Path) -> History:
    """As `read_history`, of a run that has taken a step. Raises UsageError where it has not."""
    history = read_history(folder)
    if not history.steps:
        raise UsageError(f"{folder}: no step is recorded yet; let the run take one first")
    return history


def _numbers(records: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([_number(record.get(name)) for record in records], dtype=np.float64)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
