"""Ctrl-C, remembered until a rank can save."""

import signal
from types import FrameType


class StopRequest:
    """Takes SIGINT from now on: a rank that is starting up, or in the middle of a step, ends when it can."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
