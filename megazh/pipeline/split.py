"""Where to cut the parts of a model (embedding, blocks, head) into stages: the best cut, found by exact search."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from megazh.errors import UsageError

MemoryOf = Callable[[int, int, int], float]
"""Bytes that a stage needs, from (stage, its first part, the part behind its last)."""


def best_bounds(
    costs: Sequence[float], stages: int, memory: MemoryOf | None = None, limit: float = math.inf
) -> list[int]:
    """Find the stage bounds: stage s holds parts bounds[s] up to bounds[s + 1], at least one.

    The slowest stage decides the speed of a pipeline, so its cost is minimized; among all cuts with that maximum the
    one with the smallest sum of squares (the most even) is chosen, and among equals the one with fewer parts in later
    stages.

    Args:
        costs: (parts,) cost of each part, in order.
        stages: number of stages.
        memory: bytes that a stage needs; None leaves memory out.
        limit: largest number of bytes that a stage may need.

    Returns:
        (stages + 1,) rising numbers from 0 to the number of parts.

    Raises:
        UsageError: more stages than parts, or no cut fits the memory; with the numbers.
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise UsageError(
            f"{stages} pipeline stages for {count} parts (embedding, {count - 2} layers, head): give 1 to "
            f"{count} stages"
        )
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def fits(stage: int, begin: int, end: int) -> bool:
        return memory is None or memory(stage, begin, end) <= limit

    smallest = _search(sums, stages, fits, max, math.inf)
    if smallest is None:
        assert memory is not None
        least = _search(sums, stages, lambda *_: True, max, math.inf)
        assert least is not None
        needed = max(memory(stage, *pair) for stage, pair in enumerate(pairwise(least[1])))
        raise UsageError(
            f"no cut into {stages} stages fits {limit / 2**30:.1f} GiB a GPU (the best balanced one needs "
            f"{needed / 2**30:.1f} GiB): take a smaller micro_batch_size, activation_checkpointing=true, or more stages"
        )
    # Slightly more than the minimum, so that float sums in another order do not exclude the cut just found.
    slowest = smallest[0] * (1 + 1e-12)
    even = _search(sums, stages, fits, lambda before, cost: before + cost * cost, slowest)
    assert even is not None
    return even[1]


def _search(
    sums: Sequence[float],
    stages: int,
    fits: Callable[[int, int, int], bool],
    combine: Callable[[float, float], float],
    most: float,
) -> tuple[float, list[int]] | None:
    """Find the cut with the smallest combined cost among those whose stages fit and cost at most `most` each.

    Dynamic programming over (stage, its end): the best way to fill the stages up to there.
    """
    count = len(sums) - 1
    best: list[tuple[float, list[int]] | None] = [(0.0, [0])] + [None] * count
    for stage in range(stages):
        following: list[tuple[float, list[int]] | None] = [None] * (count + 1)
        for end in range(stage + 1, count - (stages - stage - 1) + 1):
            for begin in range(end - 1, stage - 1, -1):
                before = best[begin]
                cost = sums[end] - sums[begin]
                if before is None or cost > most or not fits(stage, begin, end):
                    continue
                combined = combine(before[0], cost)
                found = following[end]
                if found is None or combined < found[0] or (combined == found[0] and begin > found[1][-1]):
                    following[end] = (combined, [*before[1], end])
        best = following
    return best[count]
