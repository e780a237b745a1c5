"""Smoothed curves: a moving average over a window of steps, or an exponential one."""

import math
from dataclasses import dataclass

import numpy as np

from megazh.errors import UsageError

_SHARE = 0.02
_LEAST = 9


@dataclass(frozen=True)
class Smoothing:
    """How a curve is smoothed. Values that are not finite are left out."""

    window: int | None = None
    """Values in the window; None: 2 % of all, at least nine. The window is centred on each value. At the begin, where
    curves are steep, it is as narrow as that takes; at the end, it is cut off."""
    decay: float | None = None
    """Weight of the past in an exponential moving average, between 0 and 1, in place of the window."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Smooth values, all of them finite; returns as many."""
        if self.decay is not None:
            return _exponential(values, self.decay)
        half = max(_LEAST // 2, round(len(values) * _SHARE / 2)) if self.window is None else self.window // 2
        return _moving(values, half)

    @property
    def off(self) -> bool:
        """Whether values stay as they are."""
        return self.window is not None and self.window < 2


def parse_smoothing(text: str) -> Smoothing:
    """Read `auto`, a number of steps (`50`; 0 is none), or the weight of an exponential average (`0.98`).

    Raises:
        UsageError: it is none of these.
    """
    if text == "auto":
        return Smoothing()
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if 0 < number < 1:
        return Smoothing(decay=number)
    if math.isfinite(number) and number >= 0 and number == int(number):
        return Smoothing(window=int(number))
    raise UsageError(
        f"--smooth {text}: expected auto, a number of steps such as 50, or the weight of the past in an exponential "
        "average such as 0.98"
    )


def _moving(values: np.ndarray, half: int) -> np.ndarray:
    count = len(values)
    sums, at = np.concatenate(([0.0], np.cumsum(values))), np.arange(count)
    halves = np.minimum(half, at)
    first, last = at - halves, np.minimum(at + halves + 1, count)
    return (sums[last] - sums[first]) / (last - first)


def _exponential(values: np.ndarray, decay: float) -> np.ndarray:
    """Mean of the values so far, of which each weighs `decay` times as much as the next one."""
    smoothed, total, weight = np.empty(len(values)), 0.0, 0.0
    for number, value in enumerate(values.tolist()):
        total, weight = decay * total + value, decay * weight + 1
        smoothed[number] = total / weight
    return smoothed
