"""Passes of a step: their order on each stage, the micro-batches that a stage keeps, and the time they take."""

import pytest

from megazh.pipeline.passes import Pass, PassType, kept_micro_batches, makespan, passes, weight_passes_deferred

LAYOUTS = [(stages, batches) for stages in (2, 3, 6) for batches in (1, 2, 3, 8)]


@pytest.mark.parametrize(("stages", "batches"), LAYOUTS)
def test_each_stage_does_each_pass_once_and_in_order(stages: int, batches: int) -> None:
    for stage in range(stages):
        done = list(passes(stage, stages, batches))
        wanted = [Pass(each, number) for each in PassType for number in range(batches)]
        assert sorted(done, key=lambda each: (each.type, each.micro_batch)) == sorted(
            wanted, key=lambda each: (each.type, each.micro_batch)
        )
        for number in range(batches):
            places = [done.index(Pass(each, number)) for each in PassType]
            assert places == sorted(places)
        for wanted_type in PassType:
            numbers = [each.micro_batch for each in done if each.type is wanted_type]
            assert numbers == sorted(numbers), "weight gradients are summed in the same order on every stage"


@pytest.mark.parametrize(("stages", "batches"), LAYOUTS)
def test_no_stage_keeps_more_than_stated(stages: int, batches: int) -> None:
    for stage in range(stages):
        kept = most = 0
        for each in passes(stage, stages, batches):
            kept += {"forward": 1, "backward": 0, "weights": -1}[each.type]
            most = max(most, kept)
        assert most == kept_micro_batches(stage, stages, batches)
        assert most <= min(stages, batches)


def one_forward_one_backward(stages: int, batches: int) -> float:
    """Time of a step of equal stages if backward passes are not split; a forward pass takes 1, a backward pass 2."""
    return 3 * (batches + stages - 1)


@pytest.mark.parametrize(("stages", "batches"), [(2, 16), (3, 16), (6, 32)])
def test_it_waits_less_than_without_the_split(stages: int, batches: int) -> None:
    took = makespan([(1.0, 1.0, 1.0)] * stages, batches)
    assert 3 * batches < took < one_forward_one_backward(stages, batches)
    if stages == 2:
        assert took == 3 * batches + 1, "it waits for one forward pass"


def test_one_stage_never_waits() -> None:
    assert makespan([(1.0, 2.0, 0.5)], 7) == pytest.approx(7 * 3.5)
    assert weight_passes_deferred(0) == 0


def test_the_slowest_stage_decides() -> None:
    assert makespan([(1.0, 1.0, 1.0), (3.0, 3.0, 3.0)], 20) == pytest.approx(9 * 20 + 1, abs=1)
