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
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from megazh.cluster.launchers.rank_log import Output, RankLog
from megazh.console import CONSOLE_LOG, LAST_WORDS, open_console
from megazh.errors import INTERRUPTED, UsageError, WorkerError
from megazh.training.job import Job
from megazh.training.startup import start_times

_ATTEMPTS = 3  # attempts to find a port that nobody takes before rank 0 listens on it
_SAVE_SECONDS = 900.0  # for a step of a large model and gigabytes to a slow disk; a second Ctrl-C does not wait
_OTHERS_SECONDS = 30.0  # ranks end together: after one has ended well, the others are about to
_KILL_SECONDS = 30.0  # a process inside a driver call can outlive SIGKILL for a while
_POLL_SECONDS = 0.1

# Makes the kernel kill a rank when its launcher ends, however that happens. It is a program of its own between launcher
# and rank, since nothing but exec is safe after a fork in a process with threads; the setting survives exec. A launcher
# in the background of a script ignores SIGINT, and its ranks must not inherit that.
_BOOTSTRAP = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""

# Variables of other launchers about this process; a rank that read them would use a wrong rank number.
_FOREIGN_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "TORCHELASTIC_")
_FOREIGN = {
    "SLURM_GTIDS",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_NPROCS",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_TASKS_PER_NODE",
    "SLURM_TASK_PID",
}
_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

_SIGNALLED = (-signal.SIGINT, -signal.SIGTERM)  # exit codes of a process that a signal ended before it could save
_HINTS: dict[int, str] = {signal.SIGKILL: " (out of memory?)", signal.SIGBUS: " (is /dev/shm full?)"}


def launch(job: Job) -> int:
    """Run the ranks of a job on this machine until all have ended; returns the exit code (see `run_ranks`)."""
    env = {**job.environment, **start_times()}
    arguments = ["-m", "megazh", *job.arguments]
    with open_console() as console:
        console.log_to(job.run.logs / CONSOLE_LOG)
        return run_ranks(arguments, job.layout.ranks, env, job.devices.ids, job.run.logs, job.labels)


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
) -> int:
    """Run `ranks` processes `python ARGUMENTS` on this machine until all have ended; returns the exit code.

    A rank finds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment, as
    torch.distributed expects. stdout and stderr of rank 0 are copied to those of this process. The stderr of each rank,
    and the stdout of each but rank 0, are appended to LOG_FOLDER/rank_N.log. No rank writes to the terminal itself, and
    this process goes on where its terminal, or the reader of its output, is stuck or gone.

    When a rank fails, the others are killed, and one line on stderr names the first that failed and why: its own line
    `error: ...` where its exit code is one of megazh's errors. The first Ctrl-C (SIGINT; also SIGTERM and SIGHUP) sends
    SIGINT to all ranks, which have 15 minutes to save and end; another Ctrl-C kills them. A second SIGTERM or SIGHUP
    does not: Slurm and terminals that close send several. No process of the ranks outlives this one, even if this one
    is killed.

    Args:
        arguments: arguments of the Python interpreter in each rank.
        ranks: number of ranks.
        env: variables to add to this process's environment.
        gpu_ids: CUDA devices 0, 1 and so on of the ranks: numbers as nvidia-smi counts, or UUIDs. None: CPU.
        log_folder: folder of the ranks' logs.
        labels: names of the ranks in messages, such as `rank 1 (stage 1)`.

    Returns:
        0 if all ranks ended with 0, 130 if stopped by Ctrl-C, else the code of the first failure; see `megazh.errors`.

    Raises:
        UsageError: srun or mpirun started this process several times.
    """
    _refuse_copies()
    log_folder.mkdir(parents=True, exist_ok=True)
    labels = labels or [f"rank {rank}" for rank in range(ranks)]
    with open_console() as console, _signals() as events:
        console.outlive()
        for attempt in range(_ATTEMPTS):
            with _reserved_port() as port:
                environment = _environment(env, ranks, gpu_ids, port)
                logs = [RankLog(log_folder / f"rank_{rank}.log") for rank in range(ranks)]
                run = _Run(list(arguments), environment, logs)
                run.watch(events)
            if run.failed is None or run.interrupted or attempt + 1 == _ATTEMPTS or not run.port_was_taken():
                break
        return _report(run, labels)


def free_port() -> int:
    """A TCP port of this machine on which nothing listens at the moment."""
    with _reserved_port() as port:
        return port


class _Exit(NamedTuple):
    rank: int
    code: int
    """Exit code; the negative number of a signal where one ended the rank."""


_Events = queue.SimpleQueue[_Exit | signal.Signals]


