"""Launch ranks through another program (see `transport`), and watch them by their lifelines as if they were here."""

import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil

from megazh.cluster.hostfile import is_this_machine
from megazh.cluster.launchers.child import dying_along
from megazh.cluster.launchers.ending import Exit, Fault, report
from megazh.cluster.launchers.environment import refuse_copies
from megazh.cluster.launchers.hang import Stack, blame
from megazh.cluster.launchers.lifeline import (
    LAUNCH,
    Broken,
    Challenge,
    FromGuard,
    Goodbye,
    Hello,
    LaunchInfo,
    Link,
    Order,
    Progress,
    Signal,
    Stacks,
    Start,
    Text,
    from_guard,
    proof,
)
from megazh.cluster.launchers.rank_log import RankLog
from megazh.cluster.launchers.supervisor import SAVE_SECONDS, Events, Ranks, signals, supervise
from megazh.cluster.launchers.transport import Transport
from megazh.config import Config
from megazh.console import CONSOLE_LOG, open_console
from megazh.errors import WorkerError
from megazh.run.pulse import Pulse
from megazh.run.requests import check_private, write_private
from megazh.training.job import Job
from megazh.training.recipe import Device
from megazh.training.startup import start_times

_JOIN_SECONDS = 600.0  # for all ranks to be started; Python on a slow shared disk takes its time
_HANDSHAKE_SECONDS = 10.0
_MOST_STRANGERS = 256
_STACK_SECONDS = 8.0
_LINGER_SECONDS = 10.0  # for the other program to end, once its ranks have
_LATE_SECONDS = 3.0  # for what ranks still send, once that program has ended


def launch(job: Job, transport: Transport) -> int:
    """Run the ranks of a job through a transport until all have ended; returns the exit code.

    Signals, ends, hangs and exit codes are those of `megazh.cluster.launchers.local.run_ranks`. What the other program
    writes is in RUN/logs/NAME.log.

    Raises:
        UsageError: srun or mpirun started this process several times, the transport cannot work here, or RUN/control
            is not private.
    """
    refuse_copies()
    check_private(job.run.control)
    job.run.logs.mkdir(parents=True, exist_ok=True)
    transport.prepare(job)
    with open_console() as console, signals() as events:
        console.log_to(job.run.logs / CONSOLE_LOG)
        logs = [RankLog(job.run.logs / f"rank_{rank}.log") for rank in range(job.layout.ranks)]
        ranks = RemoteRanks(job, transport, logs)
        ending = supervise(ranks, events, job.recipe.control.hang_minutes * 60)
        code, reason = report(ending, logs, ranks.labels, SAVE_SECONDS)
        job.run.end(code, reason)
        return code


class _Stranger(NamedTuple):
    """A connection that has not proved yet that it is a guard's."""

    link: Link
    nonce: str
    until: float


class _Latest:
    """The last signs of progress that the ranks have sent."""

    def __init__(self, ranks: int) -> None:
        self.of = [Pulse(0, -1, 0, 0.0, "") for _ in range(ranks)]

    def read(self) -> list[Pulse]:
        """The pulse of each rank."""
        return list(self.of)


