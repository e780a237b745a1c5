"""What ranks write: copied to the terminal while they run, searched for the reason when one has died."""

import contextlib
import ctypes
import fcntl
import os
import re
import sys
from pathlib import Path

from megazh.console import MARK, mark
from megazh.run.pulse import memory_file

_PIECE_BYTES = 1 << 20
_TAIL_BYTES = 1 << 16
_LONGEST_MESSAGE = 300

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # FALLOC_FL_*, see fallocate(2)
_fallocate = ctypes.CDLL(None).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

# torch.distributed puts the rank in front of a traceback.
_RANK = r"^(?:\[rank\d+\]: ?)?"
_ERROR = re.compile(_RANK + r"(error: .+)")
_FINAL = re.compile(_RANK + r"(?:error: |interrupted|stopped: |Traceback \(most recent call last\))")
_EXCEPTION = re.compile(_RANK + r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception)(?:: .*)?)$")


class Output:
    """A file in memory that a process writes its output to, and that `show` copies to stdout or stderr or `take` reads.

    Neither a full disk nor a terminal that makes its writers wait can reach the process. The memory of lines that were
    copied is freed, a MiB at a time.
    """

    def __init__(self, stream: str) -> None:
        """Args: stream: `stdout` or `stderr`, where `show` writes."""
        self._stream = stream
        self.descriptor = memory_file("megazh output")
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | os.O_APPEND)
        self._shown = self._freed = 0

    def show(self, all_of_it: bool = False) -> None:
        """Copy what is new: whole lines, or all of it."""
        while data := self.take(_PIECE_BYTES, all_of_it):
            stream = getattr(sys, self._stream)
            stream.write(data.decode(errors="replace"))
            stream.flush()

    def take(self, most: int, all_of_it: bool = False) -> bytes:
        """What is new, at most `most` bytes: whole lines, or all of it; a longer line comes in pieces."""
        data = os.pread(self.descriptor, most, self._shown)
        end = len(data) if all_of_it or len(data) == most else data.rfind(b"\n") + 1
        self._shown += end
        self._free()
        return data[:end]

    def _free(self) -> None:
        """Free the memory of what was shown; the process goes on writing behind it."""
        size = (self._shown - self._freed) // _PIECE_BYTES * _PIECE_BYTES
        # Where a kernel or a file cannot do it, the lines stay.
        if size and not _fallocate(self.descriptor, _KEEP_SIZE | _PUNCH_HOLE, self._freed, size):
            self._freed += size

    def close(self) -> None:
        """Copy the rest, and free the memory."""
        self.show(all_of_it=True)
        os.close(self.descriptor)


class RankLog:
    """The log of one rank. It is appended to; output of earlier attempts is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reported = ""
        """The rank's own reason to end, which it sends to the launcher besides: the disk of the log may be full."""
        self._begin = self._shown = path.stat().st_size if path.exists() else 0
        self._showing = True

    def show(self) -> None:
        """Copy new lines to stderr, up to a final error: that is reported by the launcher. Marks are for the log."""
        if not self._showing:
            return
        try:
            with open(self.path, "rb") as file:
                file.seek(self._shown)
                lines = file.read(1 << 20).splitlines(keepends=True)
        except OSError:  # the disk of the log is not there at the moment; training may go on
            return
        for line in lines:
            text = line.decode(errors="replace")
            if not text.endswith(("\n", "\r")):
                break
            if _FINAL.match(text):
                self._showing = False
                break
            self._shown += len(line)
            if not MARK.match(text):
                sys.stderr.write(text)
        if lines:
            sys.stderr.flush()

    def hide(self) -> None:
        """Show nothing more: the output of a rank after another has failed does not help."""
        self._showing = False

    def note(self, text: str) -> None:
        """Append a line with the time."""
        with contextlib.suppress(OSError), open(self.path, "ab") as file:
            file.write(mark(text).encode())

    def tail(self) -> list[str]:
        """The last lines of this attempt, without marks, and the reason that the rank sent."""
        lines = []
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._begin, size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).decode(errors="replace").splitlines()
        return [line for line in [*lines, *self.reported.splitlines()] if not MARK.match(line)]

    def own_error(self) -> str:
        """The last line `error: ...` of the rank, its own reason to end; empty without one."""
        found = [match[1] for line in self.tail() if (match := _ERROR.match(line))]
        return found[-1] if found else ""

    def ends_with_interrupt(self) -> bool:
        """Whether a traceback of Ctrl-C is the last that the rank has written."""
        lines = [line.strip() for line in self.tail() if line.strip()]
        return bool(lines) and lines[-1] == "KeyboardInterrupt"

    def last_words(self) -> str:
        """The exception that ends a traceback, else the last line that is not blank; empty if the log is empty."""
        lines = [line for line in self.tail() if line.strip()]
        found = [match[1] for line in lines if (match := _EXCEPTION.match(line))] or lines
        return found[-1].strip()[:_LONGEST_MESSAGE] if found else ""
