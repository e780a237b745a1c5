"""Pools that do the tasks of a build: this process, or worker processes. For MPI ranks see `megazh.index.mpi`."""

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

_AHEAD = 2  # tasks in flight per worker, so that none waits for its next one


class Pool(Protocol):
    """Does the tasks of a build; results come in any order."""

    workers: int
    """Number of workers."""

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

    def run(self, setup: Setup, tasks: Iterator[Task]) -> Iterator[Result]:
        for task in tasks:
            yield self._worker.run(setup, task)

    def close(self, code: int = 0) -> None:
        pass


class ProcessPool:
    """Worker processes on this machine. They end when this process ends, even if it is killed."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)

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


_worker: Worker | None = None


def _end_with_parent() -> None:
    """Start a thread in a new worker process that ends it when the parent ends; Ctrl-C reaches only the parent."""
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
