"""Ranks that are slower than the others for long: found by comparing times, and named with what differs.

All ranks wait for each other in each step, so its duration is the same everywhere. What is compared is the time that a
rank computes by itself (`megazh.pipeline.busy_clock`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from megazh.training.collect import gather
from megazh.training.layout import Layout
from megazh.training.rank_state import StateQuery, differences

if TYPE_CHECKING:
    from megazh.training.session import Session

SLOWER = 0.10
"""Excess of a rank's time over the usual one from which it is slow, as a share."""
IN_ROW = 3
"""Comparisons in a row after which a rank that is slow in each of them is named, or is no longer called slow."""
MEASURED = 5
"""Steps before each comparison that are timed, or as many as lie between two. The fastest of them counts, so that a
hiccup is no slowness."""
_OWN_PAST = "itself before, in proportion to the other stages"
_PAST = 5  # comparisons that make up the past of a rank that is alone in its stage


@dataclass(frozen=True)
class Slow:
    """A rank that has been slow in the last `IN_ROW` comparisons."""

    rank: int
    seconds: float
    """Time that it computes in a step."""
    usual: float
    """Time that it should take."""
    yardstick: str
    """What that is the time of."""

    @property
    def excess(self) -> float:
        """Excess over the usual time, as a share of that."""
        return self.seconds / self.usual - 1


class SlowRanks:
    """Compares the times of ranks. All ranks make one and add the same times.

    A rank is compared with the median of the other ranks of its stage. Where it is the only one, it is compared with
    its own past: the median of the first comparisons of this attempt, times the median of the factors by which the
    times of the other stages have grown since then. The costs by which a model is cut into stages are not exact
    enough to be compared with: they would have to be right to some percent for embedding, blocks and head.

    Args:
        every: steps between comparisons; 0: none.
        layout: the arrangement of the ranks.
    """

    def __init__(self, every: int, layout: Layout) -> None:
        self._every = every if layout.ranks > 1 else 0  # nobody is slower than others there
        self._layout = layout
        self._own: list[float] = []
        self._is_warm = False
        self._in_row = [0] * layout.ranks
        """Comparisons in a row in which a rank was slow or, below 0, was not."""
        self._named: set[int] = set()
        self._kind: object = None
        self._past: list[list[float]] = [[] for _ in range(layout.ranks)]

    def measures(self, step: int) -> bool:
        """Whether this step is to be timed; steps are numbered from 1."""
        return bool(self._every) and -step % self._every < MEASURED

    def shared(self, step: int, rank: int, seconds: float) -> list[float]:
        """What a rank has to give to all at the end of a step: its fastest time at its own place, zeros elsewhere.

        Empty where no comparison is due.
        """
        if seconds:
            self._own.append(seconds)
        if not self._every or step % self._every or not self._own:
            return []
        fastest, self._own = min(self._own), []
        return [fastest if each == rank else 0.0 for each in range(self._layout.ranks)]

    def compare(self, seconds: Sequence[float], kind: object) -> tuple[list[Slow], list[int]]:
        """Compare the times of all ranks.

        Args:
            seconds: time by rank.
            kind: what the work of a step depends on. Where it changes, the past of ranks begins anew.

        Returns:
            The ranks to name now, and those of the named ones that are slow no longer.
        """
        if not self._is_warm:  # kernels are compiled, and caches filled, by the first comparison of an attempt
            self._is_warm = True
            return [], []
        if kind != self._kind:
            self._kind, self._past = kind, [[] for _ in seconds]
        found, over = [], []
        for rank, (usual, yardstick) in enumerate(self._usual(seconds)):
            if math.isinf(usual):  # nothing was compared
                continue
            is_slow, row = seconds[rank] > usual * (1 + SLOWER), self._in_row[rank]
            row = self._in_row[rank] = max(row, 0) + 1 if is_slow else min(row, 0) - 1
            if row >= IN_ROW and rank not in self._named:
                self._named.add(rank)
                found.append(Slow(rank, seconds[rank], usual, yardstick))
            elif row <= -IN_ROW and rank in self._named:
                self._named.discard(rank)
                over.append(rank)
        for past, each in zip(self._past, seconds, strict=True):
            if len(past) < _PAST:
                past.append(each)
        return found, over

    @property
    def suspects(self) -> bool:
        """Whether the next comparison may name a rank."""
        return any(row == IN_ROW - 1 and rank not in self._named for rank, row in enumerate(self._in_row))

    def _usual(self, seconds: Sequence[float]) -> list[tuple[float, str]]:
        """The time that each rank should take, and what that is the time of; inf where nobody knows."""
        replicas = self._layout.replicas
        if replicas > 1:
            stages = [list(seconds[begin : begin + replicas]) for begin in range(0, len(seconds), replicas)]
            return [
                (statistics.median(stage[:at] + stage[at + 1 :]), "the other ranks of its stage")
                for stage in stages
                for at in range(replicas)
            ]
        if any(len(past) < _PAST for past in self._past):
            return [(math.inf, "")] * len(seconds)
        past = [statistics.median(each) for each in self._past]
        changes = [now / before for now, before in zip(seconds, past, strict=True)]
        return [
            (
                # At least its own past: where another stage has become faster, this one has not become slow.
                past[at] * max(1.0, statistics.median(changes[:at] + changes[at + 1 :])),
                _OWN_PAST,
            )
            for at in range(len(seconds))
        ]


