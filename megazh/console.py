"""Standard output and error of a command, so that no print can end, change or hold up the work behind it.

`sys.stdout` and `sys.stderr` are replaced for as long as a command runs. A character that the terminal cannot show
becomes a question mark. There are two kinds of commands:

* A command whose result is its output (`recipe show`): where the reader of a pipe has gone, it ends quietly.
* Work that outlives its readers (`pretrain`, `index build`): a closed pipe, a terminal that is gone or a full disk
  behind stdout lose lines, and nothing else. Terminals and pipes are written by threads, which may wait (Ctrl-S, a
  reader that does not read) while the work goes on. Its lines can be kept in a log file, too.
"""

import contextlib
import errno
import io
import os
import re
import select
import shlex
import signal
import stat
import sys
import threading
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from megazh.errors import WorkerError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_PATIENCE_SECONDS = 10.0  # at the end of work, for a reader that takes nothing; one that reads on gets all
_MOST_WAITING = 16 << 20  # bytes that wait for a reader
_CHUNK = 4096  # what a pipe takes at once, so that a slow reader is seen to go on

_LOCK = threading.RLock()  # of all streams and the log, whose warnings are lines on a stream, too


MARK = re.compile(r"--- \d{4}-\d\d-\d\d ")
"""Begin of the lines of `mark`."""

CONSOLE_LOG = "console.log"
"""Name of the file in RUN/logs with the lines that a run has shown."""

LAST_WORDS = "MEGAZH_LAST_WORDS"
"""Environment variable of a rank: a descriptor that takes its reason to end, for its launcher."""


class ReaderGone(Exception):
    """The reader of standard output (`head`, `less`) has ended: nobody waits for the rest of the output."""


def mark(text: str) -> str:
    """A line for log files that says when: `--- 2026-11-28 09:30:00+08:00 TEXT`."""
    return f"--- {datetime.now().astimezone().isoformat(' ', 'seconds')} {text}\n"


class Stream(io.TextIOBase):
    """Text to an output that may be closed, gone, full, stuck, or without some characters.

    Args:
        under: the output: a text stream, or None where Python found it closed.
        strict: raise an error where a line cannot be written, instead of losing it.
    """

    def __init__(self, under: TextIO | Any | None, strict: bool = False) -> None:
        self._under, self._strict = under, strict
        self._pending = ""
        """A line that has begun."""
        self._dead = under is None
        self._writer: _Writer | None = None
        self._log: _Log | None = None
        self._descriptor: int | None = None
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._descriptor = under.fileno()  # type: ignore[union-attr]

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the output."""
        return getattr(self._under, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """What happens to a character that the encoding lacks."""
        return "replace"

    def fileno(self) -> int:
        """Descriptor of the output. Raises OSError where it has none."""
        if self._descriptor is None:
            raise io.UnsupportedOperation("fileno")
        return self._descriptor

    def isatty(self) -> bool:
        """Whether the output is a terminal."""
        try:
            return self._under is not None and self._under.isatty()
        except ValueError:  # closed
            return False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Write whole lines at once, and keep the begun line for `flush`.

        Raises:
            ReaderGone: the reader of a pipe has gone, and the stream is strict.
            WorkerError: the text could not be written for another reason, and the stream is strict.
        """
        with _LOCK:
            lines, newline, rest = (self._pending + text).rpartition("\n")
            self._pending = rest
            if newline:
                self._emit(lines + newline)
        return len(text)

    def flush(self) -> None:
        """Write the begun line. Raises as `write`."""
        with _LOCK:
            text, self._pending = self._pending, ""
            if text:
                self._emit(text)

    def outlive(self, writers: "dict[object, _Writer]", log: "_Log | None") -> None:
        """Lose lines rather than raise or wait, and copy them to a log.

        Args:
            writers: the threads that write so far, by the file that they write to; a new one is added.
            log: the log, if any.
        """
        with _LOCK:
            self._strict, self._log = False, log
            if self._descriptor is None or self._dead:
                return
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):  # a file on a disk does not wait for a reader
                # One thread for stdout and stderr if both are the same terminal or pipe: lines stay in order.
                key = status.st_dev, status.st_ino, status.st_rdev
                self._writer = writers.get(key) or _Writer(self._descriptor)
                writers[key] = self._writer

    def release(self) -> None:
        """Write directly again, and to no log: for whoever still holds this stream at the end of the command."""
        with _LOCK:
            self._strict, self._writer, self._log = False, None, None

    def _emit(self, text: str) -> None:
        if self._log is not None:
            self._log.add(self, text)
        if self._dead:
            return
        data = text.encode(self.encoding, "replace")
        try:
            if self._descriptor is None:
                assert self._under is not None
                self._under.write(data.decode(self.encoding))
                self._under.flush()
            elif self._writer is not None:
                self._writer.put(data)
            else:
                _write_all(self._descriptor, data)
        except (OSError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) else None
            self._dead = number not in _NO_SPACE  # a disk may get space again; all else stays as it is
            if self._strict and isinstance(error, BrokenPipeError):
                raise ReaderGone from None
            if self._strict and isinstance(error, OSError):
                raise WorkerError(f"standard output: {error.strerror or error}") from None


