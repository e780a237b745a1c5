"""Whether weights and optimizer state are finite, and the error of a run that has diverged (see `guard`)."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megazh.errors import DivergedError
from megazh.pipeline.state import Piece
from megazh.training.collect import gather
from megazh.training.recipe import OptimizerConfig


def diverged(what: str, optimizer: OptimizerConfig, saved: Path | None) -> DivergedError:
    """The error of a run that has diverged.

    Args:
        what: where and how it shows.
        optimizer: the settings, of which some may be to blame.
        saved: the newest checkpoint, whose numbers are finite; None where there is none.
    """
    kept = (
        "no checkpoint was saved"
        if saved is None
        else f"nothing was saved since {os.path.relpath(saved)}, from which the run goes on"
    )
    norm = optimizer.max_grad_norm
    clip = "" if 0 < norm <= 1 else f", optimizer.max_grad_norm=1 (was {norm:g})"
    return DivergedError(
        f"{what}; {kept}; try a lower optimizer.learning_rate (was {optimizer.learning_rate:g}), a longer "
        f"schedule.warmup{clip}, or an earlier checkpoint"
    )


def find_not_finite(optimizer: Any, device: torch.device) -> str | None:
    """Name a weight or an optimizer state that is not finite on any rank; None if all are. All ranks call it.

    Each tensor is read once. The name is that of the lowest rank that has one, such as
    `weight of blocks.3.attention.o_proj.weight (rank 1)` or `exp_avg of embedding.weight (rank 0)`.

    Args:
        optimizer: what holds this rank's pieces: has `pieces_to_load()`.
        device: this rank's device.
    """
    own = _find(optimizer.pieces_to_load())
    found = torch.tensor([own is not None], dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if not int(found):
        return None
    return next(f"{name} (rank {rank})" for rank, name in enumerate(gather(own)) if name is not None)


def _find(pieces: Sequence[Piece]) -> str | None:
    """Name this rank's first piece that is not finite."""
    pieces = [piece for piece in pieces if piece.values.is_floating_point() and piece.values.numel()]
    if not pieces:
        return None
    # The largest magnitude is NaN if any number is. A sum could overflow where all numbers are finite.
    largest = [torch.linalg.vector_norm(piece.values, math.inf).float() for piece in pieces]
    wrong = (~torch.stack(largest).isfinite()).nonzero()
    if not len(wrong):
        return None
    piece = pieces[int(wrong[0])]
    return f"{piece.kind} of {piece.parameter}"
