"""The guard of a rank that another program has started: it holds the lifeline, and the rank is its child.

A guard does little, so that it answers whatever its rank is doing: computing, waiting for a disk, stopped. It ends with
0 once the launcher lets it go, so that srun or DeepSpeed's launcher never ends ranks that still save; where the
launcher has gone, it kills its rank.
"""

import codecs
import contextlib
import os
import queue
import select
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

from megazh.cluster.launchers.child import RankProcess
from megazh.cluster.launchers.ending import Exit
from megazh.cluster.launchers.environment import environment_of_ranks
from megazh.cluster.launchers.hang import write_stacks
from megazh.cluster.launchers.lifeline import (
    LAUNCH,
    Broken,
    Challenge,
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
    from_launcher,
    proof,
)
from megazh.cluster.launchers.ports import reserved_port
from megazh.cluster.launchers.rank_log import Output, RankLog
from megazh.cluster.launchers.transport import slot_of
from megazh.errors import DataError, WorkerError
from megazh.run.folder import RunFolder
from megazh.run.pulse import Pulses
from megazh.run.requests import read_private
from megazh.training.control import SIGNALS
from megazh.training.job import Launcher

_FILE_SECONDS = 60.0  # a shared disk may show the launcher's file late
_SAY_SECONDS = 5.0
_CONNECT_SECONDS = 60.0
_TRY_SECONDS = 5.0
_LEAVE_SECONDS = 1200.0  # the others may save for as long as supervisor.SAVE_SECONDS
_POLL_SECONDS = 0.1
_PROGRESS_SECONDS = 1.0
_TEXT_BYTES = 8000  # of stdout in a message: a byte may take six in JSON


def guard(run: Path, starter: Launcher, attempt: str) -> int:
    """Run the rank of this process's slot as a child; returns the exit code, 0 once the launcher knows the rank's end.

    Args:
        run: the run folder.
        starter: the program that has started this process.
        attempt: id of the attempt.

    Raises:
        DataError: the launcher's file does not come.
        UsageError: the program's variables name no slot.
        WorkerError: the launcher cannot be reached.
    """
    folder = RunFolder(run)
    info = _launch_info(folder, attempt)
    _enter(info.folder)
    slot = slot_of(starter, os.environ, info.slots)
    rank = info.ranks[slot]
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(reserved_port("")) if rank == 0 else None
        link = _join(info, slot, port)
        stack.callback(link.close)
        return _Guard(folder, info, slot, link).run()


class _Guard:
    def __init__(self, folder: RunFolder, info: LaunchInfo, slot: int, link: Link) -> None:
        self._folder, self._info, self._link = folder, info, link
        self._rank = info.ranks[slot]
        host = next(host for host in range(len(info.slots)) if slot < sum(info.slots[: host + 1]))
        self._local, self._ranks_here = slot - sum(info.slots[:host]), info.slots[host]
        folder.logs.mkdir(parents=True, exist_ok=True)
        self._log = RankLog(folder.logs / f"rank_{self._rank}.log")
        self._pulses = Pulses(self._local + 1)
        self._output = Output("stdout")  # of rank 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a piece may end within a character
        self._child: RankProcess | None = None
        self._events: queue.SimpleQueue[Exit | int] = queue.SimpleQueue()
        self._told = 0.0
        self._killed = False
        self._leave_by: float | None = None

    def run(self) -> int:
        for number in SIGNALS:  # srun passes signals on to the processes that it has started
            signal.signal(number, self._signalled)
        try:
            while True:
                select.select([self._link], [], [], _POLL_SECONDS)
                for line in self._link.receive():
                    if not self._obey(line):
                        return 0
                self._handle_events()
                self._tell()
                if self._leave_by is not None and time.monotonic() > self._leave_by:
                    return 0
        except Broken as broken:
            if self._leave_by is None:
                self._log.note(f"rank {self._rank}: the launcher has gone ({broken}); this rank is killed")
            return 0 if self._leave_by is not None else WorkerError.exit_code
        finally:
            if self._child is not None:
                self._child.kill()

    def _signalled(self, number: int, _: FrameType | None) -> None:
        self._events.put(number)

    def _obey(self, line: bytes) -> bool:
        """Do what the launcher wants; returns whether to go on."""
        message = from_launcher(line)
        if isinstance(message, Start) and self._child is None and self._leave_by is None:
            self._start(message)
        elif isinstance(message, Signal):
            self._pass_on(message.number)
        elif isinstance(message, Order):
            if message.kind == "leave":
                return False
            if message.kind == "stacks":
                self._answer_stacks()
            else:
                self._kill()
        return True

    def _start(self, start: Start) -> None:
        self._child = RankProcess(
            self._rank,
            _arguments(self._folder),
            self._environment(start),
            self._log,
            self._output.descriptor if self._rank == 0 else None,
            self._pulses.descriptor,
            self._events.put,
        )

    def _environment(self, start: Start) -> dict[str, str]:
        info = self._info
        gpus = None
        if info.device == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = visible.split(",") if visible else [str(number) for number in range(self._ranks_here)]
        result = environment_of_ranks(info.environment, self._ranks_here, gpus, start.port)
        if "OMP_NUM_THREADS" not in {**os.environ, **info.environment}:
            result["OMP_NUM_THREADS"] = str(start.threads)
        if len(info.slots) > 1 and (interface := _interface(self._link.own)):
            result.setdefault("GLOO_SOCKET_IFNAME", interface)
            result.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # "=": this one, not those that begin alike
        return {
            **result,
            "RANK": str(self._rank),
            "LOCAL_RANK": str(self._local),
            "WORLD_SIZE": str(len(info.ranks)),
            "MASTER_ADDR": start.address,
        }

    def _pass_on(self, number: int) -> None:
        if self._child is not None:
            self._child.signal(number)
        elif self._leave_by is None and number in SIGNALS:
            self._goodbye(Exit(self._rank, -number))

    def _kill(self) -> None:
        self._killed = True
        if self._child is not None:
            self._child.kill()
        elif self._leave_by is None:
            self._goodbye(Exit(self._rank, -signal.SIGKILL))

    def _answer_stacks(self) -> None:
        if self._child is not None and (process := self._child.living) is not None:
            found = write_stacks({process: self._log})[process]
            self._link.send(Stacks(state=found.state, place=found.place[:1000], waits=found.waits))

    def _handle_events(self) -> None:
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            if isinstance(event, Exit):
                assert self._child is not None
                self._child.note_end(event, self._killed)
                self._goodbye(event)
            else:
                self._pass_on(event)

    def _goodbye(self, event: Exit) -> None:
        self._told = 0.0
        while self._tell(all_of_it=True):
            time.sleep(_POLL_SECONDS / 10)
        self._link.send(Goodbye(code=event.code, words=self._log.reported[-_TEXT_BYTES:]))
        self._leave_by = time.monotonic() + _LEAVE_SECONDS

    def _tell(self, all_of_it: bool = False) -> bool:
        """Send what rank 0 has written, and once a second how far the rank is; returns whether there is more to send.

        A launcher that does not read makes nothing wait here: what the rank writes stays in memory.
        """
        self._link.flush()
        if self._leave_by is not None:
            return False
        if not self._link.waiting and time.monotonic() - self._told >= _PROGRESS_SECONDS:
            self._told = time.monotonic()
            pulse = self._pulses.read()[self._local]
            age = max(0.0, time.monotonic() - pulse.time)
            self._link.send(
                Progress(beats=pulse.beats, step=pulse.step, reason=pulse.reason, age=age, phase=pulse.phase)
            )
        while not self._link.waiting and (data := self._output.take(_TEXT_BYTES, all_of_it)):
            self._link.send(Text(text=self._decoder.decode(data)))
        return self._link.waiting


