"""What a run is doing, or how it has ended, from its files alone: it is told at once, however long a step takes."""

import contextlib
import json
import math
import os
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megazh.errors import MegazhError
from megazh.files import holder
from megazh.progress import duration
from megazh.run.attempt import COMPLETE, how_ended
from megazh.run.changes import newest as newest_values
from megazh.run.folder import RunFolder
from megazh.run.lines import compact
from megazh.run.metrics import METRICS, StepRecord, ValidationRecord
from megazh.run.state import State, read_state, too_long_silent
from megazh.training.checkpoint_list import newest_good
from megazh.training.recipe import run_recipe

_TAIL, _LONGEST_TAIL = 1 << 16, 1 << 24
_STEP, _VALIDATION = TypeAdapter(StepRecord), TypeAdapter(ValidationRecord)
_GIB = 1 << 30
_WIDTH = 108  # columns of a long reason, beside its name


@dataclass(frozen=True)
class Status:
    """The state of a run."""

    run: str
    """Path of its folder."""
    state: str
    """See `megazh.run.state.State`; of a run that does not run, see `megazh.run.attempt.how_ended`."""
    since: float | None
    """When the state began, in seconds since 1970-01-01 UTC; None where that is not known."""
    step: int
    """Optimizer steps done."""
    steps: int
    """Optimizer steps of the whole run."""
    tokens: int
    """Tokens consumed."""
    loss: float | None
    """Loss of the last step, in nats per token; None before the first one."""
    learning_rate: float | None
    """Learning rate of the last step."""
    tokens_per_second: float | None
    """Of all ranks, in the last step."""
    step_seconds: float | None
    """Seconds of the last step."""
    eta_seconds: float | None
    """Estimated seconds until the last step, counted from the last record; None unless the run is running."""
    memory_bytes: int | None
    """Largest number of bytes allocated on any GPU."""
    validation_loss: float | None
    """Loss of the last validation."""
    validation_step: int | None
    recorded: float | None
    """When the last step was recorded, in seconds since 1970-01-01 UTC."""
    checkpoint: str | None
    """Newest whole checkpoint."""
    checkpoint_step: int | None
    started: str | None
    """Begin of the newest attempt, in UTC."""
    ended: str | None
    """Its end, where it has ended and said so."""
    reason: str | None
    """Reason of its end."""
    exit_code: int | None
    changes: dict[str, Any]
    """Settings that were changed while it ran."""

    @property
    def running(self) -> bool:
        """Whether the run is running."""
        return self.state in list(State)

    def _seconds_without_a_step(self, now: float) -> float | None:
        if self.state != State.TRAINING or self.recorded is None or self.since is None or self.step_seconds is None:
            return None
        return too_long_silent(now, max(self.recorded, self.since), self.step_seconds)

    def to_json(self) -> str:
        """A JSON object with all values, on one line; numbers that are not finite are text."""
        values = {name: _json_value(value) for name, value in asdict(self).items()}
        return json.dumps({"running": self.running, **values}, ensure_ascii=False)

    def lines(self, now: float) -> Iterator[str]:
        """Lines for a terminal; `now` are seconds since 1970-01-01 UTC."""
        since = f" for {duration(now - self.since)}" if self.running and self.since is not None else ""
        yield f"{'run':<12}{self.run}"
        quiet = self._seconds_without_a_step(now)
        yield f"{'state':<12}{self.state}{since}{f', but no sign of progress for {duration(quiet)}' if quiet else ''}"
        if not self.running and self.reason is not None:
            first, _, rest = self.reason.partition("; ")  # the clauses after it say what to do
            text = f"{self.ended}: {first} (exit code {self.exit_code})"
            for number, line in enumerate([*_wrapped(text), *_wrapped(rest)]):
                yield f"{'' if number else 'ended':<12}{line}"
        elif self.state == "ended":
            yield f"{'ended':<12}without saying why: killed, or its machine went down"
        age = f", {duration(now - self.recorded)} ago" if self.running and self.recorded is not None else ""
        yield f"{'step':<12}{self.step:,} of {self.steps:,}, {compact(self.tokens)} tokens{age}"
        if self.loss is not None:
            yield f"{'loss':<12}{self.loss:.4f}, learning rate {self.learning_rate:.3e}"
        if self.validation_loss is not None:
            yield f"{'validation':<12}{self.validation_loss:.4f} after step {self.validation_step:,}"
        if self.tokens_per_second is not None:
            yield f"{'speed':<12}{compact(self.tokens_per_second)} tokens/s, {self.step_seconds:.2f} s per step"
        if self.eta_seconds is not None and self.step < self.steps:
            yield f"{'left':<12}{duration(self.eta_seconds)}"
        if self.memory_bytes is not None:
            yield f"{'memory':<12}{self.memory_bytes / _GIB:.1f} GiB on the fullest GPU"
        yield f"{'checkpoint':<12}{self.checkpoint or 'none'}"
        for key, value in self.changes.items():
            yield f"{'set':<12}{key}={value}"


