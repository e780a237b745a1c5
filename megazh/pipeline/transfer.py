"""Hidden states to the next stage and gradients back, sent and received while the stages compute.

Each direction between two stages has a process group of its own, and so on GPUs its own stream and order: a gradient
never waits for hidden states. On GPUs a pending send or receive occupies some of the card's multiprocessors until the
other side arrives, so no receive is started long before its sender is ready.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Tensors = tuple[torch.Tensor, ...]
_SENDS_KEPT = 2
"""Latest sends whose tensors are kept. An older one has been received by then, so that waiting for it costs nothing."""


class Channel:
    """One direction between this rank and the rank of a neighbouring stage."""

    def __init__(self, group: Any, peer: int) -> None:
        self._group, self._peer = group, peer
        self._sent: deque[tuple[list[Any], Tensors]] = deque()
        self._coming: tuple[list[Any], Tensors] | None = None

    def send(self, tensors: Tensors) -> None:
        """Start sending; the tensors must not be written to before `finish`."""
        tensors = tuple(tensor.detach() for tensor in tensors)
        self._sent.append(([dist.isend(tensor, self._peer, self._group) for tensor in tensors], tensors))
        self._wait(_SENDS_KEPT)

    def expect(self, place: Callable[[], Tensors]) -> None:
        """Start receiving into the tensors that `place` returns."""
        tensors = place()
        self._coming = ([dist.irecv(tensor, self._peer, self._group) for tensor in tensors], tensors)

    def receive(self, place: Callable[[], Tensors]) -> Tensors:
        """Return what the neighbour sends, in the tensors of `place`; starts receiving unless `expect` has."""
        if self._coming is None:
            self.expect(place)
        assert self._coming is not None
        works, received = self._coming
        self._coming = None
        for work in works:
            work.wait()
        return received

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        self._wait(0)

    def _wait(self, left: int) -> None:
        while len(self._sent) > left:
            for work in self._sent.popleft()[0]:
                work.wait()


class Transfers:
    """The channels of this rank's stage; all ranks make one at the same time."""

    def __init__(self, topology: Any, device: torch.device) -> None:
        """Connect this rank's stage with its neighbours.

        Args:
            topology: DeepSpeed's process topology, with the axes pipe and data.
            device: the device of the tensors that travel.
        """
        stages, replicas = topology.get_dim("pipe"), topology.get_dim("data")
        self.from_previous: Channel | None = None
        self.to_previous: Channel | None = None
        self.from_next: Channel | None = None
        self.to_next: Channel | None = None
        for replica in range(replicas):
            for stage in range(stages - 1):
                pair = [topology.get_rank(pipe=each, data=replica) for each in (stage, stage + 1)]
                # torch.distributed requires that every rank makes every group, in the same order.
                forth, back = dist.new_group(pair), dist.new_group(pair)
                if dist.get_rank() == pair[0]:
                    self.to_next, self.from_next = Channel(forth, pair[1]), Channel(back, pair[1])
                elif dist.get_rank() == pair[1]:
                    self.from_previous, self.to_previous = Channel(forth, pair[0]), Channel(back, pair[0])
        self._connect(self.from_previous, self.to_next, device)
        self._connect(self.from_next, self.to_previous, device)

    def _connect(self, source: Channel | None, target: Channel | None, device: torch.device) -> None:
        """Connect now, in an order that cannot deadlock: NCCL connects at first use and waits for the other side."""
        empty = (torch.zeros(1, device=device),)
        if source is not None:
            source.receive(lambda: empty)
        if target is not None:
            target.send(empty)
            target.finish()

    def finish(self) -> None:
        """Wait until everything that this rank has sent has arrived."""
        for channel in (self.to_next, self.to_previous):
            if channel is not None:
                channel.finish()
