"""Starts a process for each tracker of a run, again where it has failed, and prints what they have to say."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megazh.run.trackers.follow import order_of
from megazh.run.trackers.tracker import TrackedRun, TrackerName
from megazh.writing import warn_once

TRACKERS = "trackers"
"""Folder in the run folder for what trackers write."""

_FINISH_SECONDS = 10.0
_FIRST_WAIT_SECONDS = 60.0
_LONGEST_WAIT_SECONDS = 3600.0


@dataclass
class _Follower:
    """The process of one tracker."""

    process: "subprocess.Popen[bytes] | None" = None
    """None: it has failed, and is to be started again."""
    wait: float = _FIRST_WAIT_SECONDS
    """Seconds from the next failure to the start after it."""
    due: float = 0.0
    """Time of that start, in seconds of the monotonic clock."""


class Trackers:
    """The trackers of a run. Nothing that happens to them ends the run, or makes it wait before its end.

    A tracker that fails, since its service is down for example, is started again after a minute, then after two, and
    so on up to an hour, and once more at the end of the run. It is sent what it does not have yet.

    Args:
        names: the trackers.
        metrics: the metrics.jsonl that they follow; exists.
        run: the run; its folder is made.
        log: prints a line.
    """

    def __init__(
        self, names: Sequence[TrackerName], metrics: Path, run: TrackedRun, log: Callable[[str], None]
    ) -> None:
        self._metrics, self._run, self._log = metrics, run, log
        self._followers = {name: _Follower(wait=_FIRST_WAIT_SECONDS) for name in names}
        self._start_those_due()

    def poll(self) -> None:
        """Print what the processes have written since the last call, and start those that are due; never waits."""
        self._show()
        self._start_those_due()

    def close(self) -> None:
        """Let all of them send the rest. Waits ten seconds at most; what then still sends does so without the run."""
        self._show()
        for follower in self._followers.values():
            follower.due = 0.0
        self._start_those_due()
        for process in self._running.values():
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        end = time.monotonic() + _FINISH_SECONDS
        while self._running and time.monotonic() < end:
            self._show()
            time.sleep(0.05)
        for name, process in self._running.items():
            self._log(f"{name} is still being sent the last records, by process {process.pid}")

    @property
    def _running(self) -> dict[TrackerName, "subprocess.Popen[bytes]"]:
        return {name: each.process for name, each in self._followers.items() if each.process is not None}

    def _start_those_due(self) -> None:
        for name, follower in self._followers.items():
            if follower.process is None and time.monotonic() >= follower.due:
                try:
                    self._run.folder.mkdir(parents=True, exist_ok=True)
                    follower.process = _start(name, self._metrics, self._run)
                except OSError as error:
                    warn_once(self._run.folder, error, f"{name} is sent the records later")
                    _postpone(follower)

    def _show(self) -> None:
        """Print what the processes have written, and note which of them have ended."""
        for name, process in self._running.items():
            assert process.stdout is not None
            code = process.poll()  # first: what it has written before its end is read below
            while text := process.stdout.read():
                for line in text.decode("utf-8", "replace").splitlines():
                    self._log(line)
            if code is None:
                continue
            if code < 0:
                self._log(f"warning: {name}: its process was ended by signal {-code}; the rest is sent later")
            self._followers[name].process = None
            _postpone(self._followers[name])
            process.stdout.close()
            if process.stdin is not None:
                process.stdin.close()


def _postpone(follower: _Follower) -> None:
    """Wait before the next start, each time twice as long as before."""
    follower.due = time.monotonic() + follower.wait
    follower.wait = min(2 * follower.wait, _LONGEST_WAIT_SECONDS)


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