class _Run:
    """Ranks that were started together."""

    def __init__(self, arguments: list[str], environment: dict[str, str], logs: list[RankLog]) -> None:
        self._arguments, self._environment = arguments, environment
        self.logs = logs
        self._output = Output("stdout")  # of rank 0
        self.failed: _Exit | None = None
        self.interrupted = False
        self.stuck: list[int] = []
        """Ranks that did not end in time."""
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
                    if isinstance(event, _Exit):
                        self._ended(event)
                    else:
                        self._interrupt(event)
                if self._deadline is not None and time.monotonic() > self._deadline:
                    if self._killed:
                        break
                    self.stuck = sorted(self._alive)
                    self._kill()
        finally:
            self._kill()
            self._show()
            self._output.close()
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
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), LAST_WORDS: str(last_words)}
        bootstrap = [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, str(os.getpid())]
        with open(self.logs[rank].path, "ab") as log:
            process = subprocess.Popen(
                [*bootstrap, sys.executable, *self._arguments],
                env={**self._environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=self._output.descriptor if rank == 0 else log,
                stderr=log,
                pass_fds=[last_words],
                start_new_session=True,  # Ctrl-C reaches the launcher alone, and a rank's children can be ended with it
            )
        os.close(last_words)
        self._alive[rank] = process
        # One thread per rank instead of a polling loop, so that the first death is known.
        threading.Thread(target=_await, args=(rank, process, events), daemon=True).start()

    def _ended(self, event: _Exit) -> None:
        del self._alive[event.rank]
        log = self.logs[event.rank]
        with contextlib.suppress(BlockingIOError):
            log.reported = os.read(self._last_words[event.rank], 1 << 16).decode(errors="replace")
        if event.code < 0:  # else it has written the end itself
            log.note(f"rank {event.rank}: ended by signal {-event.code}{' of its launcher' if self._killed else ''}")
        if self.interrupted and event.code == 1 and log.ends_with_interrupt():
            # The signal came while Python itself was starting, which then ends with 1 instead of by the signal.
            event = _Exit(event.rank, -signal.SIGINT)
        if event.code == INTERRUPTED:  # the ranks agree to stop where one of them got a signal
            self.interrupted = True
        well = event.code in (0, INTERRUPTED)
        if self.interrupted and self.failed is None and not self._killed:
            self._deadline = min(self._deadline or math.inf, time.monotonic() + _OTHERS_SECONDS)
        if not well and not self._killed and self.failed is None:
            self.failed = event
            self._show()
            self.logs[0].hide()
            self._kill()

    def _interrupt(self, number: signal.Signals) -> None:
        if self.failed is not None and self.failed.code in _SIGNALLED and not self.interrupted:
            self.interrupted = True  # Slurm sends signals to all processes, and the ranks were quicker
            return
        if self.interrupted or self.failed is not None:
            if number == signal.SIGINT:
                self._kill()
            return
        self.interrupted = True
        self._signal(signal.SIGINT)
        self._wait(_SAVE_SECONDS)
        print("stopping: the ranks save and end (a second Ctrl-C kills them)", file=sys.stderr, flush=True)

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
    events.put(_Exit(rank, process.wait()))


def _report(run: _Run, labels: Sequence[str]) -> int:
    """Print one line on why the ranks failed, if they did; returns the exit code."""
    again = "run the same command again to resume from the last checkpoint"
    code, line = 0, ""
    if run.failed is not None:
        code, line = _cause(run.failed, labels, run, again)
    if run.interrupted and (run.failed is None or run.failed.code in _SIGNALLED):
        code, line = INTERRUPTED, f"interrupted; {again}"
        if run.stuck:
            names = ", ".join(labels[rank] for rank in run.stuck)
            line = f"interrupted; {names} did not end within {_SAVE_SECONDS:.0f} s, and all ranks were killed; {again}"
    if line:
        print(line, file=sys.stderr, flush=True)
    return code


def _cause(failed: _Exit, labels: Sequence[str], run: _Run, again: str) -> tuple[int, str]:
    """The exit code and the message for a rank that failed."""
    label, log = labels[failed.rank], run.logs[failed.rank]
    where = f"all ranks ended; its last output is in {log.path}"
    if failed.code < 0:
        hint = _HINTS.get(-failed.code, "")
        what = f"{label} was killed by signal {-failed.code}{hint}"
        return WorkerError.exit_code, f"error: {what}; {where}; {again}"
    if 1 < failed.code < INTERRUPTED and (own := log.own_error()):
        return failed.code, own
    words = f" ({log.last_words()})" if log.last_words() else ""
    code = failed.code if failed.code in (1, INTERRUPTED) else WorkerError.exit_code
    return code, f"error: {label} ended with exit code {failed.code}{words}; {where}; {again}"


def _environment(env: Mapping[str, str], ranks: int, gpu_ids: Sequence[int | str] | None, port: int) -> dict[str, str]:
    """The environment that all ranks share."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }
    cores = len(os.sched_getaffinity(0))
    result = {
        "OMP_NUM_THREADS": str(
            max(1, cores // ranks)
        ),  # by default each rank would use all cores, and they would compete
        "PYTHONUNBUFFERED": "1",  # by default a killed rank loses its last output
        "PYTHONFAULTHANDLER": "1",
        **kept,
        **env,
        "PYTHONIOENCODING": "utf-8",  # of files and pipes that this process reads; the terminal may have another
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpu_ids or ())),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that GPUs are numbered as nvidia-smi does
        "DS_ACCELERATOR": "cpu" if gpu_ids is None else "cuda",
    }
    # Scripts of this environment, found by name.
    result["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), result.get("PATH", os.defpath)])
    if sys.flags.safe_path:
        result["PYTHONSAFEPATH"] = "1"
    return result


def _refuse_copies() -> None:
    for name in _SIZES:
        if os.environ.get(name, "1") != "1":
            raise UsageError(
                f"{name}={os.environ[name]}: started several times at once; start this command once (srun -n 1, "
                "sbatch --ntasks=1, no mpirun): it starts the ranks itself"
            )


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
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) != signal.SIG_IGN:  # nohup has it ignored
            before[each] = signal.signal(each, handler)
    try:
        yield events
    finally:
        for each, old in before.items():
            signal.signal(each, old)
