"""The run that is soaked: its layout, a start of its command in a terminal of its own, and what its records say."""

import contextlib
import ctypes
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

MARK = "SOAK_MARK"
"""Variable of the environment by which all processes of a soak are known."""
_DIE_WITH_PARENT = 1  # of prctl


class Layout(NamedTuple):
    """Arrangement of the ranks of an attempt."""

    ranks: int
    stages: int
    micro_batch_size: int

    def words(self) -> list[str]:
        """Options of `megazh pretrain`."""
        return [
            "-n", str(self.ranks), "-p", str(self.stages), f"micro_batch_size={self.micro_batch_size}",
        ]  # fmt: skip

    def __str__(self) -> str:
        return f"{self.stages} x {self.ranks // self.stages}, micro-batch {self.micro_batch_size}"


class Attempt:
    """A start of a command in a terminal of its own, whose output is appended to a file.

    Args:
        words: the command.
        env: its environment.
        output: the file.
    """

    def __init__(self, words: Sequence[str | Path], env: Mapping[str, str], output: Path) -> None:
        self._terminal, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(os.getpid()), *map(str, words)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=dict(env),
            start_new_session=True,
        )
        os.close(theirs)
        self.begun = time.monotonic()
        self._mark = f"{MARK}={env[MARK]}"
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    def _read(self, output: Path) -> None:
        with open(output, "ab") as file:
            while not self._closing.is_set():
                if select.select([self._terminal], [], [], 0.1)[0]:
                    try:
                        data = os.read(self._terminal, 1 << 16)
                    except OSError:  # the command has ended
                        return
                    file.write(data)
                    file.flush()

    def ranks(self) -> list[int]:
        """Process ids of the ranks that live, by rank."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error, ValueError):
                    if rank := child.environ().get("RANK"):
                        found[int(rank)] = child.pid
        return [process for _, process in sorted(found.items())]

    def kill(self) -> None:
        """Kill the launcher, and nobody else."""
        self.process.kill()

    def type(self, text: str) -> None:
        """Type text into the terminal."""
        os.write(self._terminal, text.encode())

    def hang_up(self) -> None:
        """Close the terminal."""
        if not self._closing.is_set():
            self._closing.set()
            self._reader.join()
            os.close(self._terminal)

    def wait(self, seconds: float) -> int | None:
        """Exit code (minus the signal where one ended the command); None where it still runs after `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def close(self, seconds: float = 30.0) -> list[int]:
        """Close the terminal once the command has ended; returns the processes that outlived it by `seconds`, which
        are killed."""
        deadline = time.monotonic() + seconds
        while (left := marked(self._mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        kill_marked(self._mark)
        self.hang_up()
        return left


def marked(mark: str) -> list[int]:
    """Ids of the living processes that have `mark`, a NAME=VALUE, in their environment, but for this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def kill_marked(mark: str) -> None:
    """Kill all processes with `mark` in their environment, and wait up to ten seconds for their end."""
    deadline = time.monotonic() + 10
    while (left := marked(mark)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


class Follower:
    """What the `metrics.jsonl` of a run says, read again and again while the run writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reset(0)

    def _reset(self, file: int) -> None:
        self._file, self._offset = file, 0
        self.begins = 0
        """Number of attempts that got so far as to train."""
        self.begun_at = 0
        """Step that the newest of them went on from."""
        self.losses: dict[int, float] = {}
        self.newest: dict[str, Any] = {}
        """Record of the newest step."""

    def look(self) -> None:
        """Read what is new."""
        try:
            file = open(self._path, "rb")  # noqa: SIM115 (closed below)
        except FileNotFoundError:
            return
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or found.st_size < self._offset:
                self._reset(found.st_ino)
            file.seek(self._offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for line in data[:whole].splitlines():
            record = json.loads(line)
            if record["kind"] == "step":
                self.losses[record["step"]] = float(record["loss"])
                self.newest = record
            elif record["kind"] == "event" and record["name"] in ("start", "resume"):
                self.begins += 1
                self.begun_at = record["step"]

    @property
    def last(self) -> int:
        """Newest step recorded."""
        return int(self.newest.get("step", 0))


def _become(parent: int, words: list[str]) -> None:
    """Become the command `words`, in the terminal on stdin, which ends with its parent; see `Attempt`."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    for number in (signal.SIGINT, signal.SIGHUP):  # nohup and shells' background jobs ignore them
        signal.signal(number, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.execvp(words[0], words)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
