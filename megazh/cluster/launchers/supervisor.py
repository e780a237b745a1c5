"""Watch the ranks of a run, wherever they are, and make them end together: all with success, or all at once.

When one dies, the others are ended; requests to stop are passed on to all; ranks that get on no longer are killed.
"""

import contextlib
import math
import queue
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from megazh.cluster.launchers.ending import SIGNALLED, STOPPED, Ending, Exit, Fault, reason_of
from megazh.cluster.launchers.hang import PulseReader, Watch
from megazh.cluster.launchers.rank_log import RankLog
from megazh.errors import MegazhError
from megazh.progress import duration
from megazh.training.control import SIGNALS, Reason, is_ignored

SAVE_SECONDS = 900.0
"""Seconds that ranks have to save and end after a request to stop, for a step of a large model and gigabytes to a slow
disk; a second Ctrl-C does not wait."""
_OTHERS_SECONDS = 30.0  # ranks end together: after one has ended well, the others are about to
_KILL_SECONDS = 30.0  # a process inside a driver call can outlive SIGKILL for a while
_POLL_SECONDS = 0.1
_DOUBT_SECONDS = 1.0  # for the end of a rank to arrive whose death has made a collective of the others fail

Events = queue.SimpleQueue[Exit | Fault | signal.Signals]
"""What a supervisor hears of: the end of a rank, a fault of the program that starts ranks, a request to stop."""