def status(run: RunFolder) -> Status:
    """The state of a run.

    Raises:
        UsageError: the folder holds no run.
        DataError: a file of it is damaged.
    """
    recipe, info = run_recipe(run), run.info()
    is_running = holder(run.lock) is not None
    record = read_state(run) if is_running else None
    last, validation = _last_records(run.path / METRICS)
    newest = None
    with contextlib.suppress(MegazhError):  # checkpoints of another version, which the next start names
        newest = newest_good(run.checkpoints)
    path, saved = newest or (None, None)
    attempt = info.attempts[-1] if info.attempts else None
    if is_running:
        state = record.state.value if record else State.STARTING.value
    elif saved and saved.complete and saved.step >= recipe.course.steps:
        state = COMPLETE
    else:
        state = how_ended(attempt.exit_code if attempt else None)
    return Status(
        run=str(run.path),
        state=state,
        since=record.since if record else None,
        step=max(last.step if last else 0, saved.step if saved else 0),
        steps=recipe.course.steps,
        tokens=max(last.tokens if last else 0, saved.tokens if saved else 0),
        loss=last.loss if last else None,
        learning_rate=last.learning_rate if last else None,
        tokens_per_second=last.tokens_per_second if last else None,
        step_seconds=last.step_seconds if last else None,
        eta_seconds=last.eta_seconds if last and is_running else None,
        memory_bytes=last.memory_bytes if last else None,
        validation_loss=validation.loss if validation else None,
        validation_step=validation.step if validation else None,
        recorded=last.time if last else None,
        checkpoint=str(path) if path else None,
        checkpoint_step=saved.step if saved else None,
        started=attempt.started if attempt else None,
        ended=attempt.ended if attempt else None,
        reason=attempt.reason if attempt else None,
        exit_code=attempt.exit_code if attempt else None,
        changes=newest_values(info.changes),
    )


def _last_records(path: Path) -> tuple[StepRecord | None, ValidationRecord | None]:
    """The last step and the last validation of metrics.jsonl, from the end of the file."""
    try:
        with open(path, "rb") as file:
            size, tail = file.seek(0, os.SEEK_END), _TAIL
            while True:
                file.seek(max(0, size - tail))
                step, validation = _records(file.read(tail))
                if tail >= min(size, _LONGEST_TAIL) or (step and validation):
                    return step, validation
                tail *= 4
    except OSError:
        return None, None


def _records(text: bytes) -> tuple[StepRecord | None, ValidationRecord | None]:
    """The last step and the last validation in the end of a file, whose first and last line may be incomplete."""
    step, validation = None, None
    for line in reversed(text.split(b"\n")):
        try:
            values = json.loads(line)
            if step is None and values["kind"] == "step":
                step = _STEP.validate_python(values)
            if validation is None and values["kind"] == "validation":
                validation = _VALIDATION.validate_python(values)
        except (ValueError, KeyError, TypeError):
            continue
        if step is not None and validation is not None:
            break
    return step, validation


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _json_value(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
