"""Start the ranks of a run on this machine, and see to it that they end together: all well, or all at once."""

import contextlib
import math
import os
import queue
import re
import shlex
import shutil
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

from megazh.cluster.hostfile import Host
from megazh.cluster.rank_log import RankLog
from megazh.errors import INTERRUPTED, UsageError, WorkerError

_ATTEMPTS = 3  # at finding a port that nobody takes before rank 0 listens on it
_SAVE_SECONDS = 900.0  # a step of a large model, and gigabytes to a slow disk; a second Ctrl-C does not wait
_OTHERS_SECONDS = 30.0  # ranks end together: one that has ended well tells that the others are about to
_END_SECONDS = 5.0
_KILL_SECONDS = 30.0  # a process in the middle of a driver call can outlive SIGKILL for a while
_POLL_SECONDS = 0.1

# The kernel kills a rank when the launcher's end, however that comes. A program of its own between the two, since
# nothing but exec is safe between fork and exec in a process with threads; the setting survives exec. A launcher that
# runs in the background of a script has SIGINT ignored, and ranks must not inherit that.
_BOOTSTRAP = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""

# What other launchers say about this process; a rank that reads it takes itself for another one.
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

_ASKED = (-signal.SIGINT, -signal.SIGTERM)  # ends of a process that was asked to end, and did not get to save
_HINTS: dict[int, str] = {signal.SIGKILL: " (out of memory?)", signal.SIGBUS: " (is /dev/shm full?)"}


def run_local(
    arguments: Sequence[str],
    ranks: int,
    env: Mapping[str, str],
    gpu_ids: Sequence[int | str] | None,
    log_folder: Path,
    labels: Sequence[str] | None = None,
) -> int:
    """Run `ranks` processes `python ARGUMENTS` on this machine until all have ended; returns the exit code.

    A rank finds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torch.distributed
    wants them. Rank 0 has this process's stdout, and its stderr is copied to this process's. The stderr of each rank,
    and the stdout of each but rank 0, are appended to LOG_FOLDER/rank_N.log.

    When a rank fails, the others get SIGTERM and, after 5 s, SIGKILL, and one line on stderr says which was the first
    and why: the rank's own line `error: ...` where its exit code is one of those of megazh's errors. The first Ctrl-C
    (SIGINT; SIGTERM and SIGHUP count as well) sends SIGINT to all ranks, which have 15 minutes to save and to end; the
    second kills them. Nothing of the ranks outlives this process, even where it is killed itself.

    Args:
        env: added to this process's environment.
        gpu_ids: what the ranks see as CUDA devices 0, 1 and so on: numbers as nvidia-smi counts, or UUIDs. None: CPU.
        labels: what to call the ranks in messages, such as `rank 1 (stage 1)`.

    Returns:
        0: all ranks ended with 0. 130: stopped by Ctrl-C. Else the code for what the first rank that failed died of;
        see `megazh.errors`.

    Raises:
        UsageError: this process is itself one of several that srun or mpirun started.
    """
    _refuse_copies()
    log_folder.mkdir(parents=True, exist_ok=True)
    labels = labels or [f"rank {rank}" for rank in range(ranks)]
    with _signals() as events:
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
    """A TCP port of this machine that nothing listens on at the moment."""
    with _reserved_port() as port:
        return port


def deepspeed_command(
    hostfile: Path, hosts: Sequence[Host], slots: Sequence[int] | None, port: int, arguments: Sequence[str]
) -> list[str]:
    """The command by which DeepSpeed's launcher runs `python -m megazh ARGUMENTS` on several hosts, one rank a slot.

    It reaches the hosts by ssh without a password, through pdsh, and needs this folder and this Python under the same
    paths on each. Ranks find RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment.

    Args:
        hosts: what `hostfile` holds; see `megazh.cluster.hostfile.read_hostfile`.
        slots: the GPUs to use on each host, as nvidia-smi counts them; None: all slots.
        port: a port that is free on the first host.

    Raises:
        UsageError: a host has not the slots; pdsh is missing.
    """
    for host in hosts:
        missing = [slot for slot in slots or () if slot >= host.slots]
        if missing:
            raise UsageError(
                f"-g {','.join(map(str, missing))}: host {host.name} has slots 0 to {host.slots - 1} ({hostfile})"
            )
    if shutil.which("pdsh") is None:
        raise UsageError(
            f"-H {hostfile}: several hosts are reached through pdsh, which is not installed (Debian, Ubuntu: "
            "apt-get install pdsh)"
        )
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    if slots is not None:
        command += ["--include", "@".join(f"{host.name}:{','.join(map(str, slots))}" for host in hosts)]
    # Without --force_multi a single host, whichever it is, would be taken for this machine.
    command += ["--force_multi", "--master_port", str(port), "--no_local_rank", "--module", "megazh"]
    return command + [_for_remote_shell(argument) for argument in arguments]


def _for_remote_shell(argument: str) -> str:
    """Quote an argument for the shells of the hosts; DeepSpeed does that for those with a space, and not all of it."""
    return re.sub(r"([\\$`])", r"\\\1", argument) if " " in argument else shlex.quote(argument)


class _Exit(NamedTuple):
    rank: int
    code: int
    """Negative: the signal that ended it."""


_Events = queue.SimpleQueue[_Exit | signal.Signals]


