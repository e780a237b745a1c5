"""Which ranks go to which host: whole pipelines, or whole stages, inside a host; chosen by what the network costs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

from megazh.model.counts import trained_counts
from megazh.pipeline.work import Work
from megazh.training.job import Host
from megazh.training.layout import Layout


@dataclass(frozen=True)
class Links:
    """Bandwidths in GB/s (1e9 bytes), in each direction."""

    inside: float = 10.0
    """Between two GPUs of one host; 10 is about what PCIe 4 x16 reaches through host memory."""
    between: float = 1.25
    """Of one host to the others, shared by its GPUs; 1.25 is 10 Gbit/s Ethernet."""


@dataclass(frozen=True)
class Traffic:
    """What the ranks of a run send in one optimizer step."""

    activations: float
    """Bytes of hidden states of one micro-batch, sent from a stage to the next; as many bytes of gradients go back."""
    micro_batches: int
    """Micro-batches per replica."""
    gradients: tuple[float, ...]
    """Bytes that each rank of a stage sends while gradients are reduced and weights are gathered; one per stage."""
    tied: float = 0.0
    """Bytes that first and last stage of a replica send each other for a tied matrix; 0 where there is none."""
    compute_seconds: float = 0.0
    """Seconds that a rank computes, during which hidden states travel unnoticed; 0: nothing is hidden."""


@dataclass(frozen=True)
class Placement:
    """Ranks of the slots, and what they cost."""

    inside: str
    """What stays inside of a host where it fits: `pipelines` or `stages`."""
    ranks_of_slots: tuple[int, ...]
    """Rank of each slot; slots are numbered host by host, and slot 0 has rank 0. A rank is stage * replicas + replica
    (see `megazh.training.layout`)."""
    seconds: float
    """Estimated seconds per step of communication that no computation hides."""
    pipelines_across: int
    """Replicas whose stages are on several hosts."""
    stages_across: int
    """Stages whose replicas are on several hosts."""


@dataclass(frozen=True)
class Choice:
    """The better placement, and the other one."""

    best: Placement
    other: Placement | None
    """None where there is but one: one host, one stage or one replica."""


def place(layout: Layout, hosts: Sequence[Host], traffic: Traffic, links: Links) -> Choice:
    """Choose what stays inside of the hosts.

    Pipelines inside: gradients of each stage are reduced across hosts. Stages inside: hidden states travel across
    hosts, and each host reduces the gradients of its own stages. Where hosts have room for a part of a pipeline or
    stage only, these parts make up further ones, which lie on several hosts.

    The estimate takes rings that leave each host once, as NCCL builds them, and full-duplex links.

    Args:
        layout: the layout.
        hosts: the hosts in the order of their slots; their slots together are `layout.ranks`.
        traffic: what the ranks send.
        links: bandwidths.

    Raises:
        ValueError: the slots are not as many as the ranks.
    """
    if sum(host.slots for host in hosts) != layout.ranks:
        raise ValueError(f"{sum(host.slots for host in hosts)} slots for {layout.ranks} ranks")
    replicas, stages = layout.replicas, layout.stages
    if len(hosts) == 1 or stages == 1 or replicas == 1:
        return Choice(_placement("pipelines", tuple(range(layout.ranks)), layout, hosts, traffic, links), None)
    by_pipeline, by_stage = [0] * layout.ranks, [0] * layout.ranks
    for replica, slots in enumerate(_groups(hosts, stages)):
        for stage, slot in enumerate(slots):
            by_pipeline[slot] = stage * replicas + replica
    for stage, slots in enumerate(_groups(hosts, replicas)):
        for replica, slot in enumerate(slots):
            by_stage[slot] = stage * replicas + replica
    both = [
        _placement(inside, tuple(ranks), layout, hosts, traffic, links)
        for inside, ranks in (("pipelines", by_pipeline), ("stages", by_stage))
    ]
    best, other = sorted(both, key=lambda placement: placement.seconds)  # stable: pipelines inside where both are equal
    return Choice(best, other)


def traffic_of(work: Work, parameters: Sequence[int], compute_seconds: float = 0.0) -> Traffic:
    """What the ranks of a run send in a step.

    Args:
        work: the work of a step.
        parameters: trained parameters of each stage.
        compute_seconds: see `Traffic`.
    """
    precision = work.precision
    # A ring moves all bytes but the shard of one rank, once of the gradient and once of the gathered weights.
    per_parameter = (precision.communication.bytes + precision.compute.bytes) * (work.replicas - 1) / work.replicas
    tied = work.stages > 1 and work.model.tie_word_embeddings
    embedding = trained_counts(work.model, work.lora).embedding
    return Traffic(
        activations=work.tokens * work.model.hidden_size * precision.compute.bytes,
        micro_batches=work.micro_batches,
        gradients=tuple(per_parameter * count for count in parameters),
        tied=precision.accumulation.bytes * embedding / work.replicas if tied else 0.0,  # each rank its own segment
        compute_seconds=compute_seconds,
    )


def describe(choice: Choice, links: Links) -> str:
    """One line: what crosses the hosts, and why."""
    best, other = choice.best, choice.other
    speeds = f"{links.inside:g} GB/s inside a host, {links.between:g} GB/s between hosts"
    if other is None:
        return f"{best.seconds:.2f} s of communication per step; {speeds}; estimated"
    crossing, apart = ("data", "pipeline") if best.inside == "pipelines" else ("pipeline", "data")
    exceptions = best.pipelines_across if best.inside == "pipelines" else best.stages_across
    noun = best.inside if exceptions > 1 else best.inside.removesuffix("s")
    but = f" but for {exceptions} {noun}, for which no host has room" if exceptions else ""
    return (
        f"{crossing} parallelism crosses the hosts, {best.inside} stay inside{but}: {best.seconds:.2f} s of "
        f"communication per step, {other.seconds:.2f} s if {apart} parallelism crossed; {speeds}; estimated"
    )


def _groups(hosts: Sequence[Host], size: int) -> list[list[int]]:
    """The slots in groups of `size`, as many of them on one host as fit; in the order of their first slots."""
    groups, left = [], []
    for end, host in zip(accumulate(host.slots for host in hosts), hosts, strict=True):
        slots = list(range(end - host.slots, end))
        whole = len(slots) // size * size
        groups += [slots[begin : begin + size] for begin in range(0, whole, size)]
        left += slots[whole:]
    groups += [left[begin : begin + size] for begin in range(0, len(left), size)]
    return sorted(groups)


def _placement(
    inside: str, ranks: tuple[int, ...], layout: Layout, hosts: Sequence[Host], traffic: Traffic, links: Links
) -> Placement:
    host_of_slot = list(chain.from_iterable([number] * host.slots for number, host in enumerate(hosts)))
    host_of_rank = [host for _, host in sorted(zip(ranks, host_of_slot, strict=True))]
    replicas, last = range(layout.replicas), layout.stages - 1
    hosts_of_stages = [
        host_of_rank[begin : begin + layout.replicas] for begin in range(0, layout.ranks, layout.replicas)
    ]

    def sent(source: int, target: int, size: float) -> list[_Message]:
        """Messages of one stage to another, in each replica."""
        return [_Message(hosts_of_stages[source][each], hosts_of_stages[target][each], size) for each in replicas]

    def seconds(local: float, messages: Iterable[_Message]) -> float:
        """Time of messages that travel together, of which the busiest GPU sends `local` bytes."""
        out, into = [0.0] * len(hosts), [0.0] * len(hosts)
        for message in messages:
            if message.source != message.target:
                out[message.source] += message.bytes
                into[message.target] += message.bytes
        return max(local / links.inside, max(*out, *into) / links.between) / 1e9

    rings = [
        _Message(host, following, size)
        for on_hosts, size in zip(hosts_of_stages, traffic.gradients, strict=True)
        for host, following in _ring(on_hosts)
    ]
    ways = [(stage, stage + 1) for stage in range(last)]
    ways += [(later, earlier) for earlier, later in ways]
    total = traffic.activations * traffic.micro_batches
    travel = seconds(total * min(2, last), chain.from_iterable(sent(*way, total) for way in ways))
    # The first micro-batch passes each boundary before the next stage can begin, and the last gradient comes back.
    filling = sum(seconds(traffic.activations, sent(*way, traffic.activations)) for way in ways)
    tied = seconds(traffic.tied, (*sent(0, last, traffic.tied), *sent(last, 0, traffic.tied))) if last else 0.0
    return Placement(
        inside=inside,
        ranks_of_slots=ranks,
        seconds=seconds(max(traffic.gradients), rings) + tied + filling + max(0.0, travel - traffic.compute_seconds),
        pipelines_across=sum(len(set(pipeline)) > 1 for pipeline in zip(*hosts_of_stages, strict=True)),
        stages_across=sum(len(set(stage)) > 1 for stage in hosts_of_stages),
    )


class _Message(NamedTuple):
    source: int
    """Number of the host that sends."""
    target: int
    bytes: float


def _ring(hosts: Iterable[int]) -> list[tuple[int, int]]:
    """The steps of a ring from host to host; none where there is one host."""
    around = sorted(set(hosts))
    return list(zip(around, [*around[1:], around[0]], strict=True)) if len(around) > 1 else []
