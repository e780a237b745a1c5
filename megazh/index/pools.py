"""Who does the tasks of a build: this process, some worker processes, or MPI ranks (`megazh.index.mpi`)."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Protocol

from megazh.errors import WorkerError
from megazh.index.piece import Result, Setup, Task, Worker

_AHEAD = 2  # tasks that lie ready for each worker, so that none waits for the next


class Pool(Protocol):
    """Does tasks; results come in any order."""

    workers: int

    def run(self, setup: Setup, tasks: Iterator[Task]) -> Iterator[Result]:
        """Do all tasks; they are taken from the iterator only as there is room for them.

        Raises:
            WorkerError: a worker died.
        """
        ...

    def close(self, code: int = 0) -> None:
        """Let the workers go; ranks end with this exit code."""
        ...


class InlinePool:
    """This process alone."""

    workers = 1

    def __init__(self) -> None:
        self._worker = Worker()

    def run(self, setup: Setup, tasks: Iterator[Task]) -> Iterator[Result]:
        for task in tasks:
            yield self._worker.run(setup, task)

    def close(self, code: int = 0) -> None:
        pass


class ProcessPool:
    """Worker processes on this machine; they end when this process does, however it ends."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(workers, context, initializer=_begin)

    def run(self, setup: Setup, tasks: Iterator[Task]) -> Iterator[Result]:
        pending: set[Future[Result]] = set()
        try:
            for task in tasks:
                with _without_interrupts():  # submitting may start a worker, which must not see Ctrl-C
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
        self._executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold SIGINT back; a process that is started here never gets one.

    The mask is what it inherits. It holds for this thread only: the handler is for a signal that another thread takes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


_worker: Worker | None = None


def _begin() -> None:
    """In a new worker process: end when the parent ends (Ctrl-C is held back, and left to the parent)."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(setup: Setup, task: Task) -> Result:
    global _worker
    _worker = _worker or Worker()
    return _worker.run(setup, task)
