"""Launch the ranks of a job on this machine, and make them end together: all with success, or all at once.

It watches the ranks: when one dies, the others are ended; signals to stop are passed on to all.
"""

import contextlib
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from megazh.cluster.launchers.ending import SIGNALLED, STOPPED, Ending, Exit, reason_of, report
from megazh.cluster.launchers.environment import environment_of_ranks, refuse_copies
from megazh.cluster.launchers.hang import Watch, explain
from megazh.cluster.launchers.rank_log import Output, RankLog
from megazh.console import CONSOLE_LOG, LAST_WORDS, open_console
from megazh.progress import duration
from megazh.run.pulse import PULSE, Pulses
from megazh.training.control import SIGNALS, Reason, is_ignored
from megazh.training.job import Job
from megazh.training.startup import start_times

_ATTEMPTS = 3  # attempts to find a port that nobody takes before rank 0 listens on it
_SAVE_SECONDS = 900.0  # for a step of a large model and gigabytes to a slow disk; a second Ctrl-C does not wait
_OTHERS_SECONDS = 30.0  # ranks end together: after one has ended well, the others are about to
_KILL_SECONDS = 30.0  # a process inside a driver call can outlive SIGKILL for a while
_POLL_SECONDS = 0.1

# Makes the kernel kill a rank when its launcher ends, however that happens. It is a program of its own between launcher
# and rank, since nothing but exec is safe after a fork in a process with threads; the setting survives exec. A launcher
# in the background of a script ignores SIGINT, and one in some containers all signals; its ranks must not inherit that.
_BOOTSTRAP = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""


def launch(job: Job) -> int:
    """Run the ranks of a job on this machine until all have ended; returns the exit code (see `run_ranks`)."""
    env = {**job.environment, **start_times()}
    arguments = ["-m", "megazh", *job.arguments]
    with open_console() as console:
        console.log_to(job.run.logs / CONSOLE_LOG)
        hang_seconds = job.recipe.control.hang_minutes * 60
        return run_ranks(
            arguments, job.layout.ranks, env, job.devices.ids, job.run.logs, job.labels, hang_seconds, job.run.end
        )


def command(job: Job) -> list[str]:
    """Words that describe the launch of a job, for a dry run."""
    return [f"{job.layout.ranks} x python", "-m", "megazh", *job.arguments]


def run_ranks(
    arguments: Sequence[str],
    ranks: int,
    env: Mapping[str, str],
    gpu_ids: Sequence[int | str] | None,
    log_folder: Path,
    labels: Sequence[str] | None = None,
    hang_seconds: float = 0.0,
    at_end: Callable[[int, str], object] = lambda code, reason: None,
) -> int:
    """Run `ranks` processes `python ARGUMENTS` on this machine until all have ended; returns the exit code.

    A rank finds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment, as
    torch.distributed expects. stdout and stderr of rank 0 are copied to those of this process. The stderr of each rank,
    and the stdout of each but rank 0, are appended to LOG_FOLDER/rank_N.log. No rank writes to the terminal itself, and
    this process goes on where its terminal, or the reader of its output, is stuck or gone.

    When a rank fails, the others are killed, and one line on stderr names the first that failed and why: its own line
    `error: ...` where its exit code is one of megazh's errors. Ctrl-C (SIGINT), SIGTERM, SIGUSR1 and SIGHUP go to all
    ranks as they are, which have 15 minutes to save and end. A second Ctrl-C kills them; a second of the other signals
    does not: Slurm and terminals that close send several. Where no rank gives a sign of progress any longer (see
    `megazh.run.pulse`), all are killed, their stacks are in their logs, and the line names the one that others wait
    for. No process of the ranks outlives this one, even if this one is killed.

    Args:
        arguments: arguments of the Python interpreter in each rank.
        ranks: number of ranks.
        env: variables to add to this process's environment.
        gpu_ids: CUDA devices 0, 1 and so on of the ranks: numbers as nvidia-smi counts, or UUIDs. None: CPU.
        log_folder: folder of the ranks' logs.
        labels: names of the ranks in messages, such as `rank 1 (stage 1)`.
        hang_seconds: seconds without progress of any rank that are a hang; 0: nothing is one.
        at_end: called with the exit code and the reason, before this returns.

    Returns:
        0 if all ranks ended with 0; where a stop was requested, the code of its reason (see
        `megazh.training.control.Reason`); else the code of the first failure.

    Raises:
        UsageError: srun or mpirun started this process several times.
    """
    refuse_copies()
    log_folder.mkdir(parents=True, exist_ok=True)
    labels = labels or [f"rank {rank}" for rank in range(ranks)]
    with open_console() as console, _signals() as events:
        console.outlive()
        for attempt in range(_ATTEMPTS):
            with _reserved_port() as port:
                environment = environment_of_ranks(env, ranks, gpu_ids, port)
                logs = [RankLog(log_folder / f"rank_{rank}.log") for rank in range(ranks)]
                run = _Run(list(arguments), environment, logs, labels, hang_seconds)
                run.watch(events)
            if run.ending.failed is None or run.ending.reason or attempt + 1 == _ATTEMPTS or not run.port_was_taken():
                break
        code, reason = report(run.ending, run.logs, labels, _SAVE_SECONDS)
        at_end(code, reason)
        return code


