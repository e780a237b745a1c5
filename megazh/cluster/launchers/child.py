"""One rank as a child process: it dies with its parent, what it starts ends with it, and it can say why it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from megazh.cluster.launchers.ending import Exit
from megazh.cluster.launchers.rank_log import RankLog
from megazh.console import LAST_WORDS
from megazh.run.pulse import PULSE

# It is a program of its own between parent and child, since nothing but exec is safe after a fork in a process with
# threads; the setting survives exec. A launcher in the background of a script ignores SIGINT, and one in some
# containers all signals; what it starts must not inherit that.
_BOOTSTRAP = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]))  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[2]):
    os._exit(1)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def dying_along(command: Sequence[str], number: int = signal.SIGKILL) -> list[str]:
    """A command that the kernel sends a signal when this process ends, however that happens."""
    return [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, str(int(number)), str(os.getpid()), *command]


class RankProcess:
    """A running rank.

    Args:
        rank: its number.
        arguments: arguments of the Python interpreter.
        environment: all of its environment, but for the variables of the two descriptors below.
        log: takes its stderr, and its stdout where `output` is None.
        output: descriptor for its stdout.
        pulse: descriptor of the memory for its signs of progress (see `megazh.run.pulse.Pulses`).
        at_end: called in a thread with the end.
    """

    def __init__(
        self,
        rank: int,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: RankLog,
        output: int | None,
        pulse: int,
        at_end: Callable[[Exit], object],
    ) -> None:
        self._rank, self._log, self._at_end = rank, log, at_end
        self._last_words, last_words = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        own = {LAST_WORDS: str(last_words), PULSE: str(pulse)}
        with open(log.path, "ab") as file:
            self._process = subprocess.Popen(
                dying_along([sys.executable, *arguments]),
                env={**environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=file if output is None else output,
                stderr=file,
                pass_fds=[last_words, pulse],
                start_new_session=True,  # Ctrl-C reaches the launcher alone; the rank's children can be ended with it
            )
        os.close(last_words)
        # One thread per rank instead of a polling loop, so that the first death is known.
        threading.Thread(target=self._await, daemon=True).start()

    @property
    def living(self) -> int | None:
        """Process id; None once the process is known to have ended."""
        return self._process.pid if self._process.returncode is None else None

    def signal(self, number: int) -> None:
        """Send a signal. Not through Popen, which would reap a dead process before its thread can."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill the process, and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def note_end(self, event: Exit, was_killed: bool) -> None:
        """Read the rank's own reason to end, and write to its log that a signal has ended it, if one has."""
        with contextlib.suppress(BlockingIOError):
            self._log.reported = os.read(self._last_words, 1 << 16).decode(errors="replace")
        if event.code < 0:  # else it has written the end itself
            by = " of its launcher" if was_killed else ""
            self._log.note(f"rank {self._rank}: ended by signal {-event.code}{by}")

    def close(self) -> None:
        """Free the descriptor of the last words."""
        os.close(self._last_words)

    def _await(self) -> None:
        """Wait for the end, kill the processes that the rank left behind, and report its exit."""
        process = self._process
        # Not reaped yet: so the number of its process group cannot belong to another process.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        self._at_end(Exit(self._rank, process.wait()))
