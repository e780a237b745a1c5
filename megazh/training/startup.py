"""Time from the command to the first training step, by phase."""

import contextlib
import os
import time
from collections.abc import Iterator

import psutil

from megazh.run.pulse import beat

BEGUN = "MEGAZH_BEGUN"
"""Environment variable with the start time of the command, in seconds since the epoch; launchers pass it to ranks."""

PREPARED = "MEGAZH_PREPARED"
"""Environment variable with the seconds that the command took to make its data, which launchers pass to ranks."""

_prepared = 0.0


def process_begun() -> float:
    """Start time of this process, in seconds since the epoch."""
    return psutil.Process().create_time()


def command_begun() -> float:
    """Time at which Python began to run this command, in seconds since the epoch.

    A shell script that becomes Python by `exec`, as jobs/run_pretrain.sh does after its setup, is older as a process;
    it leaves the time of that in `BEGUN`. An earlier time there is that of another process, which started this one.
    """
    begun = process_begun()
    with contextlib.suppress(KeyError, ValueError):
        return max(begun, min(float(os.environ[BEGUN]), time.time()))
    return begun


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Count the time inside the block as preparation of data, not as start-up of the launcher."""
    global _prepared
    begun = time.monotonic()
    try:
        yield
    finally:
        _prepared += time.monotonic() - begun


def start_times() -> dict[str, str]:
    """Variables by which a launcher passes its times to the ranks."""
    return {BEGUN: str(command_begun()), PREPARED: str(_prepared)}


class Startup:
    """A clock for the phases of a start. One rank's clock stands for all, since ranks wait for each other.

    Where no launcher passed its start time, the first phases are left out.
    """

    def __init__(self) -> None:
        own = process_begun()
        self._begun = float(os.environ.get(BEGUN, own))
        self._last = self._begun
        self._phases: list[tuple[str, float]] = []
        if self._begun != own:
            prepared = float(os.environ.get(PREPARED, 0))
            if prepared:
                self.done("preparing data", min(own, self._begun + prepared))
            self.done("launcher", own)

    def done(self, phase: str, now: float | None = None) -> None:
        """Record a phase that took the time since the last one."""
        now = time.time() if now is None else now
        self._phases.append((phase, max(0.0, now - self._last)))
        self._last = now
        beat(f"after {phase}")

    @property
    def begun(self) -> float:
        """Start time of the command, in seconds since the epoch."""
        return self._begun

    def describe(self) -> str:
        """`first step after 14.2 s: launcher 1.4, imports 6.0, ...`; phases below 0.05 s are left out."""
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._phases if seconds >= 0.05)
        return f"first step after {self._last - self._begun:.1f} s: {phases}"
