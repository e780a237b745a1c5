"""The learning rate of each optimizer step: linear warm-up, then half a cosine down to the last step."""

import math

from megazh.errors import UsageError


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, min_ratio: float) -> float:
    """The learning rate of optimizer step `step`.

    It rises by peak / warmup_steps per step and reaches `peak` at step `warmup_steps` - 1 (at step 0 without warm-up).
    Then it falls along half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts) to
    `min_ratio * peak` at the last step, `steps` - 1, and stays there. A run of warm-up only ends at `peak`.

    Args:
        step: number of the step, from 0.
        steps: length of the run in optimizer steps.
        peak: peak learning rate.
        warmup_steps: length of the warm-up in steps.
        min_ratio: final learning rate relative to the peak, 0 to 1.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    top = max(warmup_steps - 1, 0)
    progress = min((step - top) / max(steps - 1 - top, 1), 1.0)
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2)


def warmup_steps(steps: int, warmup: float) -> int:
    """The length of the warm-up in steps.

    Args:
        steps: length of the run in optimizer steps.
        warmup: a share of `steps` if below 1 (at least one step, unless it is 0), else a whole number of steps.

    Raises:
        UsageError: `warmup` is neither, or is longer than the run.
    """
    if 0 <= warmup < 1:
        return max(1, round(steps * warmup)) if warmup else 0
    if not (math.isfinite(warmup) and warmup > 0 and warmup == int(warmup)):
        raise UsageError(
            f"schedule.warmup={warmup:g}: give a share of the steps from 0 to below 1, or a whole number of steps"
        )
    if warmup > steps:
        raise UsageError(
            f"schedule.warmup={int(warmup)}: longer than the run of {steps:,} steps; lower it, give it as a share "
            "(such as 0.02), or train for more steps"
        )
    return int(warmup)
