"""Ranks of the slots of several hosts: numbers worked out by hand, and rules that hold for all layouts."""

import itertools

import pytest

from megazh.cluster.placement import Choice, Links, Traffic, describe, place
from megazh.training.job import Host
from megazh.training.layout import Layout

GB = 1e9
LINKS = Links(10, 1)


def layout(stages: int, replicas: int) -> Layout:
    """A layout of which only stages and replicas count."""
    return Layout(stages * replicas, stages, replicas, micro_batch_size=1, micro_batches=10)


def hosts(*slots: int) -> list[Host]:
    """Hosts with these numbers of slots."""
    return [Host(f"n{number}", count) for number, count in enumerate(slots)]


def traffic(stages: int, activations: float = 0.01, gradients: float = 1.0, **more: float) -> Traffic:
    """Traffic in GB: hidden states per micro-batch, of which there are 10, and the gradients of each stage."""
    return Traffic(activations * GB, 10, tuple(gradients * GB for _ in range(stages)), **more)


def chosen(stages: int, replicas: int, slots: tuple[int, ...], sent: Traffic) -> Choice:
    """The choice for a layout on hosts with so many slots, at 10 GB/s inside of them and 1 GB/s between."""
    return place(layout(stages, replicas), hosts(*slots), sent, LINKS)


def test_little_activation_lets_the_pipeline_cross() -> None:
    found = chosen(2, 3, (3, 3), traffic(2, activations=0.01, gradients=1.0))
    assert (found.best.inside, found.best.ranks_of_slots) == ("stages", (0, 1, 2, 3, 4, 5))
    # Rings inside of a host: 1 GB at 10 GB/s. Three replicas send 10 x 0.01 GB through one link at 1 GB/s, both ways at
    # the same time; filling and draining are a tenth of that each.
    assert found.best.seconds == pytest.approx(0.1 + 0.3 + 2 * 0.03)
    assert (found.best.pipelines_across, found.best.stages_across) == (3, 0)
    # The third pipeline has a slot on each host: 0.1 GB and two fillings of 0.01 GB; both rings cross.
    assert found.other is not None
    assert found.other.ranks_of_slots == (0, 3, 1, 2, 5, 4)
    assert found.other.seconds == pytest.approx(2 * 1.0 + 0.1 + 2 * 0.01)
    assert (found.other.pipelines_across, found.other.stages_across) == (1, 2)


def test_much_activation_keeps_pipelines_inside() -> None:
    found = chosen(2, 4, (4, 4), traffic(2, activations=1.0, gradients=0.1))
    assert (found.best.inside, found.best.ranks_of_slots) == ("pipelines", (0, 4, 1, 5, 2, 6, 3, 7))
    # Two rings cross: 0.2 GB at 1 GB/s; 10 GB inside at 10 GB/s, and 0.1 s each for filling and draining.
    assert found.best.seconds == pytest.approx(0.2 + 1.0 + 0.2)
    assert (found.best.pipelines_across, found.best.stages_across) == (0, 2)


def test_computation_hides_what_travels_meanwhile() -> None:
    sent = {seconds: traffic(2, 0.2, 1.0, compute_seconds=seconds) for seconds in (0.0, 20.0)}
    assert chosen(2, 4, (4, 4), sent[0.0]).best.inside == "pipelines", "8 s of hidden states"
    found = chosen(2, 4, (4, 4), sent[20.0]).best
    assert (found.inside, found.seconds) == ("stages", pytest.approx(0.1 + 2 * 0.8))


def test_a_tied_matrix_weighs_on_a_pipeline_that_crosses() -> None:
    without, tied = (traffic(2, 0.01, 1.0, tied=size * GB) for size in (0, 1))
    assert chosen(2, 4, (4, 4), without).best.inside == "stages"
    found = chosen(2, 4, (4, 4), tied)
    assert found.best.inside == "pipelines"
    assert found.other is not None
    assert found.other.seconds == pytest.approx(0.1 + 4 * 1.0 + 0.4 + 2 * 0.04)


def test_unequal_hosts() -> None:
    found = chosen(2, 5, (6, 4), traffic(2, activations=1.0))
    assert found.best.inside == "pipelines"
    assert found.best.pipelines_across == 0
    assert found.best.ranks_of_slots == (0, 5, 1, 6, 2, 7, 3, 8, 4, 9)
    found = chosen(2, 5, (6, 4), traffic(2, activations=1e-6))
    # The first host has room for one stage of five, and one slot is left for the other stage, whose ring crosses.
    assert found.best.inside == "stages"
    assert (found.best.stages_across, found.best.pipelines_across) == (1, 4)
    assert found.best.ranks_of_slots == tuple(range(10))


def test_parts_of_hosts_make_up_groups_after_whole_ones() -> None:
    found = chosen(4, 3, (5, 5, 2), traffic(4, activations=10.0))
    pipelines = [[rank % 3 for rank in found.best.ranks_of_slots][begin:end] for begin, end in ((0, 5), (5, 10))]
    assert pipelines == [[0, 0, 0, 0, 1], [2, 2, 2, 2, 1]]
    assert found.best.pipelines_across == 1
    assert "but for 1 pipeline, for which no host has room" in describe(found, Links())


@pytest.mark.parametrize("slots", [(12,), (6, 6), (4, 4, 4), (7, 5), (1, 11), (5, 5, 2), (1,) * 12])
def test_each_slot_has_a_rank_of_its_own(slots: tuple[int, ...]) -> None:
    for stages, activations in itertools.product((1, 2, 3, 4, 6, 12), (1e-6, 1.0)):
        found = chosen(stages, 12 // stages, slots, traffic(stages, activations))
        for placement in filter(None, (found.best, found.other)):
            assert sorted(placement.ranks_of_slots) == list(range(12))
            assert placement.ranks_of_slots[0] == 0
        assert found.other is None or found.best.seconds <= found.other.seconds


def test_without_a_choice_ranks_are_slots() -> None:
    for stages, replicas, slots in ((2, 3, (6,)), (1, 6, (3, 3)), (6, 1, (3, 3))):
        found = chosen(stages, replicas, slots, traffic(stages))
        assert (found.other, found.best.ranks_of_slots) == (None, tuple(range(6)))


def test_the_line_says_what_crosses_and_why() -> None:
    line = describe(chosen(2, 4, (4, 4), traffic(2, 1.0, 0.1)), LINKS)
    assert line.startswith(
        "data parallelism crosses the hosts, pipelines stay inside: 1.40 s of communication per step"
    )
    assert "if pipeline parallelism crossed; 10 GB/s inside a host, 1 GB/s between hosts; estimated" in line


def test_slots_and_ranks_have_to_agree() -> None:
    with pytest.raises(ValueError, match="7 slots for 6 ranks"):
        place(layout(2, 3), hosts(4, 3), traffic(2), Links())
