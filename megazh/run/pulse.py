"""A rank's signs of progress: what it is doing and how much it has done, in memory that its launcher reads.

A rank calls `beat` wherever it gets on: phases of the start, micro-batches, steps, pieces of a validation, sampled
tokens, files of a checkpoint. A launcher on the same machine sees a run that gets on no longer, and which rank is
behind. The memory is anonymous and shared; no disk is involved, and nothing is left behind.
"""

import contextlib
import mmap
import os
import struct
import tempfile
import threading
import time
from typing import NamedTuple

PULSE = "MEGAZH_PULSE"
"""Environment variable of a rank: the descriptor of the shared memory of all ranks of its machine."""

_RECORD = struct.Struct("<Qqqd32s")  # 64 bytes: beats, step, reason, time of the last beat, phase
_PHASE_BYTES = 32

START_FACTOR = 4
"""A start, its first step included, may be without a sign of progress for so many times as long as later steps:
it imports, compiles and measures."""


class Pulse(NamedTuple):
    """The progress of one rank."""

    beats: int
    """Number of signs of progress since the start; 0 before the first."""
    step: int
    """Optimizer steps done; -1 before this attempt has taken one."""
    reason: int
    """Reason of the stop that the ranks have agreed on (`megazh.training.control.Reason`); 0 without one."""
    time: float
    """Time of the last sign, in seconds of CLOCK_MONOTONIC."""
    phase: str
    """What the rank was doing then."""


def memory_file(name: str) -> int:
    """The descriptor of an empty file in memory; `name` is shown in /proc."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:  # a Python that was built for an old system
        return os.dup(file.fileno())


class Pulses:
    """The pulses of all ranks of this machine, for the launcher that hands `descriptor` to them."""

    def __init__(self, ranks: int) -> None:
        self.descriptor = memory_file("megazh pulse")
        os.write(self.descriptor, _RECORD.pack(0, -1, 0, 0.0, b"") * ranks)
        self._ranks = ranks

    def read(self) -> list[Pulse]:
        """The pulse of each rank."""
        data = os.pread(self.descriptor, self._ranks * _RECORD.size, 0)
        return [_decode(data[at : at + _RECORD.size]) for at in range(0, len(data), _RECORD.size)]

    def close(self) -> None:
        """Free the memory, once all ranks have ended."""
        os.close(self.descriptor)


class _Own:
    """The pulse of this process. Without a launcher that reads it, it is kept in ordinary memory."""

    def __init__(self) -> None:
        self.memory: mmap.mmap | bytearray = bytearray(_RECORD.size)
        self.place = 0
        self.beats = self.reason = 0
        self.step = -1
        self.lock = threading.Lock()


_own = _Own()


def open_pulse() -> bool:
    """Use the memory that the launcher has named in the environment; returns whether there is any."""
    descriptor, rank = os.environ.get(PULSE), os.environ.get("LOCAL_RANK", "0")
    if descriptor is None:
        return False
    with contextlib.suppress(ValueError, OSError):
        _own.memory, _own.place = mmap.mmap(int(descriptor), 0), int(rank) * _RECORD.size
        return True
    return False


def beat(phase: str, step: int | None = None, reason: int | None = None) -> None:
    """Give a sign of progress; takes about a microsecond.

    Args:
        phase: what this rank is doing, such as `validation`; at most 32 bytes of it are kept.
        step: optimizer steps done, where that has changed.
        reason: the reason of the stop that the ranks have agreed on, where there is one.
    """
    with _own.lock:
        _own.beats += 1
        _own.step = _own.step if step is None else step
        _own.reason = _own.reason if reason is None else reason
        _RECORD.pack_into(
            _own.memory, _own.place, _own.beats, _own.step, _own.reason, time.monotonic(), phase.encode()[:_PHASE_BYTES]
        )


def own_pulse() -> Pulse:
    """The pulse of this process."""
    with _own.lock:
        return _decode(bytes(_own.memory[_own.place : _own.place + _RECORD.size]))


def _decode(data: bytes) -> Pulse:
    beats, step, reason, seconds, phase = _RECORD.unpack(data)
    return Pulse(beats, step, reason, seconds, phase.rstrip(b"\0").decode("utf-8", "replace"))
