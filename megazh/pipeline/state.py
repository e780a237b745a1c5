"""The training state as named pieces: what a rank holds of a parameter, whatever the layout of stages and replicas."""

from dataclasses import dataclass

import torch

WEIGHT = "weight"
"""Kind of the model's weights, in the dtype that the model computes in."""
MASTER = "master"
"""Kind of the fp32 copies of the weights; there are none where the model computes in fp32."""


@dataclass(frozen=True)
class StoredAs:
    """The form in which another program knows a piece of the weights, which checkpoints keep for it."""

    file: str
    """Path of the file in a checkpoint."""
    key: str
    """Name of the tensor in the file."""
    shape: tuple[int, ...]
    """Shape of the tensor: whole rows of the parameter."""


@dataclass(frozen=True)
class Piece:
    """A range of elements of one parameter, or of the optimizer's state for them, in this rank's memory."""

    parameter: str
    """Global name of the parameter, the same in every layout, such as `blocks.3.mlp.up_proj.weight`."""
    kind: str
    """`weight`, `master`, or the optimizer's name of the state, such as `exp_avg`."""
    shape: tuple[int, ...]
    """Shape of the whole parameter, without rows that only pad it."""
    begin: int
    """First element of the range, counted in the flattened parameter."""
    end: int
    """Element behind the last."""
    values: torch.Tensor
    """1-D view of the rank's memory: one number per `block` elements of the range, rounded up."""
    block: int = 1
    """Elements of the parameter per number: 1, or the block size of block-wise scales."""
    stored_as: StoredAs | None = None
    """Form of a piece of the weights in checkpoints. Default: whole parameters, in a file for each layer."""
