"""A torch.distributed backend for one rank whose peers are absent: what they would send is made up, and is finite.

torch's own "fake" backend leaves outputs unwritten (which ones depends on the release), so that a step computes with
what lies in that memory. Here every operation that returns has written its outputs, without memory of its own, and an
operation that is not written below is an error.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

BACKEND = "absent"
_SCALE = 0.01
"""Standard deviation of received hidden states and gradients."""


_ProcessGroup: Any = dist.ProcessGroup  # its type stub has overloads that torch.distributed never calls


class _Done(dist.Work):
    """An operation that has ended."""

    def wait(self, timeout: Any = None) -> bool:
        """True, at once."""
        return True

    def is_completed(self) -> bool:
        """True."""
        return True


class AbsentRanks(_ProcessGroup):
    """A process group whose other ranks are absent.

    | operation | absent ranks |
    |---|---|
    | reductions | contribute nothing: the result is this rank's part of its own input |
    | gathers | contribute what this rank does |
    | broadcast | have what this rank has: the tensors stay as they are |
    | receive | send random numbers, or a document map of one document a row |

    Methods have the arguments of `torch.distributed.ProcessGroup`.
    """

    def __init__(self, rank: int, ranks: int, seq_len: int) -> None:
        super().__init__(rank, ranks)
        self._rank, self._ranks, self._seq_len = rank, ranks, seq_len

    def size(self) -> int:
        """Number of ranks, absent ones included."""
        return self._ranks

    def rank(self) -> int:
        """Number of this rank in the group."""
        return self._rank

    def getBackendName(self) -> str:
        """The name of this backend."""
        return BACKEND

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> dist.Work:
        """Leave the tensors: the sum (or maximum) of what this rank has."""
        return _Done()

    reduce = broadcast = allreduce

    def barrier(self, opts: Any = None) -> dist.Work:
        """Wait for nobody."""
        return _Done()

    def allgather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> dist.Work:
        """Copy each input to the places of all ranks."""
        for places, own in zip(outputs, inputs, strict=True):
            for place in places:
                place.detach().copy_(own.detach())
        return _Done()

    def all_gather_single(self, output: torch.Tensor, own: torch.Tensor, opts: Any = None) -> dist.Work:
        """The same, with one tensor for all places."""
        return self.allgather([output.view(self._ranks, *own.shape).unbind()], [own])

    def reduce_scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], opts: Any = None
    ) -> dist.Work:
        """Copy this rank's shard of the inputs."""
        for output, shards in zip(outputs, inputs, strict=True):
            output.detach().copy_(shards[self._rank].detach())
        return _Done()

    def reduce_scatter_single(self, output: torch.Tensor, whole: torch.Tensor, opts: Any = None) -> dist.Work:
        """The same, with the shards side by side in one tensor."""
        return self.reduce_scatter([output], [whole.view(self._ranks, *output.shape).unbind()])

    # The names of these two up to torch 2.12.
    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single

    def send(self, tensors: Sequence[torch.Tensor], target: int, tag: int = 0) -> dist.Work:
        """Drop the tensors."""
        return _Done()

    def recv(self, tensors: Sequence[torch.Tensor], source: int, tag: int = 0) -> dist.Work:
        """Make up what a neighbouring stage sends: hidden states or gradients in floats, a document map in integers."""
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.normal_(0, _SCALE)
                continue
            position_ids, cu_seqlens = tensor[:, : self._seq_len], tensor[:, self._seq_len :]
            position_ids.copy_(torch.arange(self._seq_len, device=tensor.device))
            cu_seqlens.fill_(self._seq_len)
            cu_seqlens[:, 0] = 0
        return _Done()


def join(rank: int, ranks: int, seq_len: int) -> None:
    """Make this process rank number `rank` of a world of `ranks` ranks, the others absent.

    Args:
        rank: number of this rank, from 0.
        ranks: number of ranks.
        seq_len: tokens per sample, for document maps.
    """

    def make(store: Any, group_rank: int, group_size: int, timeout: Any) -> AbsentRanks:
        return AbsentRanks(group_rank, group_size, seq_len)

    dist.Backend.register_backend(BACKEND, make, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=ranks)
