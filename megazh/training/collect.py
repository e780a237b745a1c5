"""Values of all ranks, for all ranks, over the process group of the run."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def gather(value: Any) -> list[Any]:
    """The value that each rank gives, by rank. All ranks call it."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def of_rank_0(value: Any) -> Any:
    """The value that rank 0 gives; the values of the others are ignored. All ranks call it."""
    return gather(value if dist.get_rank() == 0 else None)[0]


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The maximum of each value over all ranks. All ranks call it, with as many values; `device` is this rank's."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()
