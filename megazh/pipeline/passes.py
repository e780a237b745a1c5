"""The passes that a stage computes in a step, and their order: one forward, one backward, weight gradients in between.

The backward pass of a micro-batch is split in two: input gradients, which the stage before waits for, and weight
gradients, which nobody needs before the optimizer step. Sending input gradients first lets them arrive earlier by the
time of a weight pass; and a stage that defers one micro-batch's weight pass fills the wait at the end of the step with
it ("zero bubble", arXiv 2401.10241). No stage keeps more micro-batches alive than the first one does: see
`kept_micro_batches`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


def weight_passes_deferred(stage: int) -> int:
    """Micro-batches whose weight pass a stage defers."""
    return min(stage, 1)


def kept_micro_batches(stage: int, stages: int, micro_batches: int) -> int:
    """Largest number of micro-batches whose activations a stage holds at one time."""
    return min(stages - stage + weight_passes_deferred(stage), micro_batches)


class PassType(StrEnum):
    """What a pass computes for one micro-batch."""

    FORWARD = "forward"
    BACKWARD = "backward"
    """Input gradients."""
    WEIGHTS = "weights"
    """Weight gradients."""


@dataclass(frozen=True)
class Pass:
    """One pass of a stage."""

    type: PassType
    micro_batch: int


def passes(stage: int, stages: int, micro_batches: int) -> Iterator[Pass]:
    """All passes of a stage in one step, in order."""
    ahead = min(stages - stage - 1, micro_batches)
    deferred = weight_passes_deferred(stage)
    for number in range(ahead):
        yield Pass(PassType.FORWARD, number)
    for number in range(micro_batches):
        if number + ahead < micro_batches:
            yield Pass(PassType.FORWARD, number + ahead)
        yield Pass(PassType.BACKWARD, number)
        if number >= deferred:
            yield Pass(PassType.WEIGHTS, number - deferred)
    for number in range(max(0, micro_batches - deferred), micro_batches):
        yield Pass(PassType.WEIGHTS, number)


def makespan(seconds: Sequence[tuple[float, float, float]], micro_batches: int) -> float:
    """Duration of a step of this schedule if transfers took no time.

    Args:
        seconds: one triple per stage, the time of a forward, a backward and a weight pass of one micro-batch.
        micro_batches: micro-batches per step.
    """
    stages = len(seconds)
    todo = [list(passes(stage, stages, micro_batches)) for stage in range(stages)]
    clock = [0.0] * stages
    ended: dict[tuple[int, Pass], float] = {}
    while any(todo):
        for stage in range(stages):
            while todo[stage]:
                each = todo[stage][0]
                source = {PassType.FORWARD: stage - 1, PassType.BACKWARD: stage + 1}.get(each.type, -1)
                if 0 <= source < stages and (source, each) not in ended:
                    break
                begun = max(clock[stage], ended.get((source, each), 0.0))
                clock[stage] = ended[stage, each] = begun + seconds[stage][list(PassType).index(each.type)]
                todo[stage].pop(0)
    return max(clock)
