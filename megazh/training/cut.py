"""The cut of a new run into stages: rank 0 decides once, all ranks follow, and the checkpoints keep it."""

from typing import Any

import torch
import torch.distributed as dist

from megazh.pipeline.costs import costs_by_flops
from megazh.pipeline.timing import layer_seconds
from megazh.pipeline.work import Work
from megazh.training.recipe import Recipe, StageCosts
from megazh.training.stages import fitting_bounds, memory_limit


def agree_on_bounds(recipe: Recipe, work: Work, device: torch.device) -> list[int]:
    """The stage bounds of a new run. All ranks call it; rank 0 decides.

    Raises:
        UsageError: a stage does not fit the memory of a GPU.
    """
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    limit = memory_limit(recipe, card)
    if work.stages == 1 or recipe.parallel.stage_bounds is not None:
        return fitting_bounds(recipe, work, costs_by_flops(work), limit)
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
        box = [fitting_bounds(recipe, work, costs, limit)]
    dist.broadcast_object_list(box, 0)
    return box[0]
