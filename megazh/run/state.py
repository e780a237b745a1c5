"""What a running run is doing at the moment, in RUN/control/state.json: written when it changes, not at each step."""

import contextlib
import time
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Literal

from megazh.config import Config, choice
from megazh.errors import DataError, UsageError
from megazh.run.folder import RunFolder
from megazh.run.requests import check_private, read_private, write_private

STATE = "state.json"
_SILENT_SECONDS, _SILENT_STEPS = 60.0, 10.0


class State(StrEnum):
    """What a run does."""

    STARTING = "starting"
    TRAINING = "training"
    VALIDATING = "validating"
    SAMPLING = "sampling"
    SAVING = "saving"
    """It waits until a checkpoint is written. Most checkpoints are written while it trains."""
    PAUSED = "paused"
    STOPPING = "stopping"
    """It saves and ends."""


class StateRecord(Config):
    """The contents of the file."""

    format_version: Literal[1] = 1
    state: Annotated[State, choice(State)]
    since: float
    """When it began, in seconds since 1970-01-01 UTC."""


class StateFile:
    """Writes the file. A disk that takes nothing, or a folder `control` that is not private, leaves it as it was.

    Args:
        run: the run.
        quiet: write nothing (every rank but one).
    """

    def __init__(self, run: RunFolder, quiet: bool) -> None:
        self._path, self._quiet = run.control / STATE, quiet
        self._state = State.STARTING

    def set(self, state: State) -> None:
        """Record the state, if it is another one."""
        if state is self._state:
            return
        self._state = state
        if not self._quiet:
            with contextlib.suppress(OSError, UsageError):  # such as a folder that others could write to, or a link
                check_private(self._path.parent)
                write_private(self._path, StateRecord(state=state, since=round(time.time(), 3)))

    @contextlib.contextmanager
    def during(self, state: State) -> Iterator[None]:
        """Record a state for the time of the block."""
        before = self._state
        self.set(state)
        yield
        self.set(before)


def read_state(run: RunFolder) -> StateRecord | None:
    """What a running run does; None before it has said so, or where that cannot be read."""
    try:
        return read_private(run.control / STATE, StateRecord)
    except DataError:
        return None


def too_long_silent(now: float, last: float, step_seconds: float) -> float | None:
    """Seconds since the last sign of a run that trains, where they are far more than its steps take; else None.

    Args:
        now: seconds since 1970-01-01 UTC.
        last: when the last step was recorded, or training began anew.
        step_seconds: seconds of the last step.
    """
    silent = now - last
    return silent if silent > max(_SILENT_SECONDS, _SILENT_STEPS * step_seconds) else None