class Ranks(ABC):
    """The processes of the ranks of one attempt.

    Attributes:
        logs: log of each rank.
        labels: name of each rank in messages.
        pulses: signs of progress of the ranks.
        alive: ranks that have been started, or are about to be, and have not ended.
    """

    logs: Sequence[RankLog]
    labels: list[str]
    pulses: PulseReader
    alive: set[int]

    @abstractmethod
    def start(self, events: Events) -> None:
        """Start all ranks; their ends go to `events`."""

    @abstractmethod
    def poll(self) -> None:
        """Handle what has arrived, and copy what rank 0 has written to the terminal. Called ten times a second."""

    @abstractmethod
    def ended(self, event: Exit, was_killed: bool) -> Exit:
        """Take note of the end of a rank; returns it, corrected where more is known of it.

        Args:
            event: the end.
            was_killed: whether the supervisor has killed the ranks.
        """

    @abstractmethod
    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all ranks that live."""

    @abstractmethod
    def explain(self) -> str:
        """Have the ranks write their stacks to their logs; returns which rank the others wait for, and why."""

    @abstractmethod
    def kill(self) -> None:
        """Kill all ranks that live, and what they have started."""

    @abstractmethod
    def close(self) -> None:
        """Free what the ranks needed; all of them have ended, or were killed."""


def supervise(ranks: Ranks, events: Events, hang_seconds: float) -> Ending:
    """Start ranks, and return when all of them have ended.

    Args:
        ranks: the ranks.
        events: where signals arrive, see `signals`.
        hang_seconds: seconds without progress of any rank that are a hang; 0: nothing is one.
    """
    return _Supervisor(ranks, hang_seconds).run(events)


class _Supervisor:
    def __init__(self, ranks: Ranks, hang_seconds: float) -> None:
        self._ranks = ranks
        self._watch = Watch(ranks.pulses, hang_seconds)
        self._ending = Ending()
        self._ctrl_c = 0
        self._deadline: float | None = None
        self._killed = False
        self._doubtful: Exit | None = None
        """A failure that may be the consequence of another one, which has not been heard of yet."""
        self._decide_by = math.inf

    def run(self, events: Events) -> Ending:
        ranks = self._ranks
        try:
            ranks.start(events)
            while ranks.alive:
                ranks.poll()
                with contextlib.suppress(queue.Empty):
                    event = events.get(timeout=_POLL_SECONDS)
                    if isinstance(event, Exit):
                        self._ended(event)
                    elif isinstance(event, Fault):
                        self._fault(event)
                    else:
                        self._request(event)
                if self._doubtful is not None and (not ranks.alive or time.monotonic() > self._decide_by):
                    self._fail(self._doubtful)
                if not self._killed and self._ending.failed is None and self._watch.hangs():
                    self._give_up()
                if self._deadline is not None and time.monotonic() > self._deadline:
                    if self._killed:
                        break
                    self._ending.stuck = sorted(ranks.alive)
                    self._kill()
        finally:
            self._kill()
            ranks.poll()
            ranks.close()
        return self._ending

    def _ended(self, event: Exit) -> None:
        ending = self._ending
        self._ranks.alive.discard(event.rank)
        event = self._ranks.ended(event, self._killed)
        if ending.reason and event.code == 1 and self._ranks.logs[event.rank].ends_with_interrupt():
            # The signal came while Python itself was starting, which then ends with 1 instead of by the signal.
            event = Exit(event.rank, -signal.SIGINT)
        if event.code in STOPPED:  # the ranks agree to stop where one of them got a signal, or at a deadline
            agreed = Reason(self._ranks.pulses.read()[event.rank].reason)
            ending.reason = max(ending.reason, agreed) or reason_of(event.code)
            ending.left = True
        ending.complete = ending.complete and event.code == 0
        well = event.code == 0 or event.code in STOPPED
        if ending.reason and ending.failed is None and not self._killed:
            self._deadline = min(self._deadline or math.inf, time.monotonic() + _OTHERS_SECONDS)
        if well or self._killed:
            return
        if event.code != MegazhError.exit_code:
            self._fail(event)
        elif self._doubtful is None:
            self._doubtful, self._decide_by = event, time.monotonic() + _DOUBT_SECONDS

    def _fail(self, event: Exit) -> None:
        """Take the end of a rank for the cause of the failure, and kill the others."""
        self._doubtful = None
        self._ending.failed = event
        self._ranks.poll()
        self._ranks.logs[0].hide()
        self._kill()

    def _fault(self, fault: Fault) -> None:
        """The program that starts the ranks has failed, before or while they ran."""
        if not self._killed:
            self._ending.fault = fault
            self._ending.complete = False
            self._kill()

    def _request(self, number: signal.Signals) -> None:
        ending = self._ending
        reason, first = SIGNALS[number], not ending.reason
        self._ctrl_c += number == signal.SIGINT
        if ending.failed is not None:
            if ending.failed.code in SIGNALLED:
                # Slurm signals all processes, and the ranks were quicker.
                ending.reason = max(ending.reason, reason)
            if self._ctrl_c > 1 or not first:
                self._kill()
            return
        if self._ctrl_c > 1:
            self._kill()
            return
        if reason <= ending.reason:
            return
        ending.reason = reason
        self._ranks.signal(number)
        if first:
            self._wait(SAVE_SECONDS)
        again = "a second Ctrl-C kills them" if self._ctrl_c else "Ctrl-C twice kills them"
        print(f"stopping: {reason.text}; the ranks save and end ({again})", file=sys.stderr, flush=True)

    def _give_up(self) -> None:
        """Kill ranks that get on no longer."""
        self._ranks.poll()
        self._ranks.logs[0].hide()  # the stacks are for the log
        self._ending.hang = f"no rank has got on for {duration(self._watch.idle)} {self._ranks.explain()}"
        self._kill()

    def _kill(self) -> None:
        self._killed = True
        self._ranks.kill()
        self._wait(_KILL_SECONDS)

    def _wait(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds


@contextlib.contextmanager
def signals() -> Iterator[Events]:
    """Turn the signals that request a stop into events."""
    events: Events = queue.SimpleQueue()

    def handler(number: int, _: FrameType | None) -> None:
        events.put(signal.Signals(number))

    before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
    for each in SIGNALS:
        if not is_ignored(each):
            before[each] = signal.signal(each, handler)
    try:
        yield events
    finally:
        for each, old in before.items():
            signal.signal(each, old)
