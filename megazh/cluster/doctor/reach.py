"""The processes on the hosts of an examination, started by srun or ssh, and the messages that they send."""

import contextlib
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from megazh.cluster.doctor.messages import Assembler
from megazh.cluster.hostfile import is_this_machine, read_hostfile
from megazh.errors import UsageError

_LABELED = re.compile(r"\s*(\d+): (.*)")
_LONGEST_LINE = 1 << 16
_AGENT = ("-P", "-m", "megazh", "doctor", "--agent")
_NOT_OF_A_STEP = re.compile(
    r"SLURM_(N?TASKS\w*|NPROCS|CPUS_PER_TASK|GPUS_PER_TASK|TRES_PER_TASK|MEM_PER_\w+|DISTRIBUTION)"
)
_END_SECONDS = 10.0


class Message(NamedTuple):
    """Message of a host, or the end of its process (`kind` is `end`)."""

    host: int
    kind: str
    value: dict[str, Any]


class Program(NamedTuple):
    """A command that reaches one host, or several by srun."""

    command: list[str]
    hosts: range
    """Numbers of the hosts that it reaches."""
    environment: dict[str, str] | None = None


def by_srun(environment: Mapping[str, str] = os.environ) -> tuple[list[Program], list[str]]:
    """The srun that reaches each node of this Slurm job; and the name that each host has until it says its own.

    Raises:
        UsageError: this is no Slurm job.
    """
    if not environment.get("SLURM_JOB_ID"):
        raise UsageError(
            "--srun: not inside of a Slurm job; ask for nodes first: salloc -N 2 --gres=gpu:6 megazh doctor --srun"
        )
    nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or ""
    if not nodes.isascii() or not nodes.isdigit() or not 1 <= int(nodes) <= 4096:
        raise UsageError(
            f"--srun: SLURM_JOB_NUM_NODES={nodes!r} is no number of nodes; start it in a job of sbatch or salloc"
        )
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--label"]
    command += ["--kill-on-bad-exit=0", "--mpi=none", "--quiet", sys.executable, *_AGENT]
    kept = {name: value for name, value in environment.items() if not _NOT_OF_A_STEP.fullmatch(name)}
    return [Program(command, range(int(nodes)), kept)], [f"node {number} of the job" for number in range(int(nodes))]


def by_ssh(hostfile: Path) -> tuple[list[Program], list[str]]:
    """The ssh that reaches each host of a hostfile, without a password; and their names.

    Raises:
        UsageError: the hostfile cannot be read.
    """
    programs = []
    hosts = read_hostfile(hostfile)
    for number, host in enumerate(hosts):
        own = [sys.executable, *_AGENT]
        if not is_this_machine([host]):
            handed = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _is_handed_on(name)]
            # ssh joins its words with blanks for the other host's shell.
            words = shlex.join(["env", *handed, *own])
            own = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", host.name, words]
        programs.append(Program(own, range(number, number + 1)))
    return programs, [host.name for host in hosts]


def _is_handed_on(name: str) -> bool:
    return name in ("PYTHONPATH", "MEGAZH_CACHE") or name.startswith("NCCL_")


class Reached:
    """Running programs on all hosts; they are ended when the `with` block ends.

    Args:
        programs: what reaches the hosts.
    """

    def __init__(self, programs: Sequence[Program]) -> None:
        self._programs = programs
        self._processes: list[subprocess.Popen[bytes]] = []
        self._messages: queue.Queue[Message] = queue.Queue()

    def __enter__(self) -> Self:
        try:
            for program in self._programs:
                process = subprocess.Popen(
                    program.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=program.environment,
                    start_new_session=True,
                )
                self._processes.append(process)
                threading.Thread(target=self._listen, args=(program, process), daemon=True).start()
        except OSError as error:
            self._end()
            raise UsageError(f"{self._programs[0].command[0]} cannot be started: {error.strerror or error}") from None
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def tell(self, value: dict[str, Any]) -> None:
        """Send an object to all hosts."""
        line = json.dumps(value).encode() + b"\n"
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError, ValueError):  # it has ended; its end is a message
                process.stdin.write(line)
                process.stdin.flush()

    def next(self, seconds: float) -> Message | None:
        """The next message; None if there is none in so many seconds."""
        with contextlib.suppress(queue.Empty):
            return self._messages.get(timeout=max(seconds, 0.0))
        return None

    def _listen(self, program: Program, process: subprocess.Popen[bytes]) -> None:
        last: list[str] = []
        reading = threading.Thread(target=_last_line, args=(process.stderr, last), daemon=True)
        reading.start()
        assemblers = {host: Assembler() for host in program.hosts}
        assert process.stdout is not None
        while raw := process.stdout.readline(_LONGEST_LINE):
            line, host = raw.decode(errors="replace"), program.hosts.start
            if len(program.hosts) > 1 or program.command[0] == "srun":
                match = _LABELED.match(line)
                if match is None or int(match[1]) not in assemblers:
                    continue
                host, line = int(match[1]), match[2]
            if (message := assemblers[host].add(line)) is not None:
                self._messages.put(Message(host, *message))
        code = process.wait()
        reading.join(1)
        why = last[-1] if last else f"{program.command[0]} ended with exit code {code}"
        for host in program.hosts:
            self._messages.put(Message(host, "end", {"why": why}))

    def _end(self) -> None:
        for process in self._processes:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()  # the hosts end by themselves when they see that
        end = time.monotonic() + _END_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, min(1.0, end - time.monotonic())))
                continue
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(1.0, end - time.monotonic()))
                    break


def _last_line(stream: IO[bytes] | None, last: list[str]) -> None:
    """Keep the last line of a stream that is not empty."""
    assert stream is not None
    while raw := stream.readline(_LONGEST_LINE):
        if line := raw.decode(errors="replace").strip():
            last[:] = [line]