def free_port() -> int:
    """A TCP port of this machine on which nothing listens at the moment."""
    with _reserved_port() as port:
        return port


_Events = queue.SimpleQueue[Exit | signal.Signals]


class _Run:
    """Ranks that were started together."""

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        logs: list[RankLog],
        labels: Sequence[str],
        hang_seconds: float,
    ) -> None:
        self._arguments, self._environment = arguments, environment
        self.logs, self._labels = logs, labels
        self._output = Output("stdout")  # of rank 0
        self.ending = Ending()
        self._ctrl_c = 0
        self._pulses = Pulses(len(logs))
        self._watch = Watch(self._pulses, hang_seconds)
        self._alive: dict[int, subprocess.Popen[bytes]] = {}
        self._last_words: dict[int, int] = {}
        self._deadline: float | None = None
        self._killed = False

    def watch(self, events: _Events) -> None:
        """Start the ranks, and return when all of them have ended."""
        try:
            for rank in range(len(self.logs)):
                self._start(rank, events)
            while self._alive:
                self._show()
                with contextlib.suppress(queue.Empty):
                    event = events.get(timeout=_POLL_SECONDS)
                    if isinstance(event, Exit):
                        self._ended(event)
                    else:
                        self._request(event)
                if not self._killed and self.ending.failed is None and self._watch.hangs():
                    self._give_up()
                if self._deadline is not None and time.monotonic() > self._deadline:
                    if self._killed:
                        break
                    self.ending.stuck = sorted(self._alive)
                    self._kill()
        finally:
            self._kill()
            self._show()
            self._output.close()
            self._pulses.close()
            for descriptor in self._last_words.values():
                os.close(descriptor)

    def _show(self) -> None:
        """Copy what rank 0 has written to the terminal."""
        self._output.show()
        self.logs[0].show()

    def port_was_taken(self) -> bool:
        """Whether rank 0 failed because another program has its port."""
        return any("EADDRINUSE" in line for line in self.logs[0].tail())

    def _start(self, rank: int, events: _Events) -> None:
        self._last_words[rank], last_words = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        pulse = self._pulses.descriptor
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), LAST_WORDS: str(last_words), PULSE: str(pulse)}
        bootstrap = [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, str(os.getpid())]
        with open(self.logs[rank].path, "ab") as log:
            process = subprocess.Popen(
                [*bootstrap, sys.executable, *self._arguments],
                env={**self._environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=self._output.descriptor if rank == 0 else log,
                stderr=log,
                pass_fds=[last_words, pulse],
                start_new_session=True,  # Ctrl-C reaches the launcher alone, and a rank's children can be ended with it
            )
        os.close(last_words)
        self._alive[rank] = process
        # One thread per rank instead of a polling loop, so that the first death is known.
        threading.Thread(target=_await, args=(rank, process, events), daemon=True).start()

    def _ended(self, event: Exit) -> None:
        del self._alive[event.rank]
        log = self.logs[event.rank]
        with contextlib.suppress(BlockingIOError):
            log.reported = os.read(self._last_words[event.rank], 1 << 16).decode(errors="replace")
        if event.code < 0:  # else it has written the end itself
            log.note(f"rank {event.rank}: ended by signal {-event.code}{' of its launcher' if self._killed else ''}")
        if self.ending.reason and event.code == 1 and log.ends_with_interrupt():
            # The signal came while Python itself was starting, which then ends with 1 instead of by the signal.
            event = Exit(event.rank, -signal.SIGINT)
        if event.code in STOPPED:  # the ranks agree to stop where one of them got a signal, or at a deadline
            agreed = Reason(self._pulses.read()[event.rank].reason)
            self.ending.reason = max(self.ending.reason, agreed) or reason_of(event.code)
            self.ending.left = True
        self.ending.complete = self.ending.complete and event.code == 0
        well = event.code == 0 or event.code in STOPPED
        if self.ending.reason and self.ending.failed is None and not self._killed:
            self._deadline = min(self._deadline or math.inf, time.monotonic() + _OTHERS_SECONDS)
        if not well and not self._killed and self.ending.failed is None:
            self.ending.failed = event
            self._show()
            self.logs[0].hide()
            self._kill()

    def _request(self, number: signal.Signals) -> None:
        reason, first = SIGNALS[number], not self.ending.reason
        self._ctrl_c += number == signal.SIGINT
        if self.ending.failed is not None:
            if self.ending.failed.code in SIGNALLED:
                self.ending.reason = max(
                    self.ending.reason, reason
                )  # Slurm signals all processes, and the ranks were quicker
            if self._ctrl_c > 1 or not first:
                self._kill()
            return
        if self._ctrl_c > 1:
            self._kill()
            return
        if reason <= self.ending.reason:
            return
        self.ending.reason = reason
        self._signal(number)
        if first:
            self._wait(_SAVE_SECONDS)
        again = "a second Ctrl-C kills them" if self._ctrl_c else "Ctrl-C twice kills them"
        print(f"stopping: {reason.text}; the ranks save and end ({again})", file=sys.stderr, flush=True)

    def _give_up(self) -> None:
        """Kill ranks that get on no longer."""
        self._show()
        self.logs[0].hide()  # the stacks are for the log
        processes = {rank: process.pid for rank, process in self._alive.items() if process.returncode is None}
        self.ending.hang = f"no rank has got on for {duration(self._watch.idle)} " + (
            explain(processes, self.logs, self._pulses, self._labels) if processes else "(all have ended)"
        )
        self._kill()

    def _signal(self, number: signal.Signals) -> None:
        """Signal all ranks that live. Not through Popen, which would reap a dead one before its thread can."""
        for process in self._alive.values():
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def _kill(self) -> None:
        self._killed = True
        for process in self._alive.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self._wait(_KILL_SECONDS)

    def _wait(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds


def _await(rank: int, process: subprocess.Popen[bytes], events: _Events) -> None:
    """Wait for the end of a rank, kill the processes that it left behind, and report its exit."""
    # Not reaped yet: so the number of its process group cannot belong to another process.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    events.put(Exit(rank, process.wait()))


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A port that the kernel assigns to no other program meanwhile; rank 0 can listen on it nevertheless."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@contextlib.contextmanager
def _signals() -> Iterator[_Events]:
    """Turn the signals that request a stop into events."""
    events: _Events = queue.SimpleQueue()

    def handler(number: int, _: FrameType | None) -> None:
        events.put(signal.Signals(number))

    before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
    for each in SIGNALS:
        if not is_ignored(each):
            before[each] = signal.signal(each, handler)
    try:
        yield events
    finally:
        for each, old in before.items():
            signal.signal(each, old)
