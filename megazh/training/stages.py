"""Stages of a recipe before anything runs: their work, memory and best bounds, from the recipe's numbers alone.

Imports no torch, so that `megazh plan` starts without it; `megazh.training.cut` decides the cut of a real run.
"""

import itertools

from megazh.model.backend import Backend, unfit_for_kernels
from megazh.pipeline.costs import LayerCosts
from megazh.pipeline.memory import StageMemory, stage_memory
from megazh.pipeline.precision import Dtype, Precision
from megazh.pipeline.split import best_bounds
from megazh.pipeline.work import Work
from megazh.training.layout import Layout
from megazh.training.recipe import Kernels, Recipe

OUTSIDE_TORCH = 1.5
"""GiB of a card that the CUDA context, NCCL and the driver take."""


def work_of(recipe: Recipe, layout: Layout, precision: Precision, backend: Backend | None = None) -> Work:
    """The work of an optimizer step of this recipe in this layout.

    Args:
        recipe: the recipe.
        layout: the arrangement of its ranks.
        precision: the dtypes on the device that it runs on.
        backend: what computes blocks. Default: as on a card that can run the kernels.
    """
    return Work(
        model=recipe.model,
        stages=layout.stages,
        replicas=layout.replicas,
        seq_len=recipe.batch.seq_len,
        micro_batch_size=layout.micro_batch_size,
        micro_batches=layout.micro_batches,
        precision=precision,
        activation_checkpointing=recipe.parallel.activation_checkpointing,
        backend=backend or usual_backend(recipe, precision),
    )


def usual_backend(recipe: Recipe, precision: Precision) -> Backend:
    """What computes blocks on a card of compute capability 8.0 or later with a C compiler beside it."""
    if precision.compute is Dtype.FP32:
        return Backend.MASKED
    fits = recipe.parallel.kernels is Kernels.AUTO and unfit_for_kernels(recipe.model) is None
    return Backend.FUSED if fits else Backend.VARLEN


def bounds_for(work: Work, costs: LayerCosts, limit: float | None) -> list[int]:
    """The best stage bounds by these costs.

    Args:
        work: shapes and dtypes of the step.
        costs: cost of each type of part.
        limit: bytes that a stage may need; None: any number.

    Raises:
        UsageError: no cut fits.
    """
    parts = costs.parts(work.model.num_hidden_layers)
    if limit is None:
        return best_bounds(parts, work.stages)

    def memory(stage: int, begin: int, end: int) -> float:
        return stage_memory(work, stage, begin, end).total

    return best_bounds(parts, work.stages, memory, limit)


def memory_by_stage(work: Work, bounds: list[int]) -> list[StageMemory]:
    """The memory of each stage of this cut."""
    return [stage_memory(work, stage, begin, end) for stage, (begin, end) in enumerate(itertools.pairwise(bounds))]


def describe_parts(recipe: Recipe, begin: int, end: int) -> str:
    """Name the parts of a stage: `embedding + 18 layers`, `6 layers + head`."""
    last = recipe.model.num_hidden_layers + 1
    blocks = min(end, last) - max(begin, 1)
    names = ["embedding"] if begin == 0 else []
    if blocks > 0:
        names.append(f"{blocks} layer{'s' if blocks > 1 else ''}")
    if end == last + 1:
        names.append("head")
    return " + ".join(names)
