"""MPI ranks as workers: started by `mpirun` or `srun`, rank 0 hands out the tasks and works as well.

MPI is imported only where a launcher started more than one rank. A rank that dies is noticed by the file that it
touches every few seconds in the build folder, since not every launcher ends the others.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megazh.errors import MegazhError, UsageError, WorkerError
from megazh.index.piece import Result, Setup, Task, Worker

_POLL_SECONDS = 0.001
_BEAT_SECONDS = 2.0
_SILENT_SECONDS = 60.0
_AHEAD = 2

_LAUNCHERS = (
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI (mpirun or srun)", "PMI_RANK", "PMI_SIZE"),
    # SLURM_PROCID and SLURM_NTASKS are also set in the batch shell, where there is only one process;
    # SLURM_STEP_NUM_TASKS is set in a step alone. mpirun's own daemons are a step: so this comes last.
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


@dataclass(frozen=True)
class World:
    """This rank among all; `comm` is an `mpi4py` communicator."""

    rank: int
    size: int
    comm: Any


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int, str]:
    """(rank, size, launcher) as the launcher's variables tell it; (0, 1, "") without one."""
    for launcher, rank, size in _LAUNCHERS:
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size]), launcher
    return 0, 1, ""


def join_world() -> World | None:
    """Join the other ranks, or None where this process is alone.

    Raises:
        UsageError: a launcher started several ranks, but MPI is missing or sees another number of them.
    """
    rank, size, launcher = launched()
    if size == 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, an MPI library is not
        why = str(error).splitlines()[0]
        raise UsageError(
            f"{launcher} started this as rank {rank} of {size}, but MPI cannot be loaded ({why}); install the extra "
            "'mpi' (bash jobs/setup.sh --mpi), or use --workers"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.size != size:
        raise UsageError(
            f"{launcher} started {size} ranks, MPI sees {comm.size}: this mpirun is not of the MPI library that mpi4py "
            "loads, or srun needs another --mpi (srun --mpi=list; MPICH: pmi2, Open MPI: pmix)"
        )
    return World(comm.rank, comm.size, comm)


@dataclass(frozen=True)
class _Stop:
    """The order to end, with the exit code."""

    code: int


class _Heartbeat:
    """Touches this rank's file every few seconds, and tells which other ranks have fallen silent."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._mine = folder / f"rank-{rank}"
        self._seen: dict[int, tuple[float, float]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        threading.Thread(target=self._run, daemon=True).start()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the folder is gone: the build is over
            self._mine.write_text(str(time.time_ns()))

    def _run(self) -> None:
        while self._folder.exists():
            self._beat()
            time.sleep(_BEAT_SECONDS)

    def silent(self, rank: int) -> bool:
        """Whether the file of `rank` has not changed for a minute, by this machine's clock."""
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
    """Let rank 0 check something before the work begins; where it fails, all ranks end with its exit code.

    Raises:
        MegazhError: on rank 0, what `check` raised.
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
    """All ranks of the world; rank 0 works in a thread of its own while it hands out tasks.

    Args:
        world: the ranks; this one is rank 0.
        folder: of the build, on a file system that all ranks share.
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

    def run(self, setup: Setup, tasks: Iterator[Task]) -> Iterator[Result]:
        out = dict.fromkeys(range(self.workers), 0)
        try:
            yield from self._run(setup, tasks, out)
        except WorkerError:
            raise
        except BaseException:  # given up: what is under way must not pass for an answer to what comes next
            for _ in self._run(setup, iter(()), out):
                pass
            raise

    def _run(self, setup: Setup, tasks: Iterator[Task], out: dict[int, int]) -> Iterator[Result]:
        more = True
        while more or any(out.values()):
            while more and min(out.values()) < _AHEAD:
                rank = min(out, key=out.__getitem__)
                task = next(tasks, None)
                if task is None:
                    more = False
                    break
                out[rank] += 1
                if rank == 0:
                    self._own.put((setup, task))
                else:
                    self._send((setup, task), rank)
            for rank, answer in self._answers():
                out[rank] -= 1
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
            silent = next((rank for rank in range(1, self.workers) if out[rank] and self._heartbeat.silent(rank)), None)
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
        """Send the other ranks home; they end with `code`."""
        for rank in range(1, self.workers):
            self._send(_Stop(code), rank)
        deadline = time.monotonic() + 2 * _SILENT_SECONDS
        while self._sends and time.monotonic() < deadline:
            self._sends = [request for request in self._sends if not request.Test()]
            for _ in self._answers():  # whoever still works must be able to send, to come to its next message
                pass
            time.sleep(_POLL_SECONDS)
        if self._sends:
            abort(self._world, code or 1)


def serve(world: World, folder: Path) -> NoReturn:
    """What every rank but 0 does: tasks, until it is sent home."""
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
    world.comm.Abort(code)
    raise SystemExit(code)
