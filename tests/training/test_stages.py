"""Stages of a recipe before it runs: bounds by costs and within memory, and the parts that each stage holds."""

import pytest
from recipes import make_recipe

from megazh.errors import UsageError
from megazh.pipeline.costs import LayerCosts, costs_by_flops
from megazh.pipeline.work import Work
from megazh.training.layout import make_layout
from megazh.training.recipe import Device, Recipe
from megazh.training.stages import bounds_for, describe_parts, memory_by_stage, work_of

EVEN = LayerCosts(unit="seconds", embedding=1.0, block=1.0, head=1.0)


def two_stages(recipe: Recipe) -> Work:
    """The work of two stages without replicas."""
    return work_of(recipe, make_layout(recipe, 2, 2), recipe.precision.on(Device.CPU))


def test_by_flops_the_head_counts_and_the_embedding_does_not() -> None:
    work = two_stages(make_recipe(model={"num_hidden_layers": 4, "vocab_size": 4096}, dtype="fp32"))
    assert bounds_for(work, costs_by_flops(work), None) == [0, 5, 6], "the head is worth more than all blocks"


def needed(work: Work, bounds: list[int]) -> float:
    """Bytes that the largest stage needs."""
    return max(stage.total for stage in memory_by_stage(work, bounds))


def test_memory_moves_a_cut_and_too_little_of_it_is_refused() -> None:
    """An expensive embedding would leave all blocks to the second stage."""
    work = two_stages(
        make_recipe(
            model={"num_hidden_layers": 6, "intermediate_size": 512, "tie_word_embeddings": False},
            seq_len=256,
            dtype="fp32",
        )
    )
    costs = LayerCosts(unit="seconds", embedding=100.0, block=1.0, head=1.0)
    free, even = (bounds_for(work, each, None) for each in (costs, EVEN))
    assert free == [0, 1, 8]
    assert even == [0, 4, 8]
    limit = (needed(work, free) + needed(work, even)) / 2
    within = bounds_for(work, costs, limit)
    assert within != free
    assert needed(work, within) <= limit
    with pytest.raises(UsageError, match="no cut into 2 stages fits"):
        bounds_for(work, costs, 1e4)


@pytest.mark.parametrize(
    ("begin", "end", "text"),
    [
        (0, 6, "embedding + 4 layers + head"),
        (0, 1, "embedding"),
        (0, 2, "embedding + 1 layer"),
        (1, 5, "4 layers"),
        (4, 6, "1 layer + head"),
        (5, 6, "head"),
    ],
)
def test_parts(begin: int, end: int, text: str) -> None:
    assert describe_parts(make_recipe(model={"num_hidden_layers": 4}), begin, end) == text
