"""Examine all hosts of a job, and compare them: versions, shared disk, clocks, connections, network speed."""

import secrets
import time
from collections.abc import Sequence
from typing import NamedTuple

from megazh.cluster.doctor.examine import Wanted
from megazh.cluster.doctor.messages import Hello, Order, Rate, Seen
from megazh.cluster.doctor.reach import Message, Program, Reached
from megazh.cluster.doctor.report import VERSION, Finding, Pair, Report, Verdict
from megazh.config import ConfigType, from_mapping
from megazh.errors import UsageError
from megazh.progress import Elapsed

_HELLO_SECONDS = 90.0
_LOOK_SECONDS = 90.0
_RATE_SECONDS = 20.0
_SPARE_SECONDS = 120.0
_SKEW_SECONDS = 1.0
_LATE_SECONDS = 5.0
_HARMLESS = {"linux", "driver"}
"""Facts that may differ between hosts, at some risk; all others decide results or the protocol between ranks."""


class Examined(NamedTuple):
    """Examination of several hosts."""

    reports: list[Report]
    """Of the hosts that answered."""
    across: list[Finding]
    """Comparison of the hosts."""
    between: list[Pair]
    """Links between hosts."""
    seconds: float


def examine_hosts(programs: Sequence[Program], names: list[str], wanted: Wanted) -> Examined:
    """Examine hosts.

    Args:
        programs: what reaches them; see `megazh.cluster.doctor.reach`.
        names: the name of each host until it says its own.
        wanted: what to look at on each host.
    """
    begin = time.monotonic()
    with Reached(programs) as reached, Elapsed("doctor") as elapsed:
        run = _Run(reached, list(names), elapsed)
        run.examine(wanted)
    return Examined(run.reports, run.across, run.between, time.monotonic() - begin)


