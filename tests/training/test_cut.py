"""The cut into stages: the same on all ranks, and the recipe's own cut takes precedence over a measured one."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from recipes import make_recipe
from training.cut_rank import RANKS, RECIPE, measured_costs

from megazh.errors import UsageError
from megazh.pipeline.split import best_bounds
from megazh.training.cut import agree_on_bounds
from megazh.training.layout import make_layout
from megazh.training.recipe import Device, Recipe
from megazh.training.stages import work_of

CPU = torch.device("cpu")
FP32 = make_recipe(dtype="fp32").precision.on(Device.CPU)


def agreed(recipe: Recipe, stages: int) -> list[int]:
    """Bounds of `stages` stages without replicas, decided in this process alone."""
    return agree_on_bounds(recipe, work_of(recipe, make_layout(recipe, stages, stages), FP32), CPU)


@pytest.mark.ranks
@pytest.mark.slow
def test_all_ranks_take_the_bounds_of_the_first(tmp_path: Path) -> None:
    found = run_ranks(Path(__file__).parent / "cut_rank.py", RANKS, [], tmp_path, timeout=90)
    blocks = RECIPE.model.num_hidden_layers
    own = [best_bounds(measured_costs(rank).parts(blocks), RANKS) for rank in range(RANKS)]
    assert own[0] != own[1], "on its own, each rank would have decided otherwise"
    assert [rank["bounds"] for rank in found] == [own[0]] * RANKS


def test_one_stage_has_everything() -> None:
    assert agreed(make_recipe(model={"num_hidden_layers": 5}), 1) == [0, 7]


def test_a_cut_by_hand_is_taken() -> None:
    recipe = make_recipe(model={"num_hidden_layers": 5}, stage_bounds=[0, 1, 7], stage_costs="measured")
    assert agreed(recipe, 2) == [0, 1, 7]


def test_one_stage_and_a_cut_by_hand_respect_the_limit() -> None:
    small = {"memory_limit_gib": 1e-6, "model": {"num_hidden_layers": 5}}
    with pytest.raises(UsageError, match=r"^the model in one stage needs 0\.\d+ GiB .*memory_limit_gib=1e-06"):
        agreed(make_recipe(**small), 1)
    with pytest.raises(UsageError, match=r"^stage 1 of the cut \[0, 1, 7\] needs"):
        agreed(make_recipe(**small, stage_bounds=[0, 1, 7]), 2)
