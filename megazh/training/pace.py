"""Intervals of steps, and the time that the remaining ones take."""

from megazh.training.course import Course

_WEIGHT = 0.1  # of the newest step


def due(every: int, step: int) -> bool:
    """Whether something is done after this step; never where `every` is 0."""
    return bool(every) and step % every == 0


class Pace:
    """Exponential average over steps of the seconds per token.

    Args:
        begun_at: step at which the process began. The average starts anew at its second step: the first warms up.
        course: tokens of each step of the run.
    """

    def __init__(self, begun_at: int, course: Course) -> None:
        self._begun_at, self._course = begun_at, course
        self._seconds = 0.0

    def remaining(self, step: int, seconds: float) -> float:
        """Take the seconds of `step`, the one that has just ended; returns the seconds from there to the end."""
        new, seconds = step - self._begun_at <= 2, seconds / self._course.tokens(step - 1)
        self._seconds = seconds if new else (1 - _WEIGHT) * self._seconds + _WEIGHT * seconds
        return (self._course.total_tokens - self._course.tokens_before(step)) * self._seconds
