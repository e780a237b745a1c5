"""Stages of a recipe before anything runs: their work, best bounds, and whether they fit the memory.

All of it comes from the recipe's numbers. `megazh plan`, the checks before a start and the run itself use the same.

Imports no torch, so that `megazh plan` starts without it; `megazh.training.cut` decides the cut of a real run.
"""

import itertools
from dataclasses import dataclass
from typing import Self

from megazh.errors import UsageError
from megazh.model.backend import Backend, unfit_for_kernels
from megazh.pipeline.costs import LayerCosts
from megazh.pipeline.memory import StageMemory, stage_memory
from megazh.pipeline.precision import Dtype, Precision
from megazh.pipeline.split import best_bounds
from megazh.pipeline.work import Work
from megazh.training.layout import Layout
from megazh.training.optimizers.choose import state_bytes
from megazh.training.recipe import Kernels, Recipe

OUTSIDE_TORCH = 1.5
"""GiB of a card that the CUDA context, NCCL and the driver take."""

ASSUMED_CARD_GIB = 24.0
"""Memory of an RTX 3090, which stands for a card that is not known."""

_GIB = 2**30
_LESS = "take a smaller micro_batch_size, activation_checkpointing=true, or more stages (-p)"


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that a stage may need."""

    bytes: float
    source: str
    """What sets the limit, in words."""

    @classmethod
    def of_card(cls, total: float) -> Self:
        """What a card of `total` bytes leaves to torch."""
        return cls(
            total - OUTSIDE_TORCH * _GIB, f"the card's {total / _GIB:.1f} less {OUTSIDE_TORCH} for CUDA and NCCL"
        )


def memory_limit(recipe: Recipe, card: float | None) -> MemoryLimit | None:
    """The limit of a run's stages.

    `parallel.memory_limit_gib` counts where it is given, up to the whole card; else what the card leaves to torch.

    Args:
        recipe: the recipe.
        card: bytes of memory of the smallest GPU; None on the CPU, or where it is not known.

    Returns:
        None where nothing sets a limit.
    """
    given = recipe.parallel.memory_limit_gib
    if given is not None and (card is None or given * _GIB <= card):
        return MemoryLimit(given * _GIB, f"memory_limit_gib={given:g}")
    return None if card is None else MemoryLimit.of_card(card)


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
        optimizer=state_bytes(recipe.optimizer.name),
        attention_group=recipe.attention_group,
        lora=recipe.low_rank,
        neftune_alpha=recipe.noise.neftune_alpha,
    )


def usual_backend(recipe: Recipe, precision: Precision) -> Backend:
    """What computes blocks on a card of compute capability 8.0 or later with a C compiler beside it."""
    if precision.compute is Dtype.FP32:
        return Backend.MASKED
    fits = recipe.parallel.kernels is Kernels.AUTO and unfit_for_kernels(recipe.model, recipe.low_rank) is None
    return Backend.FUSED if fits else Backend.VARLEN


def fitting_bounds(recipe: Recipe, work: Work, costs: LayerCosts, limit: MemoryLimit | None) -> list[int]:
    """The stage bounds of a new run: those that the recipe sets, else the best ones by these costs.

    Args:
        recipe: the recipe.
        work: shapes and dtypes of the step.
        costs: cost of each type of part.
        limit: the memory that a stage may need; None: any.

    Raises:
        UsageError: a stage needs more, or no cut fits.
    """
    by_hand = recipe.parallel.stage_bounds
    if work.stages == 1 or by_hand is not None:
        bounds = by_hand or [0, work.model.num_hidden_layers + 2]
        if limit is not None:
            check_memory(work, bounds, limit)
        return bounds
    try:
        return bounds_for(work, costs, limit.bytes if limit else None)
    except UsageError as error:
        raise UsageError(f"{error} (the limit is {limit.source})" if limit else str(error)) from None


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


def check_memory(work: Work, bounds: list[int], limit: MemoryLimit) -> None:
    """Refuse a cut of which a stage needs more memory than the limit. Raises UsageError with the numbers."""
    needed = memory_by_stage(work, bounds)
    stage = max(range(len(needed)), key=lambda number: needed[number].total)
    most = needed[stage].total
    if most <= limit.bytes:
        return
    which = "the model in one stage" if len(needed) == 1 else f"stage {stage} of the cut {bounds}"
    raise UsageError(
        f"{which} needs {most / _GIB:.3g} GiB a GPU, and there are {limit.bytes / _GIB:.3g} ({limit.source}); {_LESS}"
    )


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
