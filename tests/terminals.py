"""Programs in a terminal: what a person types goes in, what the screen gets is waited for. Each wait has a limit."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_SECONDS = 90.0


class Terminal:
    """A program in a terminal of its own, of 100 columns; made by `in_terminal`."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process, self._descriptor = process, descriptor
        self.output = ""
        """All that it has written."""
        self._seen, self._bytes = 0, b""

    def type(self, text: str) -> None:
        """Type text; `\\r` is Enter, `\\x03` Ctrl-C, `\\x04` Ctrl-D, `\\x7f` Backspace."""
        os.write(self._descriptor, text.encode())

    def expect(self, text: str, seconds: float = _SECONDS) -> str:
        """Wait for `text` behind what was waited for before; returns what came before it."""
        deadline = time.monotonic() + seconds
        while (at := self.output.find(text, self._seen)) < 0:
            if not self._read(deadline):
                raise AssertionError(
                    f"no {text!r} in\n{self.output[self._seen :]!r}\nbehind\n{self.output[: self._seen]}"
                )
        before, self._seen = self.output[self._seen : at], at + len(text)
        return before

    def more(self, count: int, seconds: float = _SECONDS) -> str:
        """Wait for `count` characters more; returns all that came."""
        deadline = time.monotonic() + seconds
        while len(self.output) < self._seen + count:
            if not self._read(deadline):
                raise AssertionError(f"only {self.output[self._seen :]!r}")
        return self.output[self._seen :]

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size."""
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def end(self, seconds: float = _SECONDS) -> int:
        """Wait for the end of the program; returns its exit code."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        """Read what there is; False at the end of the output, or of the time."""
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([self._descriptor], [], [], left)[0]:
            return False
        try:
            data = os.read(self._descriptor, 4096)
        except OSError:  # the program has closed its side
            return False
        self._bytes += data
        self.output = self._bytes.decode("utf-8", "replace")
        return bool(data)


@contextlib.contextmanager
def in_terminal(args: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Iterator[Terminal]:
    """Start a program in a terminal; when the block ends, it is killed."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **(env or {})}
    process = subprocess.Popen(
        [sys.executable, "-c", _START, *map(str, args)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)


# Makes the terminal the one that sends this process Ctrl-C, then becomes the program.
_START = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
