"""A request to stop (SIGINT), remembered until the rank can save."""

import signal
from types import FrameType


class StopRequest:
    """Handles SIGINT from its creation on, so that a rank stops between steps instead of in the middle of one."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
