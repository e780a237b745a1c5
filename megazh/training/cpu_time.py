"""How long a run takes on this machine's CPU, by the speed of a matrix product; imports numpy only when it is asked."""

import time

_SIZE, _ROUNDS = 768, 3


def describe_cpu_time(operations: float) -> str:
    """A line on the time that a run takes at least on this CPU.

    Args:
        operations: floating-point operations of the whole run, forward and backward.
    """
    rate = _product_rate()
    digits = 0 if operations > 1e13 else 1
    return (
        f"at least {duration_in_words(operations / rate)} on this CPU: {operations / 1e12:,.{digits}f} TFLOP at "
        f"{rate / 1e9:,.0f} GFLOP/s, the speed of its matrix products in fp32"
    )


def _product_rate() -> float:
    """FLOP/s of a matrix product in fp32 on all cores, the best of a few rounds of some hundredths of a second."""
    import numpy as np

    matrix = np.ones((_SIZE, _SIZE), np.float32)
    seconds = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        _ = matrix @ matrix
        seconds.append(time.perf_counter() - begun)
    return 2 * _SIZE**3 / max(min(seconds), 1e-9)


def duration_in_words(seconds: float) -> str:
    """A length of time with one unit: 40 seconds, 3 minutes, 5.2 hours, 12 days, 1,900 years."""
    units = (("year", 365.25 * 86400), ("day", 86400.0), ("hour", 3600.0), ("minute", 60.0), ("second", 1.0))
    name, size = next((unit for unit in units if seconds >= 1.5 * unit[1]), units[-1])
    count = seconds / size
    return f"{count:,.0f} {name}s" if count >= 10 or name == "second" else f"{count:.1f} {name}s"
