"""The faults of a soak: what each does to a run, how the run may end, and whether it may lose steps."""

import contextlib
import errno
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from soak_run import Attempt, Follower, Layout

from megazh.errors import INTERRUPTED, REQUEUE, SaveError, WorkerError
from megazh.training.checkpoint_list import list_checkpoints

HANG_MINUTES = 0.5
"""`control.hang_minutes` of the runs."""
_HANG_SECONDS = 60 * HANG_MINUTES + 45
_SHIFTS = (-86400, -3600, -30, 30, 3600, 86400)
"""Seconds by which the clock is shifted from the machine's."""
_LAYOUTS = ((1, 1), (2, 2), (2, 1), (3, 3), (4, 2), (4, 1), (4, 4))
_MICRO_BATCHES = (1, 2)


class Clock:
    """The wall clock of the runs, by `soak_clock.c`.

    Args:
        folder: where the compiled library and the shift are kept.

    Raises:
        OSError: there is no C compiler.
        subprocess.CalledProcessError: it fails.
    """

    def __init__(self, folder: Path) -> None:
        library, self._path = folder / "clock.so", folder / "clock"
        source = Path(__file__).with_name("soak_clock.c")
        words = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl", "-pthread"]
        subprocess.run(words, check=True, capture_output=True, text=True)
        self._path.write_bytes(struct.pack("=q", 0))
        self.env = {"LD_PRELOAD": str(library), "SOAK_CLOCK": str(self._path)}
        self.seconds = 0

    def step(self, seconds: int) -> None:
        """Set the clock to the machine's time plus `seconds`."""
        with open(self._path, "r+b", buffering=0) as file:
            file.write(struct.pack("=q", seconds * 10**9))
        self.seconds = seconds


@dataclass
class Ground:
    """What faults act on."""

    run: Path
    """Folder of the run."""
    records: Follower
    env: dict[str, str]
    layout: Layout
    """Arrangement of the next attempt."""
    choose: random.Random
    clock: Clock | None
    engine: str
    attempt: Attempt = field(init=False)
    damaged: dict[str, int] = field(default_factory=dict)
    """Checkpoints that were damaged, by name, with their inodes: another folder of that name is whole."""
    faults: list[str] = field(default_factory=list)
    """What was wrong while a fault went on."""

    def whole(self) -> list[Path]:
        """Checkpoints that no fault has damaged, oldest first."""
        return [
            path
            for path in list_checkpoints(self.run / "checkpoints")
            if self.damaged.get(path.name) != path.stat().st_ino
        ]

    def control(self, *words: str) -> None:
        """Run `megazh ctl`; what it refuses is noted as wrong, unless the run has ended meanwhile."""
        command = [sys.executable, "-m", "megazh", "ctl", str(self.run), *words]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120)
        if done.returncode and self.attempt.wait(5) is None:
            self.faults.append(f"ctl {' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")


@dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    strike: Callable[[Ground], str]
    """Does it; returns what exactly was done."""
    codes: frozenset[int]
    """Exit codes that the run may end with; empty where it must go on."""
    may_go_on: bool = False
    """Whether the run may go on in spite of it."""
    loses: bool = True
    """Whether steps may be lost. If not, the run has to save its last step."""
    early: bool = False
    """Whether it may come while the run is starting."""
    checkpoints: int = 0
    """Whole checkpoints that have to be there."""
    afterwards: Callable[[Ground], str] = lambda ground: ""
    """What is done once the run has ended, before it is started again; returns what."""
    seconds: float = 60.0
    """Time for the run to end."""
    changes_layout: bool = False


def _kill_rank(ground: Ground) -> str:
    deadline = time.monotonic() + 120
    while not (ranks := ground.attempt.ranks()) and time.monotonic() < deadline and ground.attempt.wait(0.1) is None:
        pass
    if not ranks:
        return "no rank was there"
    rank = ground.choose.randrange(len(ranks))
    _send(ranks[rank], signal.SIGKILL)
    return f"rank {rank}"


def _kill_launcher(ground: Ground) -> str:
    ground.attempt.kill()
    return ""


def _signal(number: signal.Signals) -> Callable[[Ground], str]:
    def strike(ground: Ground) -> str:
        _send(ground.attempt.process.pid, number)
        return ""

    return strike


def _send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _hang_up(ground: Ground) -> str:
    ground.attempt.hang_up()
    return ""


def _freeze(ground: Ground) -> str:
    ranks = ground.attempt.ranks()
    if not ranks:
        return "no rank was there"
    rank = ground.choose.randrange(len(ranks))
    _send(ranks[rank], signal.SIGSTOP)
    return f"rank {rank} of {len(ranks)}"


def _stop(ground: Ground) -> str:
    ground.control("stop")
    return ""


def _interrupt(ground: Ground) -> str:
    ground.attempt.type("\x03")
    return ""


