"""Which layers each stage gets: decided once a run, the same on all ranks."""

from typing import Any

import torch
import torch.distributed as dist

from megazh.model.attention import Backend, choose_backend, unfit_for_kernels
from megazh.pipeline.costs import LayerCosts, costs_by_flops
from megazh.pipeline.memory import StageMemory, Work, stage_memory
from megazh.pipeline.precision import Precision
from megazh.pipeline.split import best_bounds
from megazh.pipeline.timing import layer_seconds
from megazh.training.layout import Layout
from megazh.training.precision import accumulation, communication
from megazh.training.recipe import Kernels, Recipe, StageCosts


def agree_on_bounds(recipe: Recipe, layout: Layout, device: torch.device, precision: Precision) -> list[int]:
    """The bounds of a new run's stages; all ranks call it, and rank 0 decides.

    Raises:
        UsageError: no cut fits the memory of a GPU.
    """
    if layout.stages == 1:
        return [0, recipe.model.num_hidden_layers + 2]
    if recipe.stage_bounds is not None:
        return recipe.stage_bounds
    measured = recipe.stage_costs is StageCosts.MEASURED or (
        recipe.stage_costs is StageCosts.AUTO and device.type == "cuda"
    )
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        costs = costs_by_flops(recipe.model, recipe.seq_len, recipe.micro_batch_size, recipe.activation_checkpointing)
        backend = choose_backend(recipe.model, device, precision.dtype, recipe.kernels is Kernels.AUTO)
        if measured:
            costs = layer_seconds(
                recipe.model,
                recipe.seq_len,
                recipe.micro_batch_size,
                precision.dtype,
                backend,
                device,
                recipe.activation_checkpointing,
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        limit = memory_limit(recipe, device)
        box = [bounds_for(recipe, layout, precision, costs, limit, backend)]
    dist.broadcast_object_list(box, 0)
    return box[0]


OUTSIDE_TORCH = 1.5
"""GiB of a card that the CUDA context, NCCL and the driver take."""


def memory_limit(recipe: Recipe, device: torch.device) -> float | None:
    """Bytes that torch may use of a GPU; None on the CPU, where nothing limits."""
    if recipe.memory_limit_gib is not None:
        return recipe.memory_limit_gib * 2**30
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory - OUTSIDE_TORCH * 2**30


def bounds_for(
    recipe: Recipe,
    layout: Layout,
    precision: Precision,
    costs: LayerCosts,
    limit: float | None,
    backend: Backend | None = None,
) -> list[int]:
    """The best bounds by these costs, within a limit in bytes.

    Args:
        backend: how blocks are computed; default as on a card that can run the kernels.

    Raises:
        UsageError: no cut fits.
    """
    units = costs.units(recipe.model.num_hidden_layers)
    if limit is None:
        return best_bounds(units, layout.stages)

    def memory(stage: int, begin: int, end: int) -> float:
        return memory_of_stage(recipe, layout, precision, stage, begin, end, backend).total

    return best_bounds(units, layout.stages, memory, limit)


def memory_of_stage(
    recipe: Recipe,
    layout: Layout,
    precision: Precision,
    stage: int,
    begin: int,
    end: int,
    backend: Backend | None = None,
) -> StageMemory:
    """The memory of stage number `stage`, which holds the parts `begin` to `end`; `backend` as for `bounds_for`."""
    return stage_memory(recipe.model, work_of(recipe, layout, precision, backend), stage, begin, end)


def work_of(recipe: Recipe, layout: Layout, precision: Precision, backend: Backend | None = None) -> Work:
    """What the stages of this layout have in common; `backend` as for `bounds_for`."""
    accumulated = accumulation(recipe, precision)
    return Work(
        layout.stages, layout.replicas, recipe.seq_len, layout.micro_batch_size, layout.micro_batches, precision,
        accumulated, communication(recipe, accumulated), recipe.activation_checkpointing,
        (backend or usual_backend(recipe, precision)) is Backend.FUSED,
    )  # fmt: skip


def usual_backend(recipe: Recipe, precision: Precision) -> Backend:
    """How blocks are computed on a card of compute capability 8.0 or later, with a C compiler beside it."""
    if precision is Precision.FP32:
        return Backend.MASKED
    fits = recipe.kernels is Kernels.AUTO and unfit_for_kernels(recipe.model) is None
    return Backend.FUSED if fits else Backend.VARLEN
