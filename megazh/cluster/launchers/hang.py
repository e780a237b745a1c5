"""Notice that the ranks of a run get on no longer; put their stacks into their logs, and find the one to blame."""

import contextlib
import itertools
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from megazh.cluster.launchers.rank_log import RankLog
from megazh.run.pulse import START_FACTOR, Pulse
from megazh.training.hang import STACKS

_LOOK_SECONDS = 1.0
_STACK_SECONDS = 2.0  # for the stacks to be written
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
_STACK = re.compile(r"^(?:Current thread|Thread) .*\(most recent call first\):$")
# Where a rank waits for others: in a collective, or on a GPU for one to end.
_WAITING = re.compile(
    r"/(?:torch/distributed|deepspeed/comm|torch/cuda)/|/deepspeed/runtime/pipe/p2p\.py$|/pipeline/transfer\.py$"
)
_STATES = {
    "T": "is stopped by a signal (SIGSTOP)",
    "t": "is held by a debugger",
    "D": "waits for a disk or a driver",
    "?": "does not answer",
}


class PulseReader(Protocol):
    """The signs of progress of all ranks, as `megazh.run.pulse.Pulses` reads them."""

    def read(self) -> list[Pulse]:
        """The pulse of each rank."""


class Watch:
    """Counts how long no rank has given a sign of progress.

    Only time in which this process itself runs is counted: where the whole machine or all of the job was suspended,
    nothing hangs.

    Args:
        pulses: the pulses of the ranks.
        limit: seconds without progress that are a hang, `START_FACTOR` times as many until a step is taken; 0: nothing
            is one.
    """

    def __init__(self, pulses: PulseReader, limit: float) -> None:
        self._pulses, self._limit = pulses, limit
        self._beats = -1
        self._last = time.monotonic()
        self.idle = 0.0
        """Seconds without progress."""

    def hangs(self) -> bool:
        """Whether the limit is reached. Called often; looks once a second."""
        now = time.monotonic()
        if not self._limit or now - self._last < _LOOK_SECONDS:
            return False
        passed, self._last = min(now - self._last, 2 * _LOOK_SECONDS), now
        pulses = self._pulses.read()
        beats = sum(pulse.beats for pulse in pulses)
        if beats != self._beats:
            self._beats, self.idle = beats, 0.0
        else:
            self.idle += passed
        started = all(pulse.step >= 0 for pulse in pulses)
        return self.idle >= (self._limit if started else START_FACTOR * self._limit)


class Stack(NamedTuple):
    """What the process of a rank is found doing."""

    state: str
    """Letter of the process's state, as in /proc/PID/stat; empty where it has ended."""
    place: str
    """`FUNCTION, FILE:LINE` of the main thread; empty where no stack came."""
    waits: bool
    """Whether that is a place where a rank waits for others."""


class _Found(NamedTuple):
    rank: int
    stack: Stack
    pulse: Pulse


def write_stacks(processes: Mapping[int, RankLog]) -> dict[int, Stack]:
    """Have ranks of this machine write their stacks to their logs; returns what each process is found doing.

    A rank that SIGSTOP has stopped is continued for it. The ranks are to be killed afterwards.

    Args:
        processes: log of each process that lives, by process id.
    """
    states = {process: _state(process) for process in processes}
    for process, log in processes.items():
        log.note("no rank gets on; the stacks of this one:")
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, STACKS)
            if states[process] == "T":
                os.kill(process, signal.SIGCONT)
    deadline = time.monotonic() + _STACK_SECONDS
    frames: dict[int, tuple[str, str]] = {}
    while len(frames) < len(processes) and time.monotonic() < deadline:
        time.sleep(0.1)
        frames = {process: frame for process, log in processes.items() if (frame := _main_frame(log.tail()))}
    stacks = {}
    for process, state in states.items():
        file, place = frames.get(process, ("", ""))
        stacks[process] = Stack(state, place, bool(_WAITING.search(file)))
    return stacks


def blame(ranks: Mapping[int, tuple[Stack, Pulse]], labels: Sequence[str]) -> str:
    """Which rank the others wait for, and why.

    Args:
        ranks: what each rank that lives is doing, and its last sign of progress.
        labels: names of the ranks.
    """
    found = [_Found(rank, stack, pulse) for rank, (stack, pulse) in sorted(ranks.items())]
    return _blame(found, labels) if found else "(all have ended)"


def _blame(found: Sequence[_Found], labels: Sequence[str]) -> str:
    """Which rank the others wait for. The strongest evidence counts: its state, steps, place, age of its last sign."""
    newest = max(each.pulse.step for each in found)
    phases = {each.pulse.phase for each in found}
    by_evidence = [
        [each for each in found if each.stack.state in _STATES],
        [each for each in found if each.pulse.step < newest],
        [each for each in found if each.stack.place and not each.stack.waits],
    ]
    blamed = next((some for some in by_evidence if some and len(some) < len(found)), [])
    one = min(blamed or found, key=lambda each: each.pulse.time)
    clause = ""
    if one.stack.state in _STATES:
        clause = f", which {_STATES[one.stack.state]}"
    elif one.pulse.step < newest:
        clause = f", which is at step {one.pulse.step} while others are at step {newest}"
    if len(found) == 1:
        what = f"it is {labels[one.rank]}"
    elif blamed:
        what = f"the others wait for {labels[one.rank]}"
    else:
        what = f"the first that stopped is {labels[one.rank]}"
    place = f"; it is in {one.stack.place}" if one.stack.place else ""
    when = f"after step {newest}" if newest >= 0 else "before the first step"
    return f"{when} (phase '{sorted(phases)[0]}'): {what}{clause}{place}"


def _state(process: int) -> str:
    """Letter of the state of a process; empty where it has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


def _main_frame(lines: Sequence[str]) -> tuple[str, str] | None:
    """File, and `FUNCTION, FILE:LINE`, of the innermost frame of the main thread in the newest stacks of a log.

    faulthandler writes threads from the newest to the oldest, which is the main one.
    """
    for line, after in reversed(list(itertools.pairwise(lines))):
        if _STACK.match(line):
            if match := _FRAME.match(after):
                file = match["file"]
                return file, f"{match['function']}, {'/'.join(Path(file).parts[-2:])}:{match['line']}"
            return None
    return None
