"""Time from the command to the first training step, by phase."""

import os
import time

import psutil

BEGUN = "MEGAZH_BEGUN"
"""Environment variable with the start time of the command, in seconds since the epoch; launchers pass it to ranks."""


def process_begun() -> float:
    """Start time of this process, in seconds since the epoch."""
    return psutil.Process().create_time()


class Startup:
    """A clock for the phases of a start. One rank's clock stands for all, since ranks wait for each other.

    Where no launcher passed its start time, the first phase is left out.
    """

    def __init__(self) -> None:
        own = process_begun()
        self._begun = float(os.environ.get(BEGUN, own))
        self._last = self._begun
        self._phases: list[tuple[str, float]] = []
        if self._begun != own:
            self.done("launcher", own)

    def done(self, phase: str, now: float | None = None) -> None:
        """Record a phase that took the time since the last one."""
        now = time.time() if now is None else now
        self._phases.append((phase, max(0.0, now - self._last)))
        self._last = now

    def describe(self) -> str:
        """`first step after 14.2 s: launcher 1.4, imports 6.0, ...`; phases below 0.05 s are left out."""
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._phases if seconds >= 0.05)
        return f"first step after {self._last - self._begun:.1f} s: {phases}"
