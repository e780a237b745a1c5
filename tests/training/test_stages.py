"""Bounds of stages: one decision for all ranks, the hand's before the clock's, within the memory there is."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from recipes import make_recipe
from training.stages_rank import RANKS, RECIPE, clock

from megazh.errors import UsageError
from megazh.pipeline.costs import LayerCosts, costs_by_flops
from megazh.pipeline.precision import Precision
from megazh.pipeline.split import best_bounds
from megazh.training.layout import Layout, make_layout
from megazh.training.recipe import Recipe
from megazh.training.stages import agree_on_bounds, bounds_for, memory_limit, memory_of_stage

CPU = torch.device("cpu")
EVEN = LayerCosts(unit="seconds", embedding=1.0, block=1.0, head=1.0)


@pytest.mark.slow
def test_all_ranks_take_the_bounds_of_the_first(tmp_path: Path) -> None:
    found = run_ranks(Path(__file__).parent / "stages_rank.py", RANKS, [], tmp_path, timeout=90)
    blocks = RECIPE.model.num_hidden_layers
    own = [best_bounds(clock(rank).units(blocks), RANKS) for rank in range(RANKS)]
    assert own[0] != own[1], "each would have decided otherwise"
    assert [rank["bounds"] for rank in found] == [own[0]] * RANKS


def test_one_stage_has_everything() -> None:
    recipe = make_recipe(model={"num_hidden_layers": 5})
    assert agree_on_bounds(recipe, make_layout(recipe, 1, 1), CPU, Precision.FP32) == [0, 7]


def test_a_cut_by_hand_is_taken() -> None:
    recipe = make_recipe(model={"num_hidden_layers": 5}, stage_bounds=[0, 1, 7], stage_costs="measured")
    assert agree_on_bounds(recipe, make_layout(recipe, 2, 2), CPU, Precision.FP32) == [0, 1, 7]


def test_by_flops_the_head_counts_and_the_embedding_does_not() -> None:
    recipe = make_recipe(model={"num_hidden_layers": 4, "vocab_size": 4096})
    costs = costs_by_flops(recipe.model, recipe.seq_len, recipe.micro_batch_size, False)
    bounds = bounds_for(recipe, make_layout(recipe, 2, 2), Precision.FP32, costs, None)
    assert bounds == [0, 5, 6], "the head is worth more than all blocks"


def needed(recipe: Recipe, layout: Layout, bounds: list[int]) -> float:
    """Bytes of the fullest stage."""
    return max(
        memory_of_stage(recipe, layout, Precision.FP32, stage, bounds[stage], bounds[stage + 1]).total
        for stage in range(layout.stages)
    )


def test_memory_moves_a_cut_and_too_little_of_it_is_refused() -> None:
    """An expensive embedding would leave all blocks to the second stage."""
    recipe = make_recipe(
        model={"num_hidden_layers": 6, "intermediate_size": 512, "tie_word_embeddings": False}, seq_len=256
    )
    layout = make_layout(recipe, 2, 2)
    costs = LayerCosts(unit="seconds", embedding=100.0, block=1.0, head=1.0)
    free, even = (bounds_for(recipe, layout, Precision.FP32, each, None) for each in (costs, EVEN))
    assert free == [0, 1, 8]
    assert even == [0, 4, 8]
    limit = (needed(recipe, layout, free) + needed(recipe, layout, even)) / 2
    within = bounds_for(recipe, layout, Precision.FP32, costs, limit)
    assert within != free
    assert needed(recipe, layout, within) <= limit
    with pytest.raises(UsageError, match="no cut into 2 stages fits"):
        bounds_for(recipe, layout, Precision.FP32, costs, 1e4)


def test_only_a_recipe_limits_memory_on_the_cpu() -> None:
    assert memory_limit(make_recipe(), CPU) is None
    assert memory_limit(make_recipe(memory_limit_gib=1.5), CPU) == 1.5 * 2**30
