"""A request to stop (SIGINT or SIGTERM), remembered until the rank can save."""

import signal
from types import FrameType


class StopRequest:
    """Handles both signals from its creation on, so that a rank stops between steps instead of in the middle of one.

    The launcher sends SIGINT. Slurm sends SIGTERM to all processes of a job that it cancels or preempts.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
