"""Pools that do the tasks of a build: this process, or worker processes. For MPI ranks see `megazh.index.mpi`."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Protocol

from megazh.corpus.formats import Format
from megazh.corpus.sources import Source
from megazh.errors import WorkerError
from megazh.index.piece import Result, Setup, Task, Worker

_AHEAD = 2  # tasks in flight per worker, so that none waits for its next one
_TEXT_PER_WORKER = 8_000_000  # bytes


class Pool(Protocol):
    """Does the tasks of a build; results come in any order."""

    workers: int
    """Number of workers."""

    def begin(self, sources: Sequence[Source]) -> None:
        """Called once, before the first `run`, with all input files of the build."""
        ...

    def run(self, setup: Setup, tasks: Iterator[Task]) -> Iterator[Result]:
        """Do all tasks. A task is taken from the iterator only when a worker has room for it.

        Raises:
            WorkerError: a worker died.
        """
        ...

    def close(self, code: int = 0) -> None:
        """End the workers; MPI ranks exit with `code`."""
        ...


class InlinePool:
    """Does all tasks in this process."""

    workers = 1

    def __init__(self) -> None:
        self._worker = Worker()

    def begin(self, sources: Sequence[Source]) -> None:
        pass

    def run(self, setup: Setup, tasks: Iterator[Task]) -> Iterator[Result]:
        for task in tasks:
            yield self._worker.run(setup, task)

    def close(self, code: int = 0) -> None:
        pass


class ProcessPool:
    """Worker processes on this machine. They end when this process ends, even if it is killed.

    They are forked once this process has loaded the encoder: a fork takes milliseconds and shares the encoder's
    memory, while a new process takes one to two seconds of processor time to load one of its own. The encoders and
    the reading of text start no threads that a fork would lose. `InlinePool`'s way is taken for a single worker and
    for the trial of the fast encoder.

    Args:
        workers: number of workers; None chooses it by the size of the input (`workers_for`).
    """

    def __init__(self, workers: int | None = None) -> None:
        self._by_size = workers is None
        self.workers = workers or len(os.sched_getaffinity(0))
        self._worker = Worker()
        self._executor: ProcessPoolExecutor | None = None

    def begin(self, sources: Sequence[Source]) -> None:
        if self._by_size:
            self.workers = workers_for(sources, len(os.sched_getaffinity(0)))

    def run(self, setup: Setup, tasks: Iterator[Task]) -> Iterator[Result]:
        for first in tasks:
            if first.piece is None or self.workers == 1:
                yield self._worker.run(setup, first)
            else:
                self._worker.load(setup, first.fast)
                yield from self._run(setup, itertools.chain([first], tasks))

    def _run(self, setup: Setup, tasks: Iterator[Task]) -> Iterator[Result]:
        if self._executor is None:
            context = multiprocessing.get_context("fork")
            self._executor = ProcessPoolExecutor(self.workers, context, _begin_worker, (self._worker,))
        pending: set[Future[Result]] = set()
        try:
            for task in tasks:
                with _without_interrupts():  # the first submission starts the workers, which must not see Ctrl-C
                    pending.add(self._executor.submit(_run, setup, task))
                if len(pending) >= self.workers * _AHEAD:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise WorkerError(
                "a worker process died (killed, or out of memory?); finished pieces are kept: run the command again"
            ) from None
        finally:
            for future in pending:
                future.cancel()

    def close(self, code: int = 0) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


def workers_for(sources: Sequence[Source], cores: int) -> int:
    """Number of workers for an input: one for each 8 MB of text, at least one, at most one per core.

    The text of compressed files and of Parquet files is taken for four times their size.
    """
    size = sum(source.size * (4 if source.compression or source.format is Format.PARQUET else 1) for source in sources)
    return min(max(size // _TEXT_PER_WORKER, 1), cores)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block SIGINT; raise KeyboardInterrupt at the end if one arrived. A process started here never receives SIGINT.

    It inherits the signal mask. The mask covers only this thread, so the handler catches a SIGINT that the kernel
    delivers to another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if received:
        raise KeyboardInterrupt


_worker: Worker  # in a worker process


def _begin_worker(worker: Worker) -> None:
    """Set up a new worker process. A thread ends it when the parent ends; Ctrl-C reaches only the parent."""
    global _worker
    _worker = worker
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(setup: Setup, task: Task) -> Result:
    return _worker.run(setup, task)
