"""Commands and checks in child processes with a time limit, so that a hanging driver or library hangs nothing else."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_KILL_SECONDS = 2.0  # a process that waits in the driver may not end even then; it is left behind
_MOST_BYTES = 4 << 20
_TELLING = re.compile(r"error|timed? ?out|warn", re.IGNORECASE)


class Ended(NamedTuple):
    """A command that has ended, or was killed at its time limit."""

    code: int | None
    """Exit code, negative for a signal; None: the time limit ended it."""
    output: str
    errors: str

    @property
    def failure(self) -> str:
        """One line that says why it failed; empty where it did not."""
        if self.code == 0:
            return ""
        if self.code is None:
            return "still running at its time limit"
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        telling = [line for line in lines if _TELLING.search(line)] or lines  # below them torch prints stack frames
        return telling[-1] if telling else f"exit code {self.code}"


class Deadline:
    """Time that is left to a whole examination.

    Args:
        seconds: time in all.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, most: float) -> float:
        """Seconds for a check that wants up to `most`; 0 where the time is up."""
        return max(0.0, min(most, self._end - time.monotonic()))


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a command in a process group of its own, which is killed after `seconds`.

    Raises:
        OSError: the command cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="megazh-doctor-") as name, _started(command, Path(name), environment) as it:
        with contextlib.suppress(subprocess.TimeoutExpired):
            it.wait(seconds)
        return Ended(it.poll(), _text(Path(name) / "out"), _text(Path(name) / "err"))


def probe(
    subject: str,
    arguments: Mapping[str, Any],
    seconds: float,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], Ended]:
    """Run `megazh.cluster.doctor.probe SUBJECT` in one or several processes.

    Args:
        subject: name of the probe.
        arguments: its keyword arguments; several ranks get `rank`, `ranks` and `store` (a file to meet at) besides.
        seconds: time limit of all.
        ranks: number of processes.
        environment: variables to add.

    Returns:
        What they reported, in the order of ranks, also where they hang or die; and the end of the first that failed.
    """
    with tempfile.TemporaryDirectory(prefix="megazh-doctor-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        end = time.monotonic() + seconds
        processes = []
        for rank in range(ranks):
            place = folder / str(rank)
            place.mkdir()
            own = {"rank": rank, "ranks": ranks, "store": str(folder / "store")} if ranks > 1 else {}
            command = [
                *(sys.executable, "-P", "-m", "megazh.cluster.doctor.probe", subject),
                *(json.dumps({**arguments, **own}), str(place / "reported")),
            ]
            processes.append(stack.enter_context(_started(command, place, environment)))
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):  # the others would wait for the one that failed
                end = min(end, time.monotonic() + 1)
            time.sleep(0.02)
        ended = [
            Ended(process.poll(), _text(folder / str(rank) / "out"), _text(folder / str(rank) / "err"))
            for rank, process in enumerate(processes)
        ]
        reported = [line for rank in range(ranks) for line in _json_lines(folder / str(rank) / "reported")]
        failed = [each for each in ended if each.code] or [each for each in ended if each.code is None]
        return reported, (failed or ended)[0]


@contextlib.contextmanager
def _started(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command whose output goes to files in a folder; it and its group are killed when the block ends."""
    # Files, not pipes: a process left over that holds a pipe open would make the reader wait.
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, "LC_ALL": "C.UTF-8", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **(environment or {})},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_SECONDS)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; a last line without its end is left out."""
    found = []
    for line in _text(path).split("\n")[:-1]:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_MOST_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ""
