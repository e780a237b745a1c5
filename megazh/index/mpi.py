"""MPI ranks as workers, started by `mpirun` or `srun`. Rank 0 hands out the tasks and works as well.

MPI is imported only if a launcher started more than one rank. Not every launcher ends the other ranks when one
dies, so each rank writes a heartbeat file in the build folder every few seconds; one that no longer changes is dead.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megazh.corpus.sources import Source
from megazh.errors import MegazhError, UsageError, WorkerError
from megazh.index.piece import Result, Setup, Task, Worker
from megazh.writing import writing

_POLL_SECONDS = 0.001
_BEAT_SECONDS = 2.0
_SILENT_SECONDS = 60.0  # a rank is taken for dead once its heartbeat file has not changed for so long
_FORWARD_SECONDS = 0.5  # for mpirun to forward what a rank has printed; it may drop the rest when a rank aborts
_AHEAD = 2  # tasks in flight per rank, so that none waits for its next one

_LAUNCHERS = (
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI (mpirun or srun)", "PMI_RANK", "PMI_SIZE"),
    # SLURM_PROCID and SLURM_NTASKS are also set in the batch shell, which is a single process;
    # SLURM_STEP_NUM_TASKS is set only within a step. mpirun starts its own daemons as a step, so srun comes last.
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


@dataclass(frozen=True)
class World:
    """All ranks, as seen from this one; `comm` is an `mpi4py` communicator."""

    rank: int
    size: int
    comm: Any


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int, str]:
    """(rank, size, launcher) from the launcher's environment variables; (0, 1, "") without a launcher."""
    for launcher, rank, size in _LAUNCHERS:
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size]), launcher
    return 0, 1, ""