def _other_layout(ground: Ground) -> str:
    shapes = [each for each in _LAYOUTS if ground.engine == "ds_pp" or each[1] == 1]
    before = ground.layout
    shapes.remove((before.ranks, before.stages))
    ground.layout = Layout(*ground.choose.choice(shapes), before.micro_batch_size)
    return f"{before} -> {ground.layout}"


def _other_micro_batch(ground: Ground) -> str:
    before = ground.layout
    sizes = [size for size in _MICRO_BATCHES if size != before.micro_batch_size]
    ground.layout = before._replace(micro_batch_size=ground.choose.choice(sizes))
    return f"{before} -> {ground.layout}"


def _fill_disk(ground: Ground) -> str:
    left = ground.choose.choice((0, 64, 256)) << 10
    with open(ballast_of(ground), "wb", buffering=0) as file:
        while True:
            try:
                file.write(b"\0" * 4096)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                break
        file.truncate(max(0, file.tell() - left))
    return f"{left >> 10} KiB left"


def _free_disk(ground: Ground) -> str:
    ballast_of(ground).unlink(missing_ok=True)
    return ""


def ballast_of(ground: Ground) -> Path:
    """File that fills the disk."""
    return ground.run.with_name("ballast")


def _flip(ground: Ground) -> str:
    newest = _damage_newest(ground)
    path = ground.choose.choice(sorted(each for each in newest.rglob("*") if each.is_file()))
    at, bit = ground.choose.randrange(path.stat().st_size), 1 << ground.choose.randrange(8)
    with open(path, "r+b", buffering=0) as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bit]))
    return f"bit {bit} of byte {at:,} of {newest.name}/{path.relative_to(newest)}"


def _truncate(ground: Ground) -> str:
    newest = _damage_newest(ground)
    path = ground.choose.choice(sorted(each for each in newest.rglob("*") if each.is_file()))
    size = path.stat().st_size
    kept = ground.choose.choice((0, size // 2, size - 1))
    os.truncate(path, kept)
    return f"{newest.name}/{path.relative_to(newest)} to {kept:,} of {size:,} bytes"


def _damage_newest(ground: Ground) -> Path:
    newest = ground.whole()[-1]
    ground.damaged[newest.name] = newest.stat().st_ino
    return newest


def _delete(ground: Ground) -> str:
    newest = ground.whole()[-1]
    shutil.rmtree(newest)
    return newest.name


def _step_clock(ground: Ground) -> str:
    """Shift the clock; steps, the estimate of the time left, and control from another terminal have to go on."""
    clock, records = ground.clock, ground.records
    assert clock is not None
    before = clock.seconds
    clock.step(ground.choose.choice([each for each in _SHIFTS if each != before]))
    first, deadline = records.last, time.monotonic() + 60
    while ground.attempt.wait(0.1) is None and records.last < first + 5:
        records.look()
        if time.monotonic() > deadline:
            ground.faults.append(f"only {records.last - first} steps within 60 s after the clock was shifted")
            break
    steps, left = int(records.newest["steps"]), float(records.newest["eta_seconds"])
    if not 0 <= left <= 60 * (1 + steps - records.last):
        ground.faults.append(f"{left:.0f} s are estimated for {steps - records.last} steps")
    ground.control("status")
    if ground.attempt.wait(0.1) is None and records.last < steps - 50:
        ground.control("save")
    return f"{before:+d} s -> {clock.seconds:+d} s"


_KILLED = frozenset({-signal.SIGKILL})
_SAVED = frozenset({REQUEUE})
_PERSON = frozenset({INTERRUPTED})
_FAILED = frozenset({WorkerError.exit_code})

FAULTS = {
    "kill_rank": Fault(_kill_rank, _FAILED, early=True),
    "kill_launcher": Fault(_kill_launcher, _KILLED, early=True),
    "sigterm": Fault(_signal(signal.SIGTERM), _SAVED, loses=False),
    "sigusr1": Fault(_signal(signal.SIGUSR1), _SAVED, loses=False),
    "terminal": Fault(_hang_up, _PERSON, may_go_on=True, loses=False),
    "full_disk": Fault(_fill_disk, _FAILED | {SaveError.exit_code}, afterwards=_free_disk, seconds=180),
    "flip": Fault(_kill_launcher, _KILLED, checkpoints=2, afterwards=_flip),
    "truncate": Fault(_kill_launcher, _KILLED, checkpoints=2, afterwards=_truncate),
    "delete": Fault(_kill_launcher, _KILLED, checkpoints=2, afterwards=_delete),
    "freeze": Fault(_freeze, _FAILED, seconds=_HANG_SECONDS),
    "clock": Fault(_step_clock, frozenset(), may_go_on=True),
    "ctl_stop": Fault(_stop, _PERSON, loses=False),
    "layout": Fault(_interrupt, _PERSON, loses=False, afterwards=_other_layout, changes_layout=True),
    "micro_batch": Fault(_interrupt, _PERSON, loses=False, afterwards=_other_micro_batch, changes_layout=True),
}
"""All kinds of faults, by name."""