class _Run:
    """The ranks, started together."""

    def __init__(self, arguments: list[str], environment: dict[str, str], logs: list[RankLog]) -> None:
        self._arguments, self._environment = arguments, environment
        self.logs = logs
        self.failed: _Exit | None = None
        self.interrupted = False
        self.stuck: list[int] = []
        """Ranks that did not end when they were asked to."""
        self._alive: dict[int, subprocess.Popen[bytes]] = {}
        self._deadline: float | None = None
        self._killed = False

    def watch(self, events: _Events) -> None:
        """Start the ranks, and return when all have ended."""
        try:
            for rank in range(len(self.logs)):
                self._start(rank, events)
            while self._alive:
                self.logs[0].show()
                with contextlib.suppress(queue.Empty):
                    event = events.get(timeout=_POLL_SECONDS)
                    if isinstance(event, _Exit):
                        self._ended(event)
                    else:
                        self._interrupt()
                if self._deadline is not None and time.monotonic() > self._deadline:
                    if self._killed:
                        break
                    self.stuck = sorted(self._alive)
                    self._kill()
        finally:
            self._kill()
            self.logs[0].show()

    def port_was_taken(self) -> bool:
        """Whether rank 0 found that another program has its port."""
        return any("EADDRINUSE" in line for line in self.logs[0].tail())

    def _start(self, rank: int, events: _Events) -> None:
        environment = {**self._environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        bootstrap = [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, str(os.getpid())]
        with open(self.logs[rank].path, "ab") as log:
            process = subprocess.Popen(
                [*bootstrap, sys.executable, *self._arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the launcher alone, and a rank's children can be ended with it
            )
        self._alive[rank] = process
        # A thread each, not a loop that polls: what counts is who died first.
        threading.Thread(target=_await, args=(rank, process, events), daemon=True).start()

    def _ended(self, event: _Exit) -> None:
        del self._alive[event.rank]
        well = event.code == 0 or (event.code == INTERRUPTED and self.interrupted)
        if self.interrupted and self.failed is None and not self._killed:
            self._deadline = min(self._deadline or math.inf, time.monotonic() + _OTHERS_SECONDS)
        if not well and not self._killed and self.failed is None:
            self.failed = event
            self.logs[0].show()
            self.logs[0].hide()
            for process in self._alive.values():
                process.send_signal(signal.SIGTERM)
            self._wait(_END_SECONDS)

    def _interrupt(self) -> None:
        if self.failed is not None and self.failed.code in _ASKED and not self.interrupted:
            self.interrupted = True  # the ranks got the signal, too, and were quicker: Slurm sends it to all processes
            return
        if self.interrupted or self.failed is not None:
            self._kill()
            return
        self.interrupted = True
        print("stopping: the ranks save and end (a second Ctrl-C kills them)", file=sys.stderr, flush=True)
        for process in self._alive.values():
            process.send_signal(signal.SIGINT)
        self._wait(_SAVE_SECONDS)

    def _kill(self) -> None:
        self._killed = True
        for process in self._alive.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self._wait(_KILL_SECONDS)

    def _wait(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds


def _await(rank: int, process: subprocess.Popen[bytes], events: _Events) -> None:
    """Wait for the end of a rank, end what it has left behind, and tell."""
    # Not reaped yet, the process keeps the number of its group from being given to another.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    events.put(_Exit(rank, process.wait()))


def _report(run: _Run, labels: Sequence[str]) -> int:
    """Say in one line why the ranks ended, where they did not end well; returns the exit code."""
    again = "run the same command again to go on from the last checkpoint"
    code, line = 0, ""
    if run.failed is not None:
        code, line = _cause(run.failed, labels, run, again)
    if run.interrupted and (run.failed is None or run.failed.code in _ASKED):
        code, line = INTERRUPTED, f"interrupted; {again}"
        if run.stuck:
            names = ", ".join(labels[rank] for rank in run.stuck)
            line = f"interrupted; {names} did not end within {_SAVE_SECONDS:.0f} s, and all ranks were killed; {again}"
    if line:
        print(line, file=sys.stderr, flush=True)
    return code


def _cause(failed: _Exit, labels: Sequence[str], run: _Run, again: str) -> tuple[int, str]:
    """The exit code and the line for a rank that failed."""
    label, log = labels[failed.rank], run.logs[failed.rank]
    where = f"all ranks ended; its last words are in {log.path}"
    if failed.code < 0:
        hint = _HINTS.get(-failed.code, "")
        what = f"{label} was killed by signal {-failed.code}{hint}"
        return WorkerError.exit_code, f"error: {what}; {where}; {again}"
    if UsageError.exit_code <= failed.code <= WorkerError.exit_code and (own := log.own_error()):
        return failed.code, own
    words = f" ({log.last_words()})" if log.last_words() else ""
    code = failed.code if failed.code in (1, INTERRUPTED) else WorkerError.exit_code
    return code, f"error: {label} ended with exit code {failed.code}{words}; {where}; {again}"


def _environment(env: Mapping[str, str], ranks: int, gpu_ids: Sequence[int | str] | None, port: int) -> dict[str, str]:
    """What all ranks have in their environment."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }
    cores = len(os.sched_getaffinity(0))
    result = {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),  # else each rank takes all cores, and they take turns
        "PYTHONUNBUFFERED": "1",  # else a rank that is killed takes its last words along
        "PYTHONFAULTHANDLER": "1",
        **kept,
        **env,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpu_ids or ())),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that numbers are those of nvidia-smi
        "DS_ACCELERATOR": "cpu" if gpu_ids is None else "cuda",
    }
    # Ninja, which compiles DeepSpeed's operators, lies beside the interpreter.
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
    """A port that the kernel gives to nobody who leaves the choice to it; rank 0 can listen on it all the same."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@contextlib.contextmanager
def _signals() -> Iterator[_Events]:
    """Turn the signals that ask for an end into events."""
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