def _arguments(folder: RunFolder) -> list[str]:
    """Arguments of Python in the rank's own process."""
    return ["-P", "-m", "megazh", "rank", str(folder.path)]


def _enter(folder: str) -> None:
    """Work in the launcher's folder. Raises DataError where this host does not have it."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise DataError(
            f"{folder}: {error.strerror} on {socket.gethostname()}; start from a folder that all hosts share"
        ) from None


def _launch_info(folder: RunFolder, attempt: str) -> LaunchInfo:
    """Wait for the launcher's file of this attempt."""
    path, begun, said = folder.control / LAUNCH, time.monotonic(), False
    while True:
        found = None
        with contextlib.suppress(DataError):  # not there yet, or of another attempt and another version
            found = read_private(path, LaunchInfo)
        if found is not None and found.attempt == attempt:
            return found
        waited = time.monotonic() - begun
        if waited > _FILE_SECONDS:
            raise DataError(
                f"{path}: on {socket.gethostname()}, the file of this attempt has not come within "
                f"{_FILE_SECONDS:.0f} s: is the run folder on a disk that all hosts share, and this the same user?"
            )
        if waited > _SAY_SECONDS and not said:
            said = True
            print(
                f"{path}: waiting for it on {socket.gethostname()}; a shared disk may show it late",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL_SECONDS)


def _join(info: LaunchInfo, slot: int, port: int | None) -> Link:
    """Connect to the launcher, at the first of its addresses that answers as it should."""
    deadline, why = time.monotonic() + _CONNECT_SECONDS, ""
    host = socket.gethostname().partition(".")[0]
    while time.monotonic() < deadline:
        for address in info.addresses:
            try:
                connection = socket.create_connection((address, info.port), _TRY_SECONDS)
            except OSError as error:
                why = f"{address} port {info.port}: {error.strerror or error}"
                continue
            link = Link(connection)
            try:
                challenge = _first(link)
                if challenge.attempt != info.attempt:
                    raise Broken("answers for another attempt")
                signed = proof(info.token, challenge.nonce, slot)
                cores = sorted(os.sched_getaffinity(0))
                link.send(Hello(slot=slot, proof=signed, host=host, cores=cores, port=port))
                return link
            except Broken as broken:
                why = f"{address} port {info.port}: {broken}"
                link.close()
        time.sleep(_POLL_SECONDS)
    raise WorkerError(
        f"{host} cannot reach the launcher at {', '.join(info.addresses)} within {_CONNECT_SECONDS:.0f} s (last: "
        f"{why}): is there a firewall between the hosts, or has the launcher ended?"
    )


def _first(link: Link) -> Challenge:
    """Wait for the challenge. Raises Broken."""
    deadline = time.monotonic() + _TRY_SECONDS
    while time.monotonic() < deadline:
        select.select([link], [], [], _POLL_SECONDS)
        if lines := link.receive():
            message = from_launcher(lines[0])
            if isinstance(message, Challenge):
                return message
            raise Broken("begins with something else")
    raise Broken("says nothing")


def _interface(address: str) -> str:
    """Name of the network interface with an address; empty where there is none, and for the loopback one."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries) and not address.startswith("127."):
            return str(name)
    return ""