class _Run:
    """One examination of several hosts."""

    def __init__(self, reached: Reached, names: list[str], elapsed: Elapsed) -> None:
        self._reached, self._names, self._elapsed = reached, names, elapsed
        self._alive = set(range(len(names)))
        self.reports: list[Report] = []
        self.across: list[Finding] = []
        self.between: list[Pair] = []

    def examine(self, wanted: Wanted) -> None:
        order = Order(
            secret=secrets.token_hex(16),
            folder=str(wanted.folder),
            limit=wanted.limit,
            recipe=wanted.recipe,
            settings=wanted.settings,
        )
        self._reached.tell(order.model_dump())
        hellos: dict[int, Hello] = {}
        for message in self._until("hello", _HELLO_SECONDS):
            hello = self._valid(message, Hello)
            if hello is not None:
                hellos[message.host] = hello
                self._names[message.host] = hello.host
        if not hellos:
            return
        hosts = sorted(hellos)
        self._reached.tell({"peers": [hellos[host].model_dump() for host in hosts]})
        for message in self._until("looked", _LOOK_SECONDS + 40 * len(hosts), "seen"):
            seen = self._valid(message, Seen)
            if seen is not None and seen.peer < len(hosts):
                self._judge_view(message.host, hosts[seen.peer], seen, str(wanted.folder))
        self._summarize_views(len(hosts), str(wanted.folder))
        self._measure(hosts)
        self._reached.tell({"examine": True})
        answered: dict[int, Report] = {}
        for message in self._until("report", wanted.limit + _SPARE_SECONDS):
            report = self._valid(message, Report)
            if report is not None and report.version != VERSION:
                text = f"{report.host} has another version of the report ({report.version})"
                self._add(Verdict.BAD, text, "install the same megazh on all hosts")
            elif report is not None:
                answered[message.host] = report
        self.reports = [answered[host] for host in sorted(answered)]
        self.across += compare(self.reports)

    def _until(self, last: str, seconds: float, kind: str = "") -> list[Message]:
        """Messages of `kind` (default: `last`) until each living host has sent one of `last`, or has ended."""
        found: list[Message] = []
        waiting = set(self._alive)
        end = time.monotonic() + seconds
        while waiting:
            self._elapsed.tick()
            message = self._reached.next(min(1.0, end - time.monotonic()))
            if message is None:
                if time.monotonic() >= end:
                    break
                continue
            if message.kind == (kind or last):
                found.append(message)
            if message.kind == last:
                waiting.discard(message.host)
            if message.kind in ("end", "failed") and message.host in waiting:
                self._lost(message.host, str(message.value.get("why", ""))[:300])
                waiting.discard(message.host)
        for host in sorted(waiting):
            self._lost(host, f"no answer in {seconds:.0f} s")
        return found

    def _lost(self, host: int, why: str) -> None:
        self._alive.discard(host)
        remedy = "see that 'ssh HOST true' or 'srun hostname' works, and that megazh is under the same path there"
        self._add(Verdict.BAD, f"{self._names[host]}: {why}", remedy)

    def _valid(self, message: Message, model: type[ConfigType]) -> ConfigType | None:
        try:
            return from_mapping(message.value, model, self._names[message.host])
        except UsageError as error:
            self._lost(message.host, f"its answer is no {message.kind}: {error}")
            return None

    def _judge_view(self, host: int, other: int, seen: Seen, folder: str) -> None:
        pair = f"{self._names[host]} to {self._names[other]}"
        if seen.failure:
            remedy = "open TCP ports between the hosts in the firewall, and see their routes (ip route)"
            self._add(Verdict.BAD, f"{pair}: no connection ({seen.failure})", remedy)
        elif abs(seen.ahead) > _SKEW_SECONDS:
            text = f"{pair}: the clock is {seen.ahead:+.1f} s off"
            self._add(
                Verdict.WARNING, text, "synchronize clocks (timedatectl set-ntp true): logs and limits go by them"
            )
        if seen.file_seconds is None:
            remedy = "put runs and data on a disk that all hosts share, and name a folder of it with -r"
            self._add(Verdict.BAD, f"{pair}: its file in {folder} is not seen: that is no shared disk", remedy)
        elif seen.file_seconds > _LATE_SECONDS:
            text = f"{pair}: its file in {folder} is seen after {seen.file_seconds:.1f} s"
            self._add(
                Verdict.WARNING,
                text,
                "the disk shows files late; ranks wait for them for a minute (mount with actimeo=1)",
            )

    def _summarize_views(self, hosts: int, folder: str) -> None:
        if hosts < 2:
            self._add(Verdict.SKIPPED, "connections, clocks and shared disk: only one host has answered")
        elif not self.across:
            text = f"{hosts} hosts reach one another, see one another's files in {folder}, and their clocks agree"
            self._add(Verdict.OK, text)

    def _measure(self, hosts: list[int]) -> None:
        """Time one TCP connection from each host to the next, one after the other."""
        if len(hosts) < 2:
            return
        for place in range(len(hosts) if len(hosts) > 2 else 1):
            other = (place + 1) % len(hosts)
            if not {hosts[place], hosts[other]} <= self._alive:
                continue
            self._reached.tell({"measure": [place, other]})
            end = time.monotonic() + _RATE_SECONDS
            while (message := self._reached.next(end - time.monotonic())) is not None and message.kind != "rate":
                if message.kind == "end":
                    self._lost(message.host, str(message.value.get("why", ""))[:300])
            rate = self._valid(message, Rate) if message is not None else None
            names = self._names[hosts[place]], self._names[hosts[other]]
            if rate is None or not rate.gb_s > 0:
                self._add(Verdict.SKIPPED, f"{names[0]} to {names[1]}: speed: no connection")
                continue
            text = f"{names[0]} to {names[1]}: {rate.gb_s:.2f} GB/s by one TCP connection"
            self._add(Verdict.OK, text)
            self.between.append(Pair(first=names[0], second=names[1], send_gb_s=rate.gb_s))

    def _add(self, verdict: Verdict, text: str, remedy: str = "") -> None:
        text, remedy = (" ".join(each.split())[:500] for each in (text, remedy))
        self.across.append(Finding(subject="hosts", verdict=verdict, text=text, remedy=remedy))


def compare(reports: list[Report]) -> list[Finding]:
    """Compare versions and cards of hosts; for each difference a line that names the hosts of each value."""
    if len(reports) < 2:
        return []
    found = []
    names = sorted({name for report in reports for name in report.facts})
    for name in names:
        values: dict[str, list[str]] = {}
        for report in reports:
            values.setdefault(report.facts.get(name, "unknown"), []).append(report.host)
        if len(values) > 1:
            listed = "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in values.items())
            text = f"{name} differs: {listed}"
            verdict = Verdict.WARNING if name in _HARMLESS else Verdict.BAD
            remedy = "install the same version on all hosts, or use one .venv on the shared disk"
            found.append(Finding(subject="hosts", verdict=verdict, text=text, remedy=remedy))
    if not found:
        text = f"equal on all {len(reports)} hosts: {', '.join(names)}"
        found.append(Finding(subject="hosts", verdict=Verdict.OK, text=text))
    cards = {report.host: f"{len(report.cards)} x {', '.join(sorted(set(report.cards)))}" for report in reports}
    if len(set(cards.values())) > 1:
        text = f"GPUs differ: {'; '.join(f'{host} has {card}' for host, card in cards.items())}"
        remedy = "the slowest card sets the pace; give the hosts' own slots in the hostfile"
        found.append(Finding(subject="hosts", verdict=Verdict.WARNING, text=text, remedy=remedy))
    return found
