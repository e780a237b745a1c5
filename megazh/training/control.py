"""Requests to stop: why, and when the ranks have to know."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType

from megazh.errors import INTERRUPTED, REQUEUE


class Reason(IntEnum):
    """Why a run is stopped and saved before its end. Of several at once, the largest number counts.

    A person outranks a scheduler: what a person has stopped must not be started again by a machine. Errors, such as
    divergence (`megazh.errors.DivergedError`), are raised on all ranks alike, and are no request.
    """

    NONE = 0
    """Nobody has requested a stop."""
    DEADLINE = 1
    """This attempt has run for `control.max_hours`."""
    TIME_LIMIT = 2
    """SIGUSR1: a scheduler's time limit is near (`sbatch --signal=B:USR1@600`)."""
    TERMINATED = 3
    """SIGTERM: a scheduler takes the machine away (preemption), cancels the job, or shuts down."""
    HANG_UP = 4
    """SIGHUP: the terminal was closed."""
    PERSON = 5
    """SIGINT: Ctrl-C."""
    COMMAND = 6
    """`megazh ctl RUN stop`."""

    @property
    def exit_code(self) -> int:
        """Exit code of a run that this has stopped (see `megazh.errors`)."""
        return 0 if self is Reason.NONE else REQUEUE if self <= Reason.TERMINATED else INTERRUPTED

    @property
    def text(self) -> str:
        """Description for people, as run.json and the terminal have it."""
        return _TEXTS[self]


_TEXTS = {
    Reason.NONE: "",
    Reason.DEADLINE: "max_hours of this attempt are over",
    Reason.TIME_LIMIT: "the time limit is near (SIGUSR1)",
    Reason.TERMINATED: "terminated (SIGTERM)",
    Reason.HANG_UP: "the terminal was closed (SIGHUP)",
    Reason.PERSON: "interrupted (Ctrl-C)",
    Reason.COMMAND: "requested by 'megazh ctl'",
}

SIGNALS = {
    signal.SIGUSR1: Reason.TIME_LIMIT,
    signal.SIGTERM: Reason.TERMINATED,
    signal.SIGHUP: Reason.HANG_UP,
    signal.SIGINT: Reason.PERSON,
}
"""Signals that request a stop."""


def is_ignored(number: signal.Signals) -> bool:
    """Whether whoever has started this process wants a signal to be ignored: nohup for SIGHUP, and a script for SIGINT
    of its jobs in the background. The signals of schedulers are heeded always: some containers start with all ignored.
    """
    return number in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN


class Interrupted(Exception):
    """A stop was requested; finished steps are saved."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.text)
        self.reason = reason


class Control:
    """What this rank knows of requests to stop. It handles the signals from its creation on.

    During training, a signal is only remembered: `reason` goes into the reduction that ends each step anyway, so that
    all ranks stop after the same step. Before the first one there is nothing to save, and a rank may be far from the
    next place where ranks agree: waiting for another one, importing, reading. There `leave` ends it at once.

    Args:
        leave: called in a thread with the reason, when a signal comes before `begin`; ends the process. None: signals
            are only remembered then, too.
    """

    def __init__(self, leave: Callable[[Reason], object] | None = None) -> None:
        self._requested = [False] * len(Reason)  # by reason; set by handlers and threads, and never unset
        self._deadline: float | None = None
        self._leave = leave
        if leave is not None:
            self._wakeup, descriptor = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(descriptor, False)
            signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="signals", daemon=True).start()
        for number in SIGNALS:
            if not is_ignored(number):
                signal.signal(number, self._handle)

    @property
    def reason(self) -> Reason:
        """The weightiest reason to stop that this rank knows; other ranks may know another."""
        found = max((reason for reason in Reason if self._requested[reason]), default=Reason.NONE)
        if found is Reason.NONE and self._deadline is not None and time.monotonic() >= self._deadline:
            return Reason.DEADLINE
        return found

    def request(self, reason: Reason) -> None:
        """Request a stop; a signal handler or another thread may do so in the middle of it."""
        self._requested[reason] = True

    def limit(self, max_hours: float | None, begun: float) -> None:
        """Request a stop at a deadline.

        Args:
            max_hours: hours from the start of the attempt to the deadline; None: there is none.
            begun: start of the attempt, in seconds since the epoch. A clock that is set later changes nothing.
        """
        passed = max(0.0, time.time() - begun)
        self._deadline = None if max_hours is None else time.monotonic() + max_hours * 3600 - passed

    def begin(self) -> None:
        """From now on, signals are only remembered: the ranks agree on a stop. They have just been in a collective."""
        self._leave = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(SIGNALS[signal.Signals(number)])

    def _watch(self) -> None:
        """End the process on a signal, also where the main thread waits in a library and runs no handler."""
        while (leave := self._leave) is not None:
            for number in os.read(self._wakeup, 64):
                reason = Reason.NONE
                with contextlib.suppress(ValueError):
                    reason = SIGNALS.get(signal.Signals(number), Reason.NONE)
                if reason is not Reason.NONE and self._leave is not None:
                    leave(reason)
