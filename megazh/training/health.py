"""Whether a run is still healthy: steps skipped in a row, and weights and optimizer state that are finite."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megazh.errors import DivergedError
from megazh.training.collect import gather
from megazh.training.recipe import OptimizerConfig

SKIPPED_LIMIT = 20
"""Number of skipped steps in a row after which a run has diverged. A loss scale of fp16 is found within 18."""


class Health:
    """Counts the steps that the optimizer skipped, with equal arguments on all ranks."""

    def __init__(self) -> None:
        self.skipped_in_row = 0
        """Steps skipped since the last one that changed the weights."""
        self._loss_is_finite = True

    def count(self, skipped: bool, loss_is_finite: bool) -> None:
        """Count a step."""
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        self._loss_is_finite = loss_is_finite

    @property
    def diverged(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.skipped_in_row >= SKIPPED_LIMIT

    @property
    def doubtful(self) -> bool:
        """Whether the last step was skipped and its loss was not finite: finite weights may be of no use."""
        return self.skipped_in_row > 0 and not self._loss_is_finite


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


def find_not_finite(engine: Any) -> str | None:
    """Name a weight or an optimizer state that is not finite on any rank; None if all are. All ranks call it.

    Each tensor is read once. The name is that of the lowest rank that has one, such as `layer 3: attention.out.weight
    (rank 1)` or `optimizer state exp_avg of embedding.weight (rank 0)`.
    """
    own = _find(engine)
    device = next(engine.module.parameters()).device
    found = torch.tensor([own is not None], dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if not int(found):
        return None
    return next(f"{name} (rank {rank})" for rank, name in enumerate(gather(own)) if name is not None)


def _find(engine: Any) -> str | None:
    """Name this rank's first tensor that is not finite."""
    tensors = list(_weights(engine)) + list(_optimizer_tensors(engine))
    # The largest magnitude is NaN if any number is. A sum could overflow where all numbers are finite.
    largest = [torch.linalg.vector_norm(tensor.detach(), math.inf).float() for _, tensor, _ in tensors]
    if not largest:
        return None
    wrong = (~torch.stack(largest).isfinite()).nonzero()
    if not len(wrong):
        return None
    what, tensor, slices = tensors[int(wrong[0])]
    if slices is None:
        return what
    place = int((~tensor.detach().isfinite()).flatten().nonzero()[0])
    names = (name for name, at in slices.items() if at.start <= place < at.start + at.numel)
    return f"{what} of {_shown(next(names, 'padding'))}"


def _weights(engine: Any) -> Iterator[tuple[str, torch.Tensor, Any]]:
    for name, parameter in engine.module.named_parameters():
        if parameter.numel():
            yield _shown(name), parameter, None


def _optimizer_tensors(engine: Any) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Master weights and optimizer state: flat tensors over many parameters, with the place of each parameter."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    slices = getattr(engine.optimizer, "_param_slice_mappings", None)
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            flat = None if parameter in names else (slices[number] if slices else {})
            of = f" of {_shown(names[parameter])}" if parameter in names else ""
            if flat is not None and parameter.numel():
                yield "fp32 copy", parameter, flat
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                    yield f"optimizer state {key}{of}", value, flat if value.dim() else None


def _shown(name: str) -> str:
    """`layer 3: attention.out.weight` for DeepSpeed's `3.attention.out.weight`."""
    name = re.sub(r"^tied_modules\.", "", name)
    return re.sub(r"^(\d+)\.", r"layer \1: ", name)