class _Writer(threading.Thread):
    """Writes to a terminal or a pipe, which may make it wait. It stops for good at the first failure.

    It writes to a duplicate of the descriptor, so that a chunk that it still holds at its end lands in no other file.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(name="console", daemon=True)
        self._descriptor = os.dup(descriptor)
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._bytes = self._written = 0
        self._dead = False
        self.start()

    def put(self, data: bytes) -> None:
        """Have `data` written, behind all that waits."""
        with self._changed:
            if self._bytes + len(data) > _MOST_WAITING:  # nobody reads
                self._stop()
            if self._dead:
                return
            self._waiting.extend(data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK))
            self._bytes += len(data)
            self._changed.notify_all()

    def run(self) -> None:
        while data := self._next():
            failed = False
            try:
                _write_all(self._descriptor, data)
            except OSError as error:
                failed = error.errno not in _NO_SPACE
            with self._changed:
                if failed:
                    self._stop()
                if self._waiting:
                    self._waiting.popleft()
                    self._bytes -= len(data)
                    self._written += len(data)
                self._changed.notify_all()
        os.close(self._descriptor)

    def _next(self) -> bytes:
        """Wait for the next bytes; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._dead)
            return self._waiting[0] if self._waiting else b""

    def finish(self) -> None:
        """Wait until all is written, or nothing was for `_PATIENCE_SECONDS`; then end."""
        with self._changed:
            while self._waiting:
                before = self._written
                self._changed.wait_for(lambda: not self._waiting or self._written != before, _PATIENCE_SECONDS)  # noqa: B023
                if self._written == before:
                    break
            self._stop()

    def _stop(self) -> None:
        self._dead = True
        self._waiting.clear()
        self._bytes = 0
        self._changed.notify_all()


class _Log:
    """The lines of a command, kept in memory until there is a file for them. What a progress bar redraws is no line."""

    def __init__(self) -> None:
        self._begun: dict[Stream, str] = {}
        self._early: list[str] = []
        self._descriptor: int | None = None
        self._path = Path()
        self._complete = True

    def add(self, stream: Stream, text: str) -> None:
        """Add text that a stream shows."""
        with _LOCK:
            *lines, rest = (self._begun.get(stream, "") + text).split("\n")
            # A carriage return goes back to the begin of the line; one at its end may belong to a line break.
            self._begun[stream] = rest[rest.rfind("\r", 0, max(0, len(rest) - 1)) + 1 :]
            if lines:
                self._write("".join(line.rstrip("\r").rpartition("\r")[2] + "\n" for line in lines))

    def open(self, path: Path, first: str) -> None:
        """Append to the file `path` from now on: the line `first`, what was shown so far, and what will be shown."""
        with _LOCK:
            if self._descriptor is not None:
                self.close("")
            self._path = path
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                self._warn(error)
            early, self._early = self._early, []
            self._write("".join([first, *early]))

    def close(self, last: str) -> None:
        """Write the lines that have begun, and the line `last`; close the file."""
        with _LOCK:
            begun = [line for line in self._begun.values() if line.strip()]
            self._begun.clear()
            if self._descriptor is not None:
                self._write("".join(f"{line}\n" for line in begun) + last)
                os.close(self._descriptor)
                self._descriptor = None

    def _write(self, text: str) -> None:
        if self._descriptor is None:
            self._early.append(text)
            return
        try:
            _write_all(self._descriptor, text.encode("utf-8", "replace"))
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        """Print once that the log is not complete. The work goes on."""
        if self._complete:
            self._complete = False
            sys.stderr.write(f"warning: {self._path}: {error.strerror or error}; lines will be missing there\n")


