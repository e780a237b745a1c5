"""Run commands that leave nothing behind: each has a time limit, and all its descendants are killed at the end."""

import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finished:
    """A command that has ended; `returncode` is negative if a signal ended it."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A running command; made by `start_command`."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str, stdout: Path, stderr: Path) -> None:
        self.process = process
        self._mark = mark
        self._stdout, self._stderr = stdout, stderr

    def descendants(self) -> list[int]:
        """Ids of the living processes among the command and its descendants."""
        return marked_processes(self._mark)

    def wait(self, timeout: float) -> Finished:
        """Wait for the end. Raises AssertionError, with the output so far, after `timeout` seconds."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.process.args} still runs after {timeout} s\n{self._text(self._stdout)}\n"
                f"{self._text(self._stderr)}"
            ) from None
        return Finished(code, self._text(self._stdout), self._text(self._stderr))

    @staticmethod
    def _text(path: Path) -> str:
        return path.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def start_command(
    args: Sequence[str | Path], env: Mapping[str, str | None] | None = None, cwd: Path | None = None
) -> Iterator[Running]:
    """Start a command in a process group of its own; when the block ends, it and all its descendants are killed.

    Args:
        env: variables to add to this process's environment; None removes one.
    """
    # mpirun's proxies and Slurm's steps leave the process group, but keep the environment.
    mark = f"MEGAZH_TEST_COMMAND={uuid.uuid4().hex}"
    environment = {**os.environ, **(env or {}), **dict([mark.split("=")])}
    environment = {name: value for name, value in environment.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        # Files, not pipes: a process left over that holds a pipe open would make the reader wait.
        with open(stdout, "wb") as out, open(stderr, "wb") as err:
            process = subprocess.Popen(
                [str(arg) for arg in args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                cwd=cwd,
                start_new_session=True,
            )
        try:
            yield Running(process, mark, stdout, stderr)
        finally:
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kill_marked(mark)


def run_command(
    args: Sequence[str | Path],
    timeout: float = 60.0,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
) -> Finished:
    """Run a command to its end; see `start_command`. Raises AssertionError after `timeout` seconds."""
    with start_command(args, env, cwd) as running:
        return running.wait(timeout)


def drop_root() -> None:
    """Make permissions hold for root as well: give up the capabilities to pass over them, for this process and those
    that it starts."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP


def marked_processes(mark: str) -> list[int]:
    """Ids of the living processes that were started with `mark`, a NAME=VALUE, in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to another user
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)


def kill_marked(mark: str) -> None:
    """Kill all processes with `mark` in their environment, and repeat until none is left."""
    deadline = time.monotonic() + 10
    while (pids := marked_processes(mark)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def wait_until(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """Wait for a true value of `condition()`, and return it. Raises AssertionError after `timeout` seconds.

    Args:
        condition: called every 10 ms.
        timeout: seconds to wait.
        what: description of the condition, for the error.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {timeout} s")
