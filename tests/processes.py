"""Start commands so that nothing of them outlives a test: each has a time limit, and all its descendants are ended."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finished:
    """A command that has ended; `returncode` is negative where a signal ended it."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A command that runs; use it through `start_command`."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str, stdout: Path, stderr: Path) -> None:
        self.process = process
        self._mark = mark
        self._stdout, self._stderr = stdout, stderr

    def descendants(self) -> list[int]:
        """Process ids of all that the command started and that still live, itself included."""
        return marked_processes(self._mark)

    def wait(self, timeout: float) -> Finished:
        """Wait for the end. Raises AssertionError, with what was printed, where it does not come in time."""
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
    """Start a command in a process group of its own; at the end of the block all that is left of it is killed.

    Args:
        env: variables to add to this process's own; None removes one.
    """
    # mpirun's proxies and Slurm's steps leave the group, but not the environment.
    mark = f"MEGAZH_TEST_COMMAND={uuid.uuid4().hex}"
    environment = {**os.environ, **(env or {}), **dict([mark.split("=")])}
    environment = {name: value for name, value in environment.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        # Files, not pipes: a left-over process that holds a pipe open would make the reader wait for it.
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
    """Run a command to its end; see `start_command`. Raises AssertionError where it takes longer than `timeout`."""
    with start_command(args, env, cwd) as running:
        return running.wait(timeout)


def marked_processes(mark: str) -> list[int]:
    """Ids of the living processes that were started with `mark`, a NAME=VALUE, in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile, or of another user
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)


def kill_marked(mark: str) -> None:
    """Kill all processes that carry `mark`, again until none is left."""
    deadline = time.monotonic() + 10
    while (pids := marked_processes(mark)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def wait_until(condition, timeout: float, what: str):
    """The first true value of `condition()`. Raises AssertionError naming `what` where none comes in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {timeout} s")
