"""Launch the ranks of a job on this machine, and make them end together: all with success, or all at once.

It watches the ranks: when one dies, the others are ended; signals to stop are passed on to all.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megazh.cluster.launchers.child import RankProcess
from megazh.cluster.launchers.ending import Exit, report
from megazh.cluster.launchers.environment import environment_of_ranks, refuse_copies
from megazh.cluster.launchers.hang import blame, write_stacks
from megazh.cluster.launchers.ports import reserved_port
from megazh.cluster.launchers.rank_log import Output, RankLog
from megazh.cluster.launchers.supervisor import SAVE_SECONDS, Events, Ranks, signals, supervise
from megazh.console import CONSOLE_LOG, open_console
from megazh.run.pulse import Pulses
from megazh.training.job import Job
from megazh.training.startup import start_times

_ATTEMPTS = 3  # attempts to find a port that nobody takes before rank 0 listens on it


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
    with open_console() as console, signals() as events:
        console.outlive()
        for attempt in range(_ATTEMPTS):
            logs = [RankLog(log_folder / f"rank_{rank}.log") for rank in range(ranks)]
            with reserved_port() as port:
                environment = environment_of_ranks(env, ranks, gpu_ids, port)
                ending = supervise(_LocalRanks(arguments, environment, logs, labels), events, hang_seconds)
            if ending.failed is None or ending.reason or attempt + 1 == _ATTEMPTS or not _port_was_taken(logs[0]):
                break
        code, reason = report(ending, logs, labels, SAVE_SECONDS)
        at_end(code, reason)
        return code


def _port_was_taken(log: RankLog) -> bool:
    """Whether rank 0, whose log this is, failed because another program has its port."""
    return any("EADDRINUSE" in line for line in log.tail())


class _LocalRanks(Ranks):
    """Ranks that are children of this process."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], logs: Sequence[RankLog], labels: Sequence[str]
    ) -> None:
        self.logs, self.labels = logs, list(labels)
        self.alive: set[int] = set()
        self.pulses: Pulses = Pulses(len(logs))
        self._arguments, self._environment = arguments, environment
        self._output = Output("stdout")  # of rank 0
        self._processes: dict[int, RankProcess] = {}

    def start(self, events: Events) -> None:
        for rank, log in enumerate(self.logs):
            self._processes[rank] = RankProcess(
                rank,
                self._arguments,
                {**self._environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                log,
                self._output.descriptor if rank == 0 else None,
                self.pulses.descriptor,
                events.put,
            )
            self.alive.add(rank)

    def poll(self) -> None:
        self._output.show()
        self.logs[0].show()

    def ended(self, event: Exit, was_killed: bool) -> Exit:
        self._processes[event.rank].note_end(event, was_killed)
        return event

    def signal(self, number: signal.Signals) -> None:
        for rank in self.alive:
            self._processes[rank].signal(number)

    def explain(self) -> str:
        living = {rank: pid for rank in self.alive if (pid := self._processes[rank].living) is not None}
        stacks = write_stacks({pid: self.logs[rank] for rank, pid in living.items()})
        pulses = self.pulses.read()
        return blame({rank: (stacks[pid], pulses[rank]) for rank, pid in living.items()}, self.labels)

    def kill(self) -> None:
        for rank in self.alive:
            self._processes[rank].kill()

    def close(self) -> None:
        self._output.close()
        self.pulses.close()
        for process in self._processes.values():
            process.close()
