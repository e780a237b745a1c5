"""What a rank does about a hang: stacks on request, its own watch without a launcher, and limits of collectives.

On one machine the launcher watches all ranks (`megazh.cluster.launchers.hang`), since it knows which one is behind.
"""

import datetime
import faulthandler
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megazh.run.pulse import START_FACTOR, own_pulse

STACKS = signal.SIGUSR2
"""The signal on which a rank writes the stacks of its threads to its log."""

_LEAST_START_SECONDS = 3600.0  # compiling, timing and reading in one rank, while another waits
_MARGIN_SECONDS = 60.0  # collectives fail so much later than the launcher ends a hang: its message names the rank
_NEVER = datetime.timedelta(days=30)
_LOOK_SECONDS = 1.0

_log: Any = None  # kept open: faulthandler writes to its descriptor


def write_stacks_to(path: Path) -> None:
    """From now on, append the stacks of all threads to the file `path` at each signal `STACKS`."""
    global _log
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _log = open(path, "ab")  # noqa: SIM115
    except OSError:  # they go to stderr, then
        faulthandler.register(STACKS, all_threads=True)
        return
    faulthandler.register(STACKS, file=_log, all_threads=True)


def watch_alone(limit: float, give_up: Callable[[str], object]) -> None:
    """Watch this rank, where no launcher does: on several hosts.

    Args:
        limit: seconds without a sign of progress that are a hang; 0: nothing is one.
        give_up: called in a thread with what has happened, once the stacks are written; ends the process.
    """

    def watch() -> None:
        beats, idle, pulse = -1, 0.0, own_pulse()
        while idle < (limit if pulse.step >= 0 else START_FACTOR * limit):
            time.sleep(_LOOK_SECONDS)
            pulse = own_pulse()
            beats, idle = pulse.beats, 0.0 if pulse.beats != beats else idle + _LOOK_SECONDS
        signal.raise_signal(STACKS)
        give_up(f"phase '{pulse.phase}', step {pulse.step}: no progress for {idle:.0f} s; its stacks are in its log")

    if limit:
        threading.Thread(target=watch, name="hang", daemon=True).start()


def start_limit(hang_seconds: float) -> datetime.timedelta:
    """Longest time that a collective may wait until the first step is done."""
    return (
        datetime.timedelta(seconds=max(START_FACTOR * hang_seconds + _MARGIN_SECONDS, _LEAST_START_SECONDS))
        if hang_seconds
        else _NEVER
    )


def limit_collectives(limit: datetime.timedelta) -> None:
    """Set the longest time that a collective may wait, in all process groups of this rank, DeepSpeed's included.

    A group that torch makes without a limit has one of its own (10 minutes with NCCL). gloo has none for send and
    receive between two ranks: there, a launcher notices that nothing gets on.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(limit, group)


def step_limit(hang_seconds: float) -> datetime.timedelta:
    """Longest time that a collective may wait, once the first step is done."""
    return datetime.timedelta(seconds=hang_seconds + _MARGIN_SECONDS) if hang_seconds else _NEVER
