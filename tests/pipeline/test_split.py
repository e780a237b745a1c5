"""The cut into stages, compared with all possible cuts, with and without a memory limit; and cuts of recipes."""

import itertools
import random
from collections.abc import Sequence

import pytest

from megazh.errors import UsageError
from megazh.pipeline.costs import LayerCosts, costs_by_flops
from megazh.pipeline.split import MemoryOf, best_bounds
from megazh.training.layout import make_layout
from megazh.training.recipe import Device, load_recipe
from megazh.training.recipe_files import recipe_path
from megazh.training.stages import work_of


def all_cuts(parts: int, stages: int) -> list[list[int]]:
    return [[0, *inner, parts] for inner in itertools.combinations(range(1, parts), stages - 1)]


def sums(costs: Sequence[float], bounds: Sequence[int]) -> list[float]:
    return [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]


def fits(memory: MemoryOf, limit: float, bounds: Sequence[int]) -> bool:
    return all(memory(stage, *pair) <= limit for stage, pair in enumerate(itertools.pairwise(bounds)))


def best_of_all(costs: Sequence[float], cuts: list[list[int]]) -> list[int]:
    """The cut with the least maximum, then the least sum of squares, then the fewest parts in the last stages."""
    return min(
        cuts,
        key=lambda bounds: (
            max(sums(costs, bounds)),
            sum(cost * cost for cost in sums(costs, bounds)),
            [b - a for a, b in itertools.pairwise(bounds)][::-1],
        ),
    )


@pytest.mark.parametrize("stages", range(1, 7))
def test_best_of_all_cuts(stages: int) -> None:
    draw = random.Random(stages)
    for _ in range(60):
        costs = [draw.choice((0, 1, 2, 3, 5, 20)) for _ in range(draw.randint(stages, 10))]
        assert best_bounds(costs, stages) == best_of_all(costs, all_cuts(len(costs), stages)), costs


@pytest.mark.parametrize("stages", range(1, 7))
def test_best_of_all_cuts_that_fit_the_memory(stages: int) -> None:
    draw = random.Random(100 + stages)
    refused = 0
    for _ in range(60):
        parts = draw.randint(stages, 9)
        costs = [draw.randint(0, 9) for _ in range(parts)]
        needs = [draw.randint(1, 9) for _ in range(parts)]

        def memory(stage: int, begin: int, end: int, needs: list[int] = needs) -> float:
            return sum(needs[begin:end]) * (stages - stage)  # earlier stages keep more micro-batches

        limit = draw.randint(5, 60)
        cuts = [bounds for bounds in all_cuts(parts, stages) if fits(memory, limit, bounds)]
        if cuts:
            assert best_bounds(costs, stages, memory, limit) == best_of_all(costs, cuts), (costs, needs)
            continue
        refused += 1
        with pytest.raises(UsageError, match=f"no cut into {stages} stages fits"):
            best_bounds(costs, stages, memory, limit)
    assert refused < 60


@pytest.mark.parametrize("stages", range(1, 7))
def test_costs_that_are_fractions(stages: int) -> None:
    draw = random.Random(200 + stages)
    for _ in range(60):
        costs = [draw.random() for _ in range(draw.randint(stages, 10))]
        found = best_bounds(costs, stages)
        expected = best_of_all(costs, all_cuts(len(costs), stages))
        assert max(sums(costs, found)) == pytest.approx(max(sums(costs, expected)), rel=1e-12)
        squares = [sum(cost * cost for cost in sums(costs, bounds)) for bounds in (found, expected)]
        assert squares[0] == pytest.approx(squares[1], rel=1e-9)


def qwen() -> LayerCosts:
    recipe = load_recipe(recipe_path("qwen0.5b_6x3090"))
    return costs_by_flops(work_of(recipe, make_layout(recipe, 6), recipe.precision.on(Device.CUDA)))


def test_half_a_billion_by_operations() -> None:
    """The head costs as much as ten blocks: one stage has 18 blocks, the other 6 and the head."""
    assert best_bounds(qwen().parts(24), 2) == [0, 19, 26]
    assert best_bounds(qwen().parts(24), 1) == [0, 26]


def test_half_a_billion_by_measured_milliseconds() -> None:
    """A block takes 3.06 ms and the head 28.3 ms on an RTX 3090: one stage has 17 blocks, the other 7 and the head."""
    costs = LayerCosts(unit="seconds", embedding=0.0, block=3.06e-3, head=28.3e-3)
    assert best_bounds(costs.parts(24), 2) == [0, 18, 26]


def test_a_heavy_head_stands_alone() -> None:
    assert best_bounds([0, *[1] * 8, 4], 3) == [0, 5, 9, 10]
    costs = qwen().parts(24)
    bounds = best_bounds(costs, 3)
    assert bounds == best_of_all(costs, all_cuts(26, 3))
    assert bounds[2] == 25, "the last stage holds the head alone"


def test_memory_moves_the_cut() -> None:
    def memory(stage: int, begin: int, end: int) -> float:
        return end - begin

    costs = [1] * 10
    assert best_bounds(costs, 2, memory, 10) == [0, 5, 10]
    assert best_bounds(costs, 2, lambda stage, begin, end: (end - begin) * (3 - stage), 12) == [0, 4, 10]


def test_what_fits_no_gpu_is_refused_with_the_numbers() -> None:
    with pytest.raises(UsageError) as caught:
        best_bounds([1.0] * 6, 2, lambda stage, begin, end: (end - begin) * 8.5 * 2**30, 24 * 2**30)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("2 stages", "24.0 GiB", "25.5 GiB", "micro_batch_size", "activation_checkpointing=true"):
        assert part in message


@pytest.mark.parametrize("stages", [0, -1, 7])
def test_more_stages_than_parts_are_refused(stages: int) -> None:
    with pytest.raises(
        UsageError, match=rf"{stages} pipeline stages for 6 parts \(embedding, 4 layers, head\).*1 to 6"
    ):
        best_bounds([1.0] * 6, stages)


def test_as_many_stages_as_parts() -> None:
    assert best_bounds([0, 1, 1, 9], 4) == [0, 1, 2, 3, 4]