class Console:
    """`sys.stdout` and `sys.stderr` of a command; made by `open_console`."""

    def __init__(self) -> None:
        self._before = sys.stdout, sys.stderr
        self._writers: dict[object, _Writer] = {}
        self._log: _Log | None = None
        self._out, self._err = Stream(sys.stdout, strict=True), Stream(sys.stderr)
        sys.stdout, sys.stderr = self._out, self._err

    def outlive(self, log_follows: bool = False) -> None:
        """From now on, prints lose lines rather than raise an error or wait.

        Args:
            log_follows: whether to keep the lines for the log file that `log_to` will name.
        """
        if log_follows and self._log is None:
            self._log = _Log()
        for stream in (self._out, self._err):
            stream.outlive(self._writers, self._log)
        with contextlib.suppress(ValueError):  # another thread than the main one
            # A job in the background that prints is stopped where the terminal is set to that (stty tostop).
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)

    def log_to(self, path: Path) -> None:
        """Append the lines of this command to the file `path`: those that `outlive` has kept, and all that follow."""
        self.outlive(log_follows=True)
        assert self._log is not None
        words = shlex.join(["megazh", *sys.argv[1:]])
        self._log.open(path, mark(f"{os.uname().nodename}, process {os.getpid()}: {words}"))

    def finish(self, code: int | None = None) -> None:
        """Write all that waits, and put `sys.stdout` and `sys.stderr` back.

        A reader that takes nothing for 10 seconds does not get the rest.

        Args:
            code: the exit code, for the log.
        """
        if sys.stdout is self._out:
            sys.stdout = self._before[0]
        if sys.stderr is self._err:
            sys.stderr = self._before[1]
        for stream in (self._out, self._err):
            with contextlib.suppress(ReaderGone, WorkerError):
                stream.flush()
        if self._log is not None:
            self._log.close("" if code is None else mark(f"process {os.getpid()} ended with exit code {code}"))
        for stream in (self._out, self._err):
            stream.release()
        with contextlib.suppress(KeyboardInterrupt):
            for writer in self._writers.values():
                writer.finish()
        self._writers.clear()


_active: Console | None = None


@contextlib.contextmanager
def open_console() -> Iterator[Console]:
    """Replace `sys.stdout` and `sys.stderr` inside the block; the console that is open already is used again."""
    global _active
    if _active is not None:
        yield _active
        return
    _open_closed_descriptors()
    console = _active = Console()
    try:
        yield console
    finally:
        _active = None
        console.finish()


def finish_console(code: int) -> None:
    """Write all that waits, before a process ends by `os._exit`."""
    if _active is not None:
        _active.finish(code)


def lenient(stream: TextIO | Any | None) -> Stream:
    """An output that loses what cannot be written to `stream`, instead of raising an error."""
    return stream if isinstance(stream, Stream) and not stream._strict else Stream(stream)


def _open_closed_descriptors() -> None:
    """Open /dev/null as stdin, stdout or stderr where one is closed (`>&-`).

    The next file that is opened would get its number, and what is printed would land in it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # another program with this terminal has set it so
            select.select([], [descriptor], [])