class SlowRankWatch:
    """Follows the steps of a session, and names its slow ranks. All ranks make one, and call its methods together.

    Args:
        session: the session.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._rank = session, dist.get_rank()
        self._ranks = SlowRanks(session.recipe.logging.slow_ranks_every, session.layout)
        self._query: StateQuery | None = None

    def measures(self, step: int) -> bool:
        """Whether this step is to be timed."""
        return self._ranks.measures(step)

    def shared(self, step: int, seconds: float) -> list[float]:
        """What this rank gives to all in the reduction of a step, see `SlowRanks.shared`."""
        return self._ranks.shared(step, self._rank, seconds)

    def follow(self, step: int, seconds: Sequence[float]) -> None:
        """Compare the times that all ranks have shared, and write an event for each rank to be named.

        The state of the ranks' devices is looked at in the background one comparison before, while they compute.

        Args:
            step: the step that has just ended.
            seconds: the largest of what ranks have shared, by rank; empty where no comparison is due.
        """
        if not seconds:
            return
        session = self._session
        kind = (session.course.samples(step - 1), session.course.length(step - 1))
        found, over = self._ranks.compare(seconds, kind)
        if found:
            states = gather(self._query.result() if self._query else {})
            for slow in found:
                self._name(slow, step, differences(states, slow.rank, self._peers(slow.rank)))
        for rank in over:
            text = f"{self._place(rank)} is as fast as usual again"
            session.metrics.event(step, "slow_rank_over", text, rank=rank)
        self._query = StateQuery(session.device) if self._ranks.suspects else None

    def _name(self, slow: Slow, step: int, what: str) -> None:
        text = (
            f"{self._place(slow.rank)} is slow: it computes {slow.seconds:.4g} s a step, {slow.excess:.0%} more than "
            f"{slow.yardstick} ({slow.usual:.4g} s), {IN_ROW} times in a row; {what}"
        )
        figures = {"seconds": slow.seconds, "usual": slow.usual, "excess": round(slow.excess, 4)}
        self._session.metrics.event(step, "slow_rank", text, rank=slow.rank, differs=what, **figures)

    def _place(self, rank: int) -> str:
        stage, replica = divmod(rank, self._session.layout.replicas)
        return f"rank {rank} (stage {stage}, replica {replica})"

    def _peers(self, rank: int) -> list[int]:
        """The ranks that a rank's device is compared with."""
        layout = self._session.layout
        if layout.replicas == 1:
            return [each for each in range(layout.ranks) if each != rank]
        first = rank // layout.replicas * layout.replicas
        return [each for each in range(first, first + layout.replicas) if each != rank]
