"""What is known of a run that is watched: its records so far, and what it does or how it has ended."""

import contextlib
import json
import os
import time
from array import array
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megazh.files import holder
from megazh.run.attempt import COMPLETE, KILLED, how_ended
from megazh.run.folder import DESCRIPTION, RunFolder
from megazh.run.lines import left, one_line
from megazh.run.metrics import METRICS
from megazh.run.state import State, StateRecord, read_state, too_long_silent
from megazh.run.tail import Tail

_MOST_EVENTS = 100
_MOST_PROMPTS = 20


@dataclass(frozen=True)
class Standing:
    """The state of a run in a few words."""

    text: str
    reason: str = ""
    """Why it has ended, where that is more than the text."""
    ended: bool = False
    calm: bool = True
    """Whether all is as it should be."""


@dataclass
class Watched:
    """The records of a run, read as they come.

    Args:
        folder: the run folder, which need not exist yet.
    """

    folder: Path
    losses: array = field(default_factory=lambda: array("d"))
    """Loss of each step."""
    last_step: dict[str, Any] | None = None
    validations: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=2))
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The newest sample of each prompt; that of the newest one is last."""
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_MOST_EVENTS))
    skipped: int = 0

    def __post_init__(self) -> None:
        self._tail = Tail(self.folder / METRICS)
        self._attempt: dict[str, Any] = {}
        self._state: StateRecord | None = None
        self._described: tuple[int, int] | None = None

    @property
    def unreadable(self) -> int:
        """Lines of the metrics that are damaged."""
        return self._tail.unreadable

    @property
    def running(self) -> bool:
        """Whether a process works at the run."""
        return self._state is not None

    def update(self) -> bool:
        """Read what is new, or of very much a part; returns whether there is more.

        Raises:
            OSError: the files cannot be read.
        """
        run = RunFolder(self.folder)
        self._state = None
        if holder(run.lock) is not None:
            self._state = read_state(run) or StateRecord(state=State.STARTING, since=time.time())
        self._read_description()  # after the lock, which is given back once the end is recorded
        anew, records = self._tail.read()
        if anew:
            self.losses, self.last_step, self.skipped = array("d"), None, 0
            for kept in (self.validations, self.samples, self.events):
                kept.clear()
        for record in records:
            self._add(record)
        return self._tail.behind

    def _add(self, record: dict[str, Any]) -> None:
        """Keep what is shown of a record; one that lacks something is counted as damaged."""
        try:
            record["time"] = None if record.get("time") is None else float(record["time"])
            kind = record["kind"]
            if kind == "step":
                numbers = {name: float(record[name]) for name in _NUMBERS}  # nan and inf, which JSON lacks, are text
                self._add_step({**record, **numbers, **_optional(record, "mfu", "memory_bytes")})
            elif kind == "validation":
                loss, bits = float(record["loss"]), _optional(record, "bits_per_byte")
                corpora = {str(name): float(each["loss"]) for name, each in (record.get("corpora") or {}).items()}
                self.validations.append({**record, "loss": loss, **bits, "corpora": corpora})
            elif kind == "sample":
                self._add_sample({**record, "prompt": str(record["prompt"]), "text": str(record["text"])})
            elif kind == "event":
                self.events.append({**record, "name": str(record["name"]), "text": str(record["text"])})
        except (AttributeError, KeyError, TypeError, ValueError):
            self._tail.unreadable += 1

    def _add_step(self, step: dict[str, Any]) -> None:
        self.losses.append(step["loss"])
        self.last_step = step
        self.skipped += bool(step["skipped"])

    def _add_sample(self, sample: dict[str, Any]) -> None:
        self.samples.pop(sample["prompt"], None)
        self.samples[sample["prompt"]] = sample
        if len(self.samples) > _MOST_PROMPTS:
            self.samples.pop(next(iter(self.samples)))

    def standing(self, now: float) -> Standing:
        """The state of the run; `now` are seconds since 1970-01-01 UTC."""
        if self._state is not None:
            return self._running(self._state, now)
        attempt, step = self._attempt, self.last_step
        if attempt.get("ended"):
            code = attempt.get("exit_code")
            if code == 0:
                return Standing(COMPLETE, ended=True)
            reason = one_line(str(attempt.get("reason")))
            return Standing(f"{how_ended(code)} (exit code {code})", reason, ended=True, calm=False)
        if step and step["step"] == step["steps"]:
            return Standing(COMPLETE, ended=True)
        if attempt or step:
            return Standing(KILLED, ended=True, calm=False)
        return Standing("waiting for the run to begin")

    @property
    def begun(self) -> bool:
        """Whether the folder has anything of a run."""
        return self.running or bool(self._attempt) or self.last_step is not None

    def _running(self, record: StateRecord, now: float) -> Standing:
        """The state of a run that a process works at."""
        if record.state is State.PAUSED:
            return Standing(f"paused for {left(max(0.0, now - record.since))}", calm=False)
        step = self.last_step
        if record.state is State.TRAINING and step and step["time"] is not None:
            silent = too_long_silent(now, max(step["time"], record.since), step["step_seconds"])
            if silent is not None:
                return Standing(f"training, but no step for {left(silent)}", calm=False)
        return Standing(record.state)

    def _read_description(self) -> None:
        """Read run.json where it has changed; one that is being replaced, or damaged, leaves what is known."""
        path = self.folder / DESCRIPTION
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            status = os.stat(path)
            seen = status.st_ino, status.st_mtime_ns
            if seen != self._described:
                self._attempt = dict(json.loads(path.read_bytes())["attempts"][-1])
                self._described = seen


_NUMBERS = (
    "step", "steps", "tokens", "loss", "learning_rate", "grad_norm", "step_seconds", "tokens_per_second", "eta_seconds",
)  # fmt: skip


def _optional(record: dict[str, Any], *names: str) -> dict[str, float | None]:
    """Numbers that a record may lack."""
    return {name: None if record.get(name) is None else float(record[name]) for name in names}
