"""Starts a process for each tracker of a run, and prints what they have to say."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megazh.run.trackers.follow import order_of
from megazh.run.trackers.tracker import TrackedRun, TrackerName
from megazh.writing import warn_once

TRACKERS = "trackers"
"""Folder in the run folder for what trackers write."""

_FINISH_SECONDS = 10.0


class Trackers:
    """The trackers of a run. Nothing that happens to them ends the run, or makes it wait before its end.

    Args:
        names: the trackers.
        metrics: the metrics.jsonl that they follow; exists.
        run: the run; its folder is made.
        log: prints a line.
    """

    def __init__(
        self, names: Sequence[TrackerName], metrics: Path, run: TrackedRun, log: Callable[[str], None]
    ) -> None:
        self._log = log
        self._running: dict[TrackerName, subprocess.Popen[bytes]] = {}
        for name in names:
            try:
                run.folder.mkdir(parents=True, exist_ok=True)
                self._running[name] = _start(name, metrics, run)
            except OSError as error:
                warn_once(run.folder, error, f"{name} gets nothing of this attempt; the next one sends it")

    def poll(self) -> None:
        """Print what the processes have written since the last call; never waits."""
        for name, process in list(self._running.items()):
            assert process.stdout is not None
            code = process.poll()  # first: what it has written before its end is read below
            while text := process.stdout.read():
                for line in text.decode("utf-8", "replace").splitlines():
                    self._log(line)
            if code is None:
                continue
            if code < 0:
                self._log(f"warning: {name}: its process was ended by signal {-code}; the next attempt sends the rest")
            del self._running[name]
            process.stdout.close()
            if process.stdin is not None:
                process.stdin.close()

    def close(self) -> None:
        """Let all of them send the rest. Waits ten seconds at most; what then still sends does so without the run."""
        for process in self._running.values():
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        end = time.monotonic() + _FINISH_SECONDS
        while self._running and time.monotonic() < end:
            self.poll()
            time.sleep(0.05)
        for name in self._running:
            self._log(f"{name} is still being sent the last records, by process {self._running[name].pid}")


def _start(name: TrackerName, metrics: Path, run: TrackedRun) -> "subprocess.Popen[bytes]":
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with open(run.folder / f"{name}.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megazh.run.trackers.follow"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, which then says what to do
            bufsize=0,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    with contextlib.suppress(BrokenPipeError):  # it has ended already, and its log says why
        process.stdin.write(order_of(name, metrics, run))
    return process
