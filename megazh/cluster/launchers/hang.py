"""Notice that the ranks of a run get on no longer; put their stacks into their logs, and find the one to blame."""

import contextlib
import itertools
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megazh.cluster.launchers.rank_log import RankLog
from megazh.run.pulse import START_FACTOR, Pulse, Pulses
from megazh.training.hang import STACKS

_LOOK_SECONDS = 1.0
_STACK_SECONDS = 2.0  # for the stacks to be written
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
_STACK = re.compile(r"^(?:Current thread|Thread) .*\(most recent call first\):$")
# Where a rank waits for others: in a collective, or on a GPU for one to end.
_WAITING = re.compile(
    r"/(?:torch/distributed|deepspeed/comm|torch/cuda)/|/deepspeed/runtime/pipe/p2p\.py$|/pipeline/transfer\.py$"
)
_STATES = {"T": "is stopped by a signal (SIGSTOP)", "t": "is held by a debugger", "D": "waits for a disk or a driver"}


class Watch:
    """Counts how long no rank has given a sign of progress.

    Only time in which this process itself runs is counted: where the whole machine or all of the job was suspended,
    nothing hangs.

    Args:
        pulses: the pulses of the ranks.
        limit: seconds without progress that are a hang, `START_FACTOR` times as many until a step is taken; 0: nothing
            is one.
    """

    def __init__(self, pulses: Pulses, limit: float) -> None:
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


class _Found(NamedTuple):
    rank: int
    state: str
    """Letter of the process's state, as in /proc/PID/stat."""
    place: str
    """`FUNCTION, FILE:LINE` of the main thread; empty where no stack came."""
    waits: bool
    """Whether that is a place where a rank waits for others."""
    pulse: Pulse


def explain(processes: Mapping[int, int], logs: Sequence[RankLog], pulses: Pulses, labels: Sequence[str]) -> str:
    """Have the ranks write their stacks to their logs; returns which rank the others wait for, and why.

    A rank that SIGSTOP has stopped is continued for it. The ranks are to be killed afterwards.

    Args:
        processes: process of each rank that lives.
        logs: log of each rank.
        pulses: the pulses.
        labels: names of the ranks.
    """
    states = {rank: _state(process) for rank, process in processes.items()}
    for rank, process in processes.items():
        logs[rank].note(f"rank {rank}: no rank gets on; the stacks of this one:")
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, STACKS)
            if states[rank] == "T":
                os.kill(process, signal.SIGCONT)
    deadline = time.monotonic() + _STACK_SECONDS
    frames: dict[int, tuple[str, str]] = {}
    while len(frames) < len(processes) and time.monotonic() < deadline:
        time.sleep(0.1)
        frames = {rank: frame for rank in processes if (frame := _main_frame(logs[rank].tail()))}
    found = []
    for rank, pulse in enumerate(pulses.read()):
        if rank in processes:
            file, place = frames.get(rank, ("", ""))
            found.append(_Found(rank, states[rank], place, bool(_WAITING.search(file)), pulse))
    return _blame(found, labels)


def _blame(found: Sequence[_Found], labels: Sequence[str]) -> str:
    """Which rank the others wait for. The strongest evidence counts: its state, steps, place, age of its last sign."""
    newest = max(each.pulse.step for each in found)
    phases = {each.pulse.phase for each in found}
    by_evidence = [
        [each for each in found if each.state in _STATES],
        [each for each in found if each.pulse.step < newest],
        [each for each in found if each.place and not each.waits],
    ]
    blamed = next((some for some in by_evidence if some and len(some) < len(found)), [])
    one = min(blamed or found, key=lambda each: each.pulse.time)
    clause = ""
    if one.state in _STATES:
        clause = f", which {_STATES[one.state]}"
    elif one.pulse.step < newest:
        clause = f", which is at step {one.pulse.step} while others are at step {newest}"
    if len(found) == 1:
        what = f"it is {labels[one.rank]}"
    elif blamed:
        what = f"the others wait for {labels[one.rank]}"
    else:
        what = f"the first that stopped is {labels[one.rank]}"
    place = f"; it is in {one.place}" if one.place else ""
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
