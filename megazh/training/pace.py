"""Intervals of steps, and the time that the remaining ones take."""

_WEIGHT = 0.1  # of the newest step


def due(every: int, step: int) -> bool:
    """Whether something is done after this step; never where `every` is 0."""
    return bool(every) and step % every == 0


class Pace:
    """Exponential average of the seconds per step.

    Args:
        begun_at: step at which the process began. The average starts anew at its second step: the first warms up.
        steps: steps of the run.
    """

    def __init__(self, begun_at: int, steps: int) -> None:
        self._begun_at, self._steps = begun_at, steps
        self._seconds = 0.0

    def remaining(self, step: int, seconds: float) -> float:
        """Take the seconds of `step`, the one that has just ended; returns the seconds from there to the end."""
        new = step - self._begun_at <= 2
        self._seconds = seconds if new else (1 - _WEIGHT) * self._seconds + _WEIGHT * seconds
        return (self._steps - step) * self._seconds
