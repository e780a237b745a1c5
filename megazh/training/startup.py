"""How long a run takes from the command to its first step, and what takes it."""

import os
import time

import psutil

BEGUN = "MEGAZH_BEGUN"
"""Environment variable: when the command began, in seconds since the epoch; the launcher gives it to its ranks."""


def process_begun() -> float:
    """When this process was started, in seconds since the epoch."""
    return psutil.Process().create_time()


class Startup:
    """A clock for the parts of a start; on one rank it stands for all, which wait for each other.

    Without a launcher that says when it began, the first part is left out.
    """

    def __init__(self) -> None:
        own = process_begun()
        self._begun = float(os.environ.get(BEGUN, own))
        self._last = self._begun
        self._parts: list[tuple[str, float]] = []
        if self._begun != own:
            self.done("launcher", own)

    def done(self, part: str, now: float | None = None) -> None:
        """The time since the last part went into this one."""
        now = time.time() if now is None else now
        self._parts.append((part, max(0.0, now - self._last)))
        self._last = now

    def describe(self) -> str:
        """`first step after 14.2 s: launcher 1.4, imports 6.0, ...`; parts of less than 0.05 s are left out."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._parts if seconds >= 0.05)
        return f"first step after {self._last - self._begun:.1f} s: {parts}"
