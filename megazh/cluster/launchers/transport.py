"""Programs that start ranks on other hosts: what a launcher has to know of one, and how ranks find their slots.

A new one is a class below `Transport` in a file of its own, its line in `slot_of`, and its place in
`megazh.cluster.launchers.choose`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from megazh.errors import UsageError
from megazh.training.job import Job, Launcher


class Transport(ABC):
    """A program that starts `python -P -m megazh rank RUN --started-by NAME --attempt ID` in each slot of a job.

    Attributes:
        name: the launcher that it stands for.
    """

    name: Launcher

    @abstractmethod
    def command(self, job: Job, attempt: str) -> list[str]:
        """The command that starts the ranks.

        Args:
            job: the job.
            attempt: id of the attempt.

        Raises:
            UsageError: it cannot work here.
        """

    def environment(self, job: Job) -> dict[str, str]:
        """The whole environment of the command: by default this process's, and the job's own variables."""
        return {**os.environ, **job.environment}

    def prepare(self, job: Job) -> None:  # noqa: B027
        """Check, before ranks are started, what needs time or the network; by default nothing.

        Raises:
            UsageError: the ranks cannot be started there.
        """

    def fault(self, text: str) -> str:
        """What the program's output tells of ranks that will not come while the program waits for the others; empty by
        default, and where it tells nothing.

        Args:
            text: what it has written.
        """
        return ""


def rank_arguments(job: Job, starter: Launcher, attempt: str) -> list[str]:
    """Arguments of the Python interpreter in each slot."""
    return ["-P", "-m", "megazh", *job.arguments, "--started-by", starter.value, "--attempt", attempt]


def slot_of(starter: Launcher, environ: Mapping[str, str], slots: Sequence[int]) -> int:
    """The slot that this process was started in.

    Args:
        starter: the program that has started it.
        environ: its environment.
        slots: number of slots of each host.

    Raises:
        UsageError: the program has left no number there, or one that no slot has.
    """
    if starter is Launcher.SRUN:
        # Not SLURM_PROCID, whose order depends on --distribution.
        host, local = _number(environ, "SLURM_NODEID"), _number(environ, "SLURM_LOCALID")
        if host >= len(slots) or local >= slots[host]:
            raise UsageError(f"srun started task {local} on node {host} of {len(slots)}, which has no slot for it")
        return sum(slots[:host]) + local
    slot = _number(environ, *(("RANK",) if starter is Launcher.DEEPSPEED else ("OMPI_COMM_WORLD_RANK", "PMI_RANK")))
    if slot >= sum(slots):
        raise UsageError(f"{starter.value} started rank {slot}, and there are {sum(slots)} slots")
    return slot


def _number(environ: Mapping[str, str], *names: str) -> int:
    for name in names:
        if (text := environ.get(name, "")).isdecimal() and len(text) < 8:
            return int(text)
    raise UsageError(f"{' or '.join(names)} is no number in the environment of a rank: launchers start ranks")
