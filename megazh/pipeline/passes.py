"""What a stage computes in a step, and in which order: one forward, one backward, and weights when nobody waits.

The backward pass of a micro-batch is two: gradients of inputs, which the stage before waits for, and gradients of
weights, which nobody waits for before the step. Sent first, the former arrive earlier by what the latter take, and a
stage that leaves one micro-batch's weights for later fills with them the wait at the end ("zero bubble", arXiv
2401.10241). No stage keeps more micro-batches than the first one does anyway: see `kept_micro_batches`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


def weights_left(stage: int) -> int:
    """For how many micro-batches a stage leaves the gradients of weights for later."""
    return min(stage, 1)


def kept_micro_batches(stage: int, stages: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage keeps at most."""
    return min(stages - stage + weights_left(stage), micro_batches)


@dataclass(frozen=True)
class Pass:
    """One thing that a stage computes."""

    kind: str
    """`forward`, `backward` (gradients of inputs) or `weights`."""
    micro_batch: int


def passes(stage: int, stages: int, micro_batches: int) -> Iterator[Pass]:
    """All that a stage computes in a step, in order."""
    ahead = min(stages - stage - 1, micro_batches)
    left = weights_left(stage)
    for number in range(ahead):
        yield Pass("forward", number)
    for number in range(micro_batches):
        if number + ahead < micro_batches:
            yield Pass("forward", number + ahead)
        yield Pass("backward", number)
        if number >= left:
            yield Pass("weights", number - left)
    for number in range(max(0, micro_batches - left), micro_batches):
        yield Pass("weights", number)


def makespan(seconds: Sequence[tuple[float, float, float]], micro_batches: int) -> float:
    """How long a step of this schedule takes, with transfers that take no time.

    Args:
        seconds: of forward, backward and weight passes of one micro-batch, by stage.
    """
    stages = len(seconds)
    todo = [list(passes(stage, stages, micro_batches)) for stage in range(stages)]
    clock = [0.0] * stages
    ended: dict[tuple[int, Pass], float] = {}
    while any(todo):
        for stage in range(stages):
            while todo[stage]:
                each = todo[stage][0]
                source = {"forward": stage - 1, "backward": stage + 1}.get(each.kind, -1)
                if 0 <= source < stages and (source, each) not in ended:
                    break
                begun = max(clock[stage], ended.get((source, each), 0.0))
                place = ("forward", "backward", "weights").index(each.kind)
                clock[stage] = ended[stage, each] = begun + seconds[stage][place]
                todo[stage].pop(0)
    return max(clock)
