"""The cut of a new run into stages: rank 0 decides once, all ranks follow, and the checkpoints keep it."""

from typing import Any

import torch
import torch.distributed as dist

from megazh.pipeline.costs import costs_by_flops
from megazh.pipeline.timing import layer_seconds
from megazh.pipeline.work import Work
from megazh.training.recipe import Recipe, StageCosts
from megazh.training.stages import OUTSIDE_TORCH, bounds_for


def agree_on_bounds(recipe: Recipe, work: Work, device: torch.device) -> list[int]:
    """The stage bounds of a new run. All ranks call it; rank 0 decides.

    Raises:
        UsageError: no cut fits the memory of a GPU.
    """
    if work.stages == 1:
        return [0, recipe.model.num_hidden_layers + 2]
    if recipe.parallel.stage_bounds is not None:
        return recipe.parallel.stage_bounds
    measured = recipe.parallel.stage_costs is StageCosts.MEASURED or (
        recipe.parallel.stage_costs is StageCosts.AUTO and device.type == "cuda"
    )
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        costs = costs_by_flops(work)
        if measured:
            costs = layer_seconds(work, device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        box = [bounds_for(work, costs, memory_limit(recipe, device))]
    dist.broadcast_object_list(box, 0)
    return box[0]


def memory_limit(recipe: Recipe, device: torch.device) -> float | None:
    """Bytes of a GPU that torch may use; None on the CPU, where nothing limits them."""
    if recipe.parallel.memory_limit_gib is not None:
        return recipe.parallel.memory_limit_gib * 2**30
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory - OUTSIDE_TORCH * 2**30
