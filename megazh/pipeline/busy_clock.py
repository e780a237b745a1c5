"""The time that a rank computes in a step, without what it waits for others."""

import time
from typing import Any

import torch


class BusyClock:
    """Adds up the time between pairs of `start` and `stop`: by CUDA events on a GPU, by the wall clock on the CPU.

    On a GPU, an event behind a receive is reached once the data is there: the wait before it is not counted.

    Args:
        device: this rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._runs = False
        self._seconds = self._started = 0.0
        self._events: list[Any] = []

    def begin(self, runs: bool) -> None:
        """Begin a step at 0.

        Args:
            runs: whether it is timed; without, `start` and `stop` do nothing.
        """
        self._runs, self._seconds = runs, 0.0
        self._events.clear()

    def start(self) -> None:
        """Begin to compute."""
        if self._runs:
            if self._is_cuda:
                self._mark()
            else:
                self._started = time.perf_counter()

    def stop(self) -> None:
        """Compute no longer."""
        if self._runs:
            if self._is_cuda:
                self._mark()
            else:
                self._seconds += time.perf_counter() - self._started

    def end(self) -> float:
        """End the step; returns its seconds, 0 where it was not timed."""
        self._runs = False
        if not self._is_cuda:
            return self._seconds
        if self._events:
            self._events[-1].synchronize()
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        return sum(begun.elapsed_time(ended) for begun, ended in pairs) / 1e3

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
