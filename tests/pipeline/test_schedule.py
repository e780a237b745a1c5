"""Instructions of a step: each stage receives what its neighbours send, in that order, and into free buffers."""

import itertools

import pytest
from deepspeed.runtime.pipe.schedule import (
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    RecvActivation,
    SendActivation,
    SendGrad,
)

from megazh.pipeline.schedule import ExpectActivation, ReceiveGradient, SplitSchedule

LAYOUTS = [(stages, batches) for stages in (2, 3, 6) for batches in (1, 2, 3, 8)]


def instruction_types(batches: int, stages: int, stage: int) -> list[type]:
    """Types of the instructions of a step, in order."""
    return [type(each) for each in itertools.chain(*SplitSchedule(batches, stages, stage))]


@pytest.mark.parametrize(("stages", "batches"), LAYOUTS)
def test_what_is_sent_is_received(stages: int, batches: int) -> None:
    for stage in range(stages):
        found = instruction_types(batches, stages, stage)
        assert found.count(SendActivation) == found.count(ReceiveGradient) == batches * (stage < stages - 1)
        assert found.count(RecvActivation) == found.count(SendGrad) == batches * (stage > 0)
        assert found.count(LoadMicroBatch) == batches * (stage in (0, stages - 1))
        assert found[-1] is OptimizerStep


@pytest.mark.parametrize(("stages", "batches"), LAYOUTS)
def test_what_is_expected_is_received_before_anything_else_is(stages: int, batches: int) -> None:
    for stage in range(stages):
        expected = 0
        for instruction in instruction_types(batches, stages, stage):
            if instruction is ExpectActivation:
                assert expected == 0
                expected = 1
            elif instruction is RecvActivation:
                expected = 0
        assert expected == 0, "nothing is expected that does not come in this step"


@pytest.mark.parametrize(("stages", "batches"), LAYOUTS)
def test_a_buffer_is_free_when_it_is_taken(stages: int, batches: int) -> None:
    for stage in range(stages):
        schedule = SplitSchedule(batches, stages, stage)
        taken: set[int] = set()
        for each in itertools.chain(*schedule):
            if type(each) is ForwardPass:
                assert each.buffer_id not in taken
                assert each.buffer_id < schedule.num_pipe_buffers()
                taken.add(each.buffer_id)
            elif type(each).__name__ == "BackwardPass":
                taken.remove(each.buffer_id)
        assert not taken