def join_world() -> World | None:
    """Join the other ranks; returns None if this process is alone.

    Raises:
        UsageError: a launcher started several ranks, but MPI is missing or sees another number of ranks.
    """
    rank, size, launcher = launched()
    if size == 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is installed, but no MPI library is
        why = str(error).splitlines()[0]
        raise UsageError(
            f"{launcher} started this as rank {rank} of {size}, but MPI cannot be loaded ({why}); install the extra "
            "'mpi' (bash jobs/setup.sh --mpi), or use --workers"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.size != size:
        raise UsageError(
            f"{launcher} started {size} ranks, MPI sees {comm.size}: this mpirun does not belong to the MPI library "
            "that mpi4py loads, or srun needs another --mpi (srun --mpi=list; MPICH: pmi2, Open MPI: pmix)"
        )
    return World(comm.rank, comm.size, comm)


@dataclass(frozen=True)
class _Stop:
    """Message to a rank: end with this exit code."""

    code: int


class _Heartbeat:
    """Writes this rank's heartbeat file every few seconds, and watches those of other ranks."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._own_file = folder / f"rank-{rank}"
        self._seen: dict[int, tuple[float, float]] = {}  # by rank: modification time, and when it was first seen
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        threading.Thread(target=self._run, daemon=True).start()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the folder was deleted: the build is over
            self._own_file.write_text(str(time.time_ns()))

    def _run(self) -> None:
        while self._folder.exists():
            self._beat()
            time.sleep(_BEAT_SECONDS)

    def silent(self, rank: int) -> bool:
        """Whether the heartbeat file of `rank` has not changed for a minute by this machine's clock."""
        try:
            stamp = (self._folder / f"rank-{rank}").stat().st_mtime
        except OSError:
            stamp = -1.0
        now = time.monotonic()
        before = self._seen.get(rank)
        if before is None or before[0] != stamp:
            self._seen[rank] = (stamp, now)
            return False
        return now - before[1] > _SILENT_SECONDS


def agree(world: World, check: Callable[[], object]) -> None:
    """Let rank 0 run `check` before the work begins. If it fails, all ranks end with its exit code.

    Raises:
        MegazhError: on rank 0, the error of `check`.
    """
    if world.rank > 0:
        code = world.comm.bcast(None)
        if code:
            sys.exit(code)
        return
    try:
        check()
    except MegazhError as error:
        world.comm.bcast(error.exit_code)
        raise
    world.comm.bcast(0)


class MpiPool:
    """All MPI ranks as workers; rank 0 works in a second thread while it hands out tasks.

    Args:
        world: the ranks; this process is rank 0.
        folder: folder of the build, on a file system that all ranks share.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self.workers = world.size
        self._world = world
        self._heartbeat = _Heartbeat(folder / "ranks", 0)
        self._own: queue.SimpleQueue[tuple[Setup, Task]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
        self._sends: list[Any] = []
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        worker = Worker()
        while True:
            setup, task = self._own.get()
            try:
                self._results.put(worker.run(setup, task))
            except BaseException as error:
                self._results.put(error)

    def begin(self, sources: Sequence[Source]) -> None:
        pass

    def run(self, setup: Setup, tasks: Iterator[Task]) -> Iterator[Result]:
        in_flight = dict.fromkeys(range(self.workers), 0)
        try:
            yield from self._run(setup, tasks, in_flight)
        except WorkerError:
            raise
        except BaseException:
            # Drain the tasks in flight: the next run would take their results for its own.
            for _ in self._run(setup, iter(()), in_flight):
                pass
            raise

    def _run(self, setup: Setup, tasks: Iterator[Task], in_flight: dict[int, int]) -> Iterator[Result]:
        more = True
        while more or any(in_flight.values()):
            while more and min(in_flight.values()) < _AHEAD:
                rank = min(in_flight, key=in_flight.__getitem__)
                task = next(tasks, None)
                if task is None:
                    more = False
                    break
                in_flight[rank] += 1
                if rank == 0:
                    self._own.put((setup, task))
                else:
                    self._send((setup, task), rank)
            for rank, answer in self._answers():
                in_flight[rank] -= 1
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
            busy = (rank for rank in range(1, self.workers) if in_flight[rank])
            silent = next((rank for rank in busy if self._heartbeat.silent(rank)), None)
            if silent is not None:
                raise WorkerError(f"rank {silent} has been silent for {_SILENT_SECONDS:.0f} s; it seems to be dead")
            time.sleep(_POLL_SECONDS)

    def _answers(self) -> Iterator[tuple[int, Result | BaseException]]:
        while not self._results.empty():
            yield 0, self._results.get()
        for rank in range(1, self.workers):
            while self._world.comm.iprobe(source=rank):
                yield rank, self._world.comm.recv(source=rank)

    def _send(self, message: Any, rank: int) -> None:
        self._sends = [request for request in self._sends if not request.Test()]
        self._sends.append(self._world.comm.isend(message, rank))

    def close(self, code: int = 0) -> None:
        """Tell the other ranks to end with exit code `code`."""
        for rank in range(1, self.workers):
            self._send(_Stop(code), rank)
        deadline = time.monotonic() + 2 * _SILENT_SECONDS
        while self._sends and time.monotonic() < deadline:
            self._sends = [request for request in self._sends if not request.Test()]
            for _ in self._answers():  # receive: a rank reads its next message only after its result was taken
                pass
            time.sleep(_POLL_SECONDS)
        if self._sends:
            abort(self._world, code or 1)


def serve(world: World, folder: Path) -> NoReturn:
    """Do tasks on a rank other than 0, until rank 0 tells it to end."""
    worker = Worker()
    heartbeat = _Heartbeat(folder / "ranks", world.rank)
    comm = world.comm
    while True:
        while not comm.iprobe(source=0):
            if heartbeat.silent(0):
                print(f"rank {world.rank}: rank 0 is silent; it seems to be dead", file=sys.stderr, flush=True)
                abort(world, WorkerError.exit_code)
            time.sleep(_POLL_SECONDS)
        message = comm.recv(source=0)
        if isinstance(message, _Stop):
            sys.exit(message.code)
        setup, task = message
        try:
            answer: Result | BaseException = worker.run(setup, task)
        except (MegazhError, OSError) as error:
            answer = error
        comm.send(answer, 0)


def abort(world: World, code: int) -> NoReturn:
    """End all ranks at once."""
    time.sleep(_FORWARD_SECONDS)
    world.comm.Abort(code)
    raise SystemExit(code)
