"""ZeRO-1 (arXiv 1910.02054): fp32 gradient sums, master weights and optimizer state, each rank a shard.

The trained parameters of a stage are put one after the other into flat tensors, one per group of parameters with the
same rule and weight decay. Replica r owns the r-th of as many equal segments. Gradients are summed into a flat fp32
tensor (`main_grad`, see `megazh.model.main_grad`), reduce-scattered to their owners, updated there, and the new weights
are gathered. A rule that needs whole matrices (Muon) gets them by the order of the parameters: each matrix lies in one
segment, and the segments are about equally full.

A tied matrix, whose copies are on the first and the last stage, has a flat tensor of its own, so that the two copies
are cut alike. Each stage sums its gradient over its replicas, and then two ranks add the same segment of both sums:
a + b is b + a to the last bit, while the order in which three or more replicas are summed differs from stage to stage.

The same code serves fp32 and bf16, CPU and CUDA. In fp32 the weights are their own masters.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from megazh.model.main_grad import set_main_grad
from megazh.pipeline.parameters import NamedParameter
from megazh.pipeline.state import MASTER, WEIGHT, Piece
from megazh.pipeline.tuning import REDUCE_BUCKET_ELEMENTS
from megazh.pipeline.update_rule import Shard, UpdateRule

ALIGNMENT = 256
"""Parameters and shards begin at multiples of this many elements: the block size of 8-bit state."""


@dataclass(frozen=True)
class Totals:
    """Sums over all ranks, known before an update."""

    loss: float
    """Loss of the step, per token."""
    additional: tuple[float, ...]
    """Parts of it that are reported by themselves."""
    norm: float
    """Norm of the gradient of all weights, tied copies once."""


class _Group:
    """Parameters with the same rule and weight decay, in flat tensors; a tied matrix is alone in its group."""

    def __init__(self, members: Sequence[NamedParameter], rule: UpdateRule, decay: float, rank: int, ranks: int):
        self.rule = rule
        sizes = [_aligned(member.parameter.numel()) for member in members]
        if rule.whole_matrices:
            self.offsets, segment = _whole(members, sizes, ranks)
        else:
            self.offsets, total = [], 0
            for size in sizes:
                self.offsets.append(total)
                total += size
            segment = _aligned(-(-total // ranks))
        self.members = list(members)
        first = members[0].parameter
        self.weights = torch.zeros(segment * ranks, dtype=first.dtype, device=first.device)
        self.sums = torch.zeros(segment * ranks, dtype=torch.float32, device=first.device)
        self.begin, self.end = rank * segment, (rank + 1) * segment
        for member, offset in zip(members, self.offsets, strict=True):
            parameter = member.parameter
            place = slice(offset, offset + parameter.numel())
            self.weights[place].copy_(parameter.detach().flatten())
            parameter.data = self.weights[place].view_as(parameter)
            set_main_grad(parameter, self.sums[place].view_as(parameter))
        self.own = self.weights[self.begin : self.end]
        self.is_master = self.own.dtype is torch.float32
        self.shard = Shard(
            self.own if self.is_master else self.own.float(),
            self.sums[self.begin : self.end],
            rule.make_state(segment, first.device),
            decay,
            [
                (offset - self.begin, (member.parameter.shape[0], member.parameter.shape[1]))
                for member, offset in zip(members, self.offsets, strict=True)
                if rule.whole_matrices and self.begin <= offset < self.end
            ],
        )

    def reduce(self, group: dist.ProcessGroup | None, ranks: int, dtype: torch.dtype) -> None:
        """Sum the gradients over the replicas: each gets the sum of its own segment, sent in `dtype`."""
        own = self.shard.gradient
        if dtype is self.sums.dtype:
            dist.reduce_scatter_tensor(own, self.sums, group=group)
            return
        segments, bucket = self.sums.view(ranks, len(own)), max(1, REDUCE_BUCKET_ELEMENTS // ranks)
        for columns, target in zip(segments.split(bucket, 1), own.split(bucket), strict=True):
            sent = columns.to(dtype).flatten()
            received = sent.new_empty(len(target))
            dist.reduce_scatter_tensor(received, sent, group=group)
            target.copy_(received)

    def counted(self) -> Iterator[torch.Tensor]:
        """Slices of this rank's gradient that count in the norm: all but those of copies of a tied matrix."""
        begin = self.begin
        for member, offset in zip(self.members, self.offsets, strict=True):
            if member.is_copy:
                low, high = max(begin, offset), min(offset + member.parameter.numel(), self.end)
                if low < high:
                    yield self.sums[begin:low]
                    begin = high
        yield self.sums[begin : self.end]

    def pieces(self) -> Iterator[Piece]:
        """Masters and state of this rank's shard, by parameter."""
        kinds = dict(self.shard.state) if self.is_master else {MASTER: self.shard.weights, **self.shard.state}
        for member, offset in zip(self.members, self.offsets, strict=True):
            low, high = max(self.begin, offset), min(offset + member.numel, self.end)
            if low >= high:
                continue
            for kind, values in kinds.items():
                block = self.rule.blocks.get(kind, 1)
                view = values[(low - self.begin) // block : -(-(high - self.begin) // block)]
                yield Piece(member.name, kind, member.shape, low - offset, high - offset, view, block)


class ShardedOptimizer:
    """The optimizer of one rank.

    Args:
        name: the recipe's name of the optimizer; a state is resumed by the same one only.
        parameters: the parameters of this rank's stage. Frozen ones get neither gradient sums nor state.
        rule_of: rule and weight decay of a parameter that is trained.
        replicas: the process group of this stage's replicas; None: there is one.
        communication: dtype in which gradients travel between the replicas.
        max_grad_norm: norm that the gradient is clipped to; 0 turns clipping off.
        tied: the parameter that another stage has a copy of, if any, with the process group of the two ranks that hold
            the same segment of it.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[NamedParameter],
        rule_of: Callable[[NamedParameter], tuple[UpdateRule, float]],
        replicas: dist.ProcessGroup | None,
        communication: torch.dtype,
        max_grad_norm: float,
        tied: Mapping[nn.Parameter, dist.ProcessGroup] | None = None,
    ) -> None:
        self.name = name
        self.updates = 0
        """Updates since the state began; steps that were not accepted do not count."""
        self.accept: Callable[[float, float], bool] = lambda loss, norm: math.isfinite(norm)
        """Called with loss and gradient norm before each update; where any rank returns False, no weight changes."""
        self.learning_rate = 0.0
        self.max_grad_norm = max_grad_norm
        self._parameters, self._replicas, self._communication = list(parameters), replicas, communication
        self._ranks = 1 if replicas is None else dist.get_world_size(replicas)
        self._rank = 0 if replicas is None else dist.get_rank(replicas)
        by_group: dict[tuple[UpdateRule, float, dist.ProcessGroup | None], list[NamedParameter]] = {}
        for each in parameters:
            if each.parameter.requires_grad:
                by_group.setdefault((*rule_of(each), (tied or {}).get(each.parameter)), []).append(each)
        self._groups: list[_Group] = []
        self._tied: list[tuple[_Group, dist.ProcessGroup]] = []
        for (rule, decay, copies), members in by_group.items():
            group = _Group(members, rule, decay, self._rank, self._ranks)
            self._groups.append(group)
            if copies is not None:
                self._tied.append((group, copies))

    def reduce_gradients(self) -> None:
        """Sum the gradients over the replicas, and then those of a tied matrix over its copies."""
        if self._ranks > 1:
            for group in self._groups:
                group.reduce(self._replicas, self._ranks, self._communication)
        for group, copies in self._tied:
            dist.all_reduce(group.shard.gradient, group=copies)

    def totals(self, loss: torch.Tensor, additional: Sequence[torch.Tensor] = ()) -> Totals:
        """Sum loss and squared gradient norm over all ranks. All ranks call it, after `reduce_gradients`.

        Args:
            loss: this rank's part of the loss, a scalar; zero on all stages but the last.
            additional: the same for parts of the loss that are reported by themselves.
        """
        slices = [part for group in self._groups for part in group.counted() if len(part)]
        if self._device.type == "cpu":  # where torch's norm of ten million numbers is off by 4e-4
            slices = [chunk for part in slices for chunk in part.split(1 << 16)]
        squares = [torch.linalg.vector_norm(part).square() for part in slices]
        squared = torch.stack(squares).sum() if squares else torch.zeros_like(loss)
        sums = torch.stack([squared, loss, *additional])
        if dist.get_world_size() > 1:
            dist.all_reduce(sums)
        squared_norm, total, *rest = sums.tolist()
        return Totals(total, tuple(rest), math.sqrt(squared_norm) if squared_norm >= 0 else math.nan)

    @torch.no_grad()
    def step(self, totals: Totals) -> bool:
        """Clip, update, gather the new weights, and clear the gradients. All ranks call it.

        Returns:
            Whether the step was accepted; if not, weights and state are as they were.
        """
        accepted = self._agreed(self.accept(totals.loss, totals.norm), self._device)
        if accepted:
            self.updates += 1
            clip = self.max_grad_norm / (totals.norm + 1e-6) if self.max_grad_norm else 1.0
            for group in self._groups:
                if clip < 1:
                    group.shard.gradient.mul_(clip)
                group.rule.update(group.shard, self.learning_rate, self.updates)
                self._publish(group)
        self.clear_gradients()
        return accepted

    def restart(self) -> None:
        """Make the state that of an optimizer that has updated nothing."""
        self.updates = 0
        for group in self._groups:
            state = group.shard.state
            for kind, values in group.rule.make_state(len(group.shard.weights), group.own.device).items():
                state[kind].copy_(values)

    def clear_gradients(self) -> None:
        """Set all gradient sums to zero."""
        for group in self._groups:
            group.sums.zero_()

    def _publish(self, group: _Group) -> None:
        """Give the new weights of each shard to all replicas."""
        if not group.is_master:
            group.own.copy_(group.shard.weights)
        if self._ranks > 1:
            dist.all_gather_into_tensor(group.weights, group.own, group=self._replicas)

    @property
    def _device(self) -> torch.device:
        return self._parameters[0].parameter.device

    @staticmethod
    def _agreed(accepted: bool, device: torch.device) -> bool:
        """Whether all ranks accept."""
        if dist.get_world_size() == 1:
            return accepted
        flag = torch.tensor([accepted], dtype=torch.int32, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def pieces_to_save(self) -> list[Piece]:
        """What this rank writes to a checkpoint: weights of some layers, and masters and state of its shard.

        The replicas divide the layers of their stage. The last stage leaves a tied matrix to the first one.
        """
        return [*self._weights(saving=True), *(piece for piece in self._state() if not self._is_copy(piece))]

    def pieces_to_load(self) -> list[Piece]:
        """What this rank needs of a checkpoint: all weights of its stage, and masters and state of its shard."""
        return [*self._weights(saving=False), *self._state()]

    def _state(self) -> Iterator[Piece]:
        for group in self._groups:
            yield from group.pieces()

    def _is_copy(self, piece: Piece) -> bool:
        return any(each.is_copy and each.name == piece.parameter for each in self._parameters)

    def _weights(self, saving: bool) -> Iterator[Piece]:
        layers: dict[str, int] = {}
        for each in self._parameters:
            owner = layers.setdefault(layer_of(each.name), len(layers)) % self._ranks
            if saving and (each.is_copy or owner != self._rank):
                continue
            values = each.parameter.detach().view(-1)[: each.numel]
            yield Piece(each.name, WEIGHT, each.shape, 0, each.numel, values)


def layer_of(name: str) -> str:
    """`blocks.3` of `blocks.3.mlp.up_proj.weight`, `embedding` of `embedding.weight`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _whole(members: Sequence[NamedParameter], sizes: Sequence[int], ranks: int) -> tuple[list[int], int]:
    """Give each matrix to a replica, the largest first and each to the one with least so far.

    Returns:
        The offset of each matrix in the flat tensor, and the length of a replica's segment.
    """
    order = sorted(range(len(sizes)), key=lambda at: (-sizes[at], tuple(members[at].parameter.shape), at))
    filled = [0] * ranks
    places: list[tuple[int, int]] = [(0, 0)] * len(sizes)
    for at in order:
        rank = min(range(ranks), key=lambda each: (filled[each], each))
        places[at] = (rank, filled[rank])
        filled[rank] += sizes[at]
    segment = max(filled)
    return [rank * segment + offset for rank, offset in places], segment
