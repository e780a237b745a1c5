"""The Slurm job that this process runs in: its nodes, tasks and GPUs, from the environment and scontrol."""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megazh.errors import UsageError

_SECONDS = 30.0
_REAL_STEPS = 0xFFFFFFF0  # above are batch scripts, interactive shells and the like (slurm.h: SLURM_BATCH_SCRIPT ...)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_COUNTS = re.compile(r"(\d{1,6})(?:\(x(\d{1,6})\))?")
_DETAIL = re.compile(r"^ +Nodes=(\S+) CPU_IDs=\S+ Mem=\d+ GRES=(\S*)$", re.MULTILINE)
_GPU = re.compile(r"(?:^|,)gpu(?::[^:,()]+)?:(\d{1,4})(?=\(|,|$)")


@dataclass(frozen=True)
class Node:
    """What a job has of one node."""

    name: str
    tasks: int
    cores: int
    gpus: int


@dataclass(frozen=True)
class SlurmJob:
    """A running job."""

    number: str
    """Its id."""
    nodes: tuple[Node, ...]
    """Its nodes; none in a step, whose variables are about the step."""
    in_step: bool
    """Whether this process is in a step of it that srun has started, and not in its batch script or shell."""

    @property
    def tasks(self) -> int:
        """Number of tasks on all nodes."""
        return sum(node.tasks for node in self.nodes)


def slurm_job(environ: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """The job that a process with this environment runs in; None where there is none.

    Raises:
        UsageError: Slurm's variables contradict each other, or scontrol does not know the job.
    """
    number = environ.get("SLURM_JOB_ID", "")
    if not number:
        return None
    if not number.isdecimal():
        raise UsageError(f"SLURM_JOB_ID={number}: no number of a job; unset it, or give --launcher local")
    step = environ.get("SLURM_STEP_ID", "")
    if step.isdecimal() and int(step) < _REAL_STEPS:
        return SlurmJob(number, (), in_step=True)
    nodes = _hostnames(environ.get("SLURM_JOB_NODELIST", ""))
    tasks = _counts("SLURM_TASKS_PER_NODE", environ, len(nodes))
    cores = _counts("SLURM_JOB_CPUS_PER_NODE", environ, len(nodes))
    gpus = _gpus(_scontrol("show", "job", "-d", number))
    return SlurmJob(
        number,
        tuple(Node(name, tasks[at], cores[at], gpus.get(name, 0)) for at, name in enumerate(nodes)),
        in_step=False,
    )


def _counts(name: str, environ: Mapping[str, str], nodes: int) -> list[int]:
    """Numbers by node such as `6(x2),3`."""
    text, found = environ.get(name, ""), list[int]()
    for part in text.split(","):
        match = _COUNTS.fullmatch(part)
        if match is None or len(found) > nodes:
            break
        found += [int(match[1])] * min(int(match[2] or 1), nodes + 1)
    if len(found) != nodes:
        raise UsageError(
            f"{name}={text}: no numbers for the {nodes} nodes of SLURM_JOB_NODELIST; call this in the job's own "
            "script, or give --launcher local"
        )
    return found


def _gpus(text: str) -> dict[str, int]:
    """GPUs by node, from the lines of `scontrol show job -d`."""
    found: dict[str, int] = {}
    for nodes, gres in _DETAIL.findall(text):
        count = sum(map(int, _GPU.findall(re.sub(r"\([^()]*\)", "", gres))))
        if count:
            found |= dict.fromkeys(_hostnames(nodes), count)
    return found


def _hostnames(nodelist: str) -> list[str]:
    """The names in a list such as `n[1-3,7]`."""
    names = _scontrol("show", "hostnames", nodelist).split() if nodelist else []
    if not names or not all(_NAME.fullmatch(name) for name in names):
        raise UsageError(f"the nodes of this Slurm job, {nodelist!r}, are no host names; give --launcher local")
    return names


def _scontrol(*words: str) -> str:
    command = ["scontrol", *words]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=True, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip()
        raise UsageError(
            f"{' '.join(command)}: {why}; this process seems to be in a Slurm job (SLURM_JOB_ID), which scontrol has "
            "to know: load Slurm's module, or give --launcher local"
        ) from None