class RemoteRanks(Ranks):
    """Ranks that a transport starts, each behind a lifeline."""

    def __init__(self, job: Job, transport: Transport, logs: Sequence[RankLog]) -> None:
        self.logs, self.labels = logs, list(job.labels)
        self.alive = set(range(job.layout.ranks))
        self.pulses: _Latest = _Latest(job.layout.ranks)
        self._job, self._transport = job, transport
        self._attempt, self._token = secrets.token_hex(8), secrets.token_hex(32)
        self._command = transport.command(job, self._attempt)
        self._slots = [host.slots for host in job.hosts]
        self._one_host = is_this_machine(job.hosts)
        self._selector = selectors.DefaultSelector()
        self._strangers: dict[int, _Stranger] = {}
        self._links: dict[int, Link] = {}
        self._hellos: dict[int, Hello] = {}
        self._ended: set[int] = set()
        self._stacks: dict[int, Stack] = {}
        self._started = False
        self._program_log = RankLog(job.run.logs / f"{transport.name.value}.log")
        self._join_by = time.monotonic() + _JOIN_SECONDS
        self._program_ended: float | None = None
        self._faulted = self._killed = False

    def start(self, events: Events) -> None:
        self._events = events
        self._server = _listen(self._one_host)
        self._selector.register(self._server, selectors.EVENT_READ)
        job = self._job
        info = LaunchInfo(
            attempt=self._attempt,
            token=self._token,
            addresses=["127.0.0.1"] if self._one_host else own_addresses(),
            port=self._server.getsockname()[1],
            slots=self._slots,
            ranks=list(job.ranks_of_slots),
            device="cuda" if job.device is Device.CUDA else "cpu",
            environment={**job.environment, **start_times()},
            folder=os.getcwd(),
        )
        write_private(job.run.control / LAUNCH, info)
        with open(self._program_log.path, "ab") as log:
            self._program = subprocess.Popen(
                dying_along(self._command, signal.SIGTERM),
                env=self._transport.environment(job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process alone
            )

    def poll(self) -> None:
        for key, _ in self._selector.select(0):
            if key.fileobj is self._server:
                self._accept()
            elif key.data is None:
                self._greet(key.fd)
            else:
                self._listen_to(key.data)
        for number, stranger in list(self._strangers.items()):
            if time.monotonic() > stranger.until:
                self._drop(number)
        self._look_at_program()
        self.logs[0].show()

    def ended(self, event: Exit, was_killed: bool) -> Exit:
        return event

    def signal(self, number: signal.Signals) -> None:
        self._send_all(Signal(number=number))
        for rank in self.alive - set(self._links) - self._ended:
            self._end(Exit(rank, -number))

    def explain(self) -> str:
        self._stacks.clear()
        self._send_all(Order(kind="stacks"))
        deadline = time.monotonic() + _STACK_SECONDS
        expected = set(self._links) - self._ended
        while expected - set(self._stacks) and time.monotonic() < deadline:
            time.sleep(0.05)
            self.poll()
            expected -= self._ended
        silent = Stack("?", "", False)
        return blame({rank: (self._stacks.get(rank, silent), self.pulses.of[rank]) for rank in expected}, self.labels)

    def kill(self) -> None:
        self._killed = True
        self._send_all(Order(kind="kill"))
        for rank in self.alive - set(self._links) - self._ended:
            self._end(Exit(rank, -signal.SIGKILL))

    def close(self) -> None:
        self._send_all(Order(kind="leave"), all_of_them=True)
        with contextlib.suppress(OSError):
            (self._job.run.control / LAUNCH).unlink()
        if hasattr(self, "_program"):
            waited = _LINGER_SECONDS if len(self._links) == len(self.logs) else 0.0
            for number in (0, signal.SIGTERM, signal.SIGKILL):
                if number:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self._program.pid, number)
                try:
                    self._program.wait(waited)
                    break
                except subprocess.TimeoutExpired:
                    waited = _LINGER_SECONDS
        for stranger in self._strangers.values():
            stranger.link.close()
        for link in self._links.values():
            link.close()
        if hasattr(self, "_server"):
            self._server.close()
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            return
        link, nonce = Link(connection), secrets.token_hex(16)
        if len(self._strangers) >= _MOST_STRANGERS:
            link.close()
            return
        try:
            link.send(Challenge(attempt=self._attempt, nonce=nonce))
        except Broken:
            link.close()
            return
        self._strangers[link.fileno()] = _Stranger(link, nonce, time.monotonic() + _HANDSHAKE_SECONDS)
        self._selector.register(link, selectors.EVENT_READ)

    def _greet(self, number: int) -> None:
        """Read the first line of a connection; what is no guard's is closed."""
        stranger = self._strangers[number]
        try:
            lines = stranger.link.receive()
            if not lines:
                return
            hello = from_guard(lines[0])
            if not isinstance(hello, Hello) or hello.slot >= len(self._job.ranks_of_slots):
                raise Broken("no guard")
            expected = proof(self._token, stranger.nonce, hello.slot)
            rank = self._job.ranks_of_slots[hello.slot]
            if not secrets.compare_digest(expected, hello.proof) or rank in self._links or rank in self._ended:
                raise Broken("no guard of this attempt")
        except Broken:
            self._drop(number)
            return
        del self._strangers[number]
        self._selector.modify(stranger.link, selectors.EVENT_READ, rank)
        self._links[rank], self._hellos[rank] = stranger.link, hello
        if len(self._slots) > 1:
            self.labels[rank] = f"{self._job.labels[rank].removesuffix(')')}, on {hello.host})"
        self._hear_all(rank, lines[1:])
        if len(self._links) == len(self.logs) and not self._killed:
            self._start_all()

    def _start_all(self) -> None:
        self._started = True
        first = self._hellos[0]
        address = "127.0.0.1" if self._one_host else self._links[0].peer
        assert first.port is not None
        for rank, hello in self._hellos.items():
            cores = set(hello.cores)
            sharing = sum(
                other.host == hello.host and not cores.isdisjoint(other.cores) for other in self._hellos.values()
            )
            self._send(rank, Start(address=address, port=first.port, threads=max(1, len(cores) // max(1, sharing))))

    def _listen_to(self, rank: int) -> None:
        try:
            lines = self._links[rank].receive()
        except Broken as broken:
            self._lose(rank, broken)
        else:
            self._hear_all(rank, lines)

    def _hear_all(self, rank: int, lines: Sequence[bytes]) -> None:
        try:
            for line in lines:
                self._hear(rank, from_guard(line))
        except Broken as broken:
            self._lose(rank, broken)

    def _lose(self, rank: int, why: Broken) -> None:
        self._selector.unregister(self._links[rank])
        self._links[rank].close()
        self._end(Exit(rank, -signal.SIGKILL, f"{why}; its process, or its host, has failed or was ended"))

    def _hear(self, rank: int, message: FromGuard) -> None:
        if isinstance(message, Progress):
            time_of_it = time.monotonic() - message.age
            self.pulses.of[rank] = Pulse(message.beats, message.step, message.reason, time_of_it, message.phase)
        elif isinstance(message, Text) and rank == 0:
            sys.stdout.write(message.text)
            sys.stdout.flush()
        elif isinstance(message, Stacks):
            self._stacks[rank] = Stack(message.state, message.place, message.waits)
        elif isinstance(message, Goodbye):
            self.logs[rank].reported = message.words
            self._end(Exit(rank, message.code))

    def _end(self, event: Exit) -> None:
        if event.rank not in self._ended:
            self._ended.add(event.rank)
            self._events.put(event)

    def _look_at_program(self) -> None:
        """Notice that not all ranks will join: the program has ended, has lost a host, or takes too long."""
        if self._faulted or self._killed or self._started:
            return
        name, missing = self._transport.name.value, self.alive - set(self._links)
        if why := self._transport.fault("\n".join(self._program_log.tail())):
            self._fault(f"{why}; its output is in {self._program_log.path}")
        elif time.monotonic() > self._join_by:
            names = ", ".join(self._job.labels[rank] for rank in sorted(missing))
            self._fault(
                f"{names}: not started by {name} within {_JOIN_SECONDS:.0f} s; its output is in "
                f"{self._program_log.path}"
            )
        elif self._program.poll() is not None:
            self._program_ended = self._program_ended or time.monotonic()
            if time.monotonic() > self._program_ended + _LATE_SECONDS:
                words = self._program_log.own_error().removeprefix("error: ") or self._program_log.last_words()
                self._fault(
                    f"{name} ended with exit code {self._program.returncode} before all ranks had been started"
                    f"{f' ({words})' if words else ''}; its output is in {self._program_log.path}"
                )

    def _fault(self, text: str) -> None:
        self._faulted = True
        self._events.put(Fault(WorkerError.exit_code, text))

    def _send_all(self, message: Config, all_of_them: bool = False) -> None:
        for rank in list(self._links):
            if all_of_them or rank not in self._ended:
                self._send(rank, message)

    def _send(self, rank: int, message: Config) -> None:
        with contextlib.suppress(Broken):  # which is noticed when it is read
            self._links[rank].send(message)

    def _drop(self, number: int) -> None:
        stranger = self._strangers.pop(number)
        self._selector.unregister(stranger.link)
        stranger.link.close()


def own_addresses() -> list[str]:
    """Addresses at which other hosts may reach this one, the most likely one first: that of its name, then those of
    its interfaces, bridges of containers and virtual machines last."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        found += [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    state = psutil.net_if_stats()
    virtual = ("docker", "br-", "veth", "virbr", "cni", "flannel")
    interfaces = sorted(psutil.net_if_addrs().items(), key=lambda item: item[0].startswith(virtual))
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, entries in interfaces:
            if name in state and state[name].isup:
                found += [entry.address for entry in entries if entry.family == family]
    # An address of one link alone (fe80::) means nothing on another host.
    usable = [each for each in found if not each.startswith(("127.", "fe80:")) and each != "::1" and "%" not in each]
    return list(dict.fromkeys(usable)) or ["127.0.0.1"]


def _listen(one_host: bool) -> socket.socket:
    """A socket that guards can reach, and nobody else where they are all on this host."""
    if one_host:
        server = socket.create_server(("127.0.0.1", 0), backlog=1024)
    elif socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        server = socket.create_server(("", 0), backlog=1024)
    server.setblocking(False)
    return server
