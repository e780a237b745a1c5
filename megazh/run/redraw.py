"""Draws the plot of a run while it trains, in a process of its own: `python -m megazh.run.redraw RUN`.

The run neither waits for it nor minds if it fails: matplotlib takes seconds to start, and a plot is no reason to end.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PLOT = "loss.png"

_APART_SECONDS = 60.0
"""Shortest time from the beginning of one drawing to that of the next."""
_SHARE = 0.05
"""Largest share of the time for which drawings take a processor core: that of a long run takes half a minute."""
_NICE = 10


class Redrawing:
    """Draws `loss.png` of a run now and then."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = -_APART_SECONDS
        self._seconds = 0.0

    def draw(self) -> None:
        """Begin to draw, unless the last drawing goes on, or began too short a time ago for what it took."""
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() - self._begun < max(_APART_SECONDS, self._seconds / _SHARE):
            return
        self._begun = time.monotonic()
        try:
            self._process = subprocess.Popen(_command(self._folder), **_options())
            threading.Thread(target=self._measure, args=(self._process,), name="redrawing", daemon=True).start()
        except OSError:  # no memory or process left for it
            self._process = None

    def _measure(self, process: subprocess.Popen[bytes]) -> None:
        """Note how long a drawing takes; in a thread."""
        process.wait()
        self._seconds = time.monotonic() - self._begun

    def close(self) -> None:
        """End a drawing that goes on: whoever ends the run draws the final one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def draw_within(folder: Path, seconds: float) -> bool:
    """Draw `loss.png` of a run that has ended; returns whether that was done within some seconds."""
    try:
        return subprocess.run(_command(folder), **_options(), timeout=seconds, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _command(folder: Path) -> list[str]:
    """The command of a process that draws."""
    return [sys.executable, "-P", "-m", "megazh.run.redraw", str(folder)]


def _options() -> dict[str, Any]:
    """Its environment and streams."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "env": {**os.environ, "PYTHONPATH": path},
    }


def _main(folder: Path) -> None:
    from megazh.run.plot import plot_losses  # imports the module of the metrics, which imports this one

    os.nice(_NICE)
    plot_losses(folder, folder / PLOT)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
