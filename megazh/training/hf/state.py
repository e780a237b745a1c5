"""The training state under Hugging Face's Trainer as named pieces, so that checkpoints are those of any other run.

Weights are written as tensors of transformers, into one file beside a `config.json`; the manifest names the ranges of
a `Decoder`'s parameters that they are. Masters and AdamW's averages are ranges of the same parameters.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megazh.exchange.tensor_names import HfTensor
from megazh.pipeline.state import MASTER, WEIGHT, Piece, StoredAs
from megazh.training.hf.model import PackedModel

WEIGHTS_FILE = "model.safetensors"
"""File of the weights in a checkpoint, named as transformers expects it."""

_KINDS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """This rank's weights, masters and optimizer state. All ranks make one, once the optimizer is prepared.

    Args:
        model: the model.
        optimizer: torch's AdamW, over the model's parameters or over the flat shards that DeepSpeed made of them.
        sharded: whether DeepSpeed shards the state over the ranks (ZeRO).
        rank: number of this rank.
    """

    name = "adamw"

    def __init__(self, model: PackedModel, optimizer: torch.optim.Optimizer, sharded: bool, rank: int) -> None:
        self._model, self._optimizer, self._sharded, self._rank = model, optimizer, sharded, rank
        self._counts: list[torch.Tensor] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._counts.append(_make_state(optimizer.state[parameter], parameter, group["fused"]))

    @property
    def updates(self) -> int:
        """Updates since the state began."""
        return int(self._counts[0])

    @updates.setter
    def updates(self, count: int) -> None:
        for each in self._counts:
            each.fill_(float(count))

    def pieces_to_save(self) -> list[Piece]:
        """What this rank writes to a checkpoint; rank 0 writes the weights, and all state that is not sharded."""
        pieces = list(self._weights()) if self._rank == 0 else []
        if self._sharded or self._rank == 0:
            # Masters of fp32 weights are equal to them.
            pieces += [each for each in self._state() if each.kind != MASTER or self._rounded]
        return pieces

    def pieces_to_load(self) -> list[Piece]:
        """What this rank needs of a checkpoint."""
        return [*self._weights(), *self._state()]

    @property
    def _rounded(self) -> bool:
        """Whether weights are rounded copies of their masters."""
        return next(self._model.parameters()).dtype is not torch.float32

    def _weights(self) -> Iterator[Piece]:
        for tensor, parameter in self._model.named_tensors():
            stored = StoredAs(WEIGHTS_FILE, tensor.name, tensor.shape)
            yield _piece(tensor, WEIGHT, 0, parameter.detach().view(-1), stored)

    def _state(self) -> Iterator[Piece]:
        for tensor, parameter in self._model.named_tensors():
            if not self._sharded:
                for kind in _KINDS:
                    yield _piece(tensor, kind, 0, self._optimizer.state[parameter][kind].view(-1))
                continue
            shard = _shard_of(parameter, self._optimizer)
            if shard is None:
                continue
            begin, place, size, flat = shard
            for kind, values in [
                (MASTER, flat.detach()),
                *((kind, self._optimizer.state[flat][kind]) for kind in _KINDS),
            ]:
                yield _piece(tensor, kind, begin, values[place : place + size])


def _make_state(state: dict[str, Any], parameter: torch.Tensor, fused: bool) -> torch.Tensor:
    """Make AdamW's state as its first step would; returns the count of updates."""
    device = parameter.device if fused else torch.device("cpu")
    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    for kind in _KINDS:
        state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state["step"]


def _piece(tensor: HfTensor, kind: str, begin: int, values: torch.Tensor, stored: StoredAs | None = None) -> Piece:
    """A range of a tensor, from its element `begin` on, as one of the parameter that it is a part of."""
    first = tensor.begin * math.prod(tensor.parameter_shape[1:]) + begin
    shape = tensor.parameter_shape
    return Piece(tensor.parameter, kind, shape, first, first + values.numel(), values, stored_as=stored)


def _shard_of(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> tuple[int, int, int, torch.Tensor] | None:
    """First element of a parameter in this rank's shard, its place there, the number of elements, and the flat shard.

    DeepSpeed links each parameter to its range of the shard, for its own universal checkpoints. None: there is none.
    """
    link = getattr(parameter, "_hp_mapping", None)
    if link is None:
        return None
    flat = optimizer.param_groups[link.param_group_index]["params"][0]
    return link.lp_fragment_address.start, link.hp_fragment_address.start, link.hp_fragment_address.numel, flat
