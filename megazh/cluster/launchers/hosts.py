"""Launch the ranks of a job on several hosts, by DeepSpeed's launcher through pdsh and ssh."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megazh.cluster.hostfile import Host, read_hostfile
from megazh.cluster.launchers.ports import free_port
from megazh.cluster.launchers.rank_log import Output
from megazh.console import CONSOLE_LOG, open_console
from megazh.errors import INTERRUPTED, REQUEUE, DivergedError, SaveError, UsageError, WorkerError
from megazh.training.control import SIGNALS, Reason, is_ignored
from megazh.training.job import Job

_POLL_SECONDS = 0.1
_OF_RANKS = (UsageError.exit_code, DivergedError.exit_code, SaveError.exit_code, REQUEUE, INTERRUPTED)
"""Exit codes of ranks, which DeepSpeed's launcher returns and this one passes on. The ranks have printed the reason:
the same command would fail again, or they have saved and stopped."""


def launch(job: Job) -> int:
    """Run DeepSpeed's launcher to its end; returns the exit code.

    It decides how its ranks end: on a signal, which it gets as SIGINT, they do not get to save. The exit code is
    that of the signal's reason nevertheless.

    Raises:
        UsageError: as `command`.
    """
    with open_console() as console:
        console.log_to(job.run.logs / CONSOLE_LOG)
        code, reason = _run(command(job))
        job.run.end(code, reason)
        return code


def _run(command: list[str]) -> tuple[int, str]:
    """Run DeepSpeed's launcher; returns the exit code and the reason."""
    # Not the terminal itself: DeepSpeed's launcher and pdsh would end where it is gone.
    out, err = Output("stdout"), Output("stderr")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # DeepSpeed hands PYTHON* on to the hosts
    process = subprocess.Popen(command, stdout=out.descriptor, stderr=err.descriptor, env=environment)
    reason = Reason.NONE

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal reason
        reason = max(reason, SIGNALS[signal.Signals(number)])
        process.send_signal(signal.SIGINT)  # then wait: this process holds the lock of the run folder

    before = {each: signal.signal(each, forward) for each in SIGNALS if not is_ignored(each)}
    try:
        code = None
        while code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(_POLL_SECONDS)
            out.show()
            err.show()
    finally:
        out.close()
        err.close()
        for each, handler in before.items():
            signal.signal(each, handler)
    again = "run the same command again to resume from the last checkpoint"
    if not code:
        return 0, "done"
    if reason:
        code, line = reason.exit_code, f"{'interrupted' if reason is Reason.PERSON else reason.text}; {again}"
    elif code in _OF_RANKS:
        return code, f"the ranks ended with exit code {code}, and have printed why"
    else:
        line = f"error: DeepSpeed's launcher ended with exit code {code}; the output of the ranks is above; {again}"
        code = WorkerError.exit_code
    print(line, file=sys.stderr, flush=True)
    return code, reason.text or line


def command(job: Job) -> list[str]:
    """The command that launches a job on the hosts of its hostfile; see `deepspeed_command`."""
    assert job.hostfile is not None
    slots = None if job.devices.ids is None else [int(slot) for slot in job.devices.ids]
    return deepspeed_command(job.hostfile, read_hostfile(job.hostfile), slots, free_port(), job.arguments)


def deepspeed_command(
    hostfile: Path, hosts: Sequence[Host], slots: Sequence[int] | None, port: int, arguments: Sequence[str]
) -> list[str]:
    """The command by which DeepSpeed's launcher runs `python -m megazh ARGUMENTS` on several hosts, one rank per slot.

    It reaches the hosts by ssh without a password, through pdsh, and needs this folder and this Python under the same
    paths on each. Ranks find RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment.

    Args:
        hostfile: the file that DeepSpeed reads.
        hosts: the hosts in it; see `megazh.cluster.hostfile.read_hostfile`.
        slots: GPUs to use on each host, as nvidia-smi numbers them; None: all slots.
        port: a port that is free on the first host.
        arguments: arguments of `megazh` in each rank.

    Raises:
        UsageError: a host lacks a slot, or pdsh is missing.
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
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    if slots is not None:
        words += ["--include", "@".join(f"{host.name}:{','.join(map(str, slots))}" for host in hosts)]
    # Without --force_multi DeepSpeed takes a single host, whichever it is, for this machine.
    words += ["--force_multi", "--master_port", str(port), "--no_local_rank", "--module", "megazh"]
    return words + [_for_remote_shell(argument) for argument in arguments]


def _for_remote_shell(argument: str) -> str:
    """Quote an argument for the shells of the hosts; DeepSpeed quotes only those with a space, and not completely."""
    return re.sub(r"([\\$`])", r"\\\1", argument) if " " in argument else shlex.quote(argument)
