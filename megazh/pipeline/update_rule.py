"""What an optimizer does to one shard: the part of it that knows nothing of ranks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch


@dataclass
class Shard:
    """What one rank owns of a group of parameters: a range of their elements, one after the other."""

    weights: torch.Tensor
    """(elements,) fp32 master weights, updated in place."""
    gradient: torch.Tensor
    """(elements,) fp32 gradient; a rule may overwrite it."""
    state: dict[str, torch.Tensor]
    """State by kind, each (elements,) or one number per block."""
    weight_decay: float
    """Decoupled weight decay of the group."""
    matrices: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    """Begin and shape of each matrix in the shard; only where the rule owns whole matrices."""


class UpdateRule(ABC):
    """An optimizer's update of a shard."""

    whole_matrices: ClassVar[bool] = False
    """Whether a rank owns whole matrices instead of any range of elements."""
    blocks: ClassVar[Mapping[str, int]] = {}
    """Elements per number of a kind of state, where that is not one."""

    @abstractmethod
    def make_state(self, elements: int, device: torch.device) -> dict[str, torch.Tensor]:
        """The state of a shard of this many elements (a multiple of 256) before the first update."""

    @abstractmethod
    def update(self, shard: Shard, learning_rate: float, number: int) -> None:
        """Update a shard.

        Args:
            shard: weights, gradient and state.
            learning_rate: the rate of this step.
            number: number of the update, from 1.
        """
