"""A live view of a run in the terminal, from the files of its folder alone: the run does not know of it."""

import contextlib
import math
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from megazh.errors import UsageError, WorkerError
from megazh.run.watch_frame import Look, frame
from megazh.run.watched import Watched

_REDRAW_SECONDS = 1.0
_LOOK_SECONDS = 0.2  # for keys and for another size of the terminal
_FILE_COLUMNS, _FILE_LINES = 100, 40
_NARROWEST, _LOWEST = 20, 6
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""The second screen of the terminal without a cursor, and back: what was there before stays."""
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_KEYS = "q quit"


def watch(folder: Path, once: bool = False) -> None:
    """Show a run until it has ended or q is pressed. Where the output is no terminal, show it once.

    In a terminal, a run that has not begun is waited for.

    Args:
        folder: the run folder.
        once: whether to show it once, in any case.

    Raises:
        UsageError: the run is shown once, and has not begun.
        WorkerError: its files cannot be read.
    """
    run, live = Watched(folder), sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not once
    if not live:
        while _update(run):
            pass
        if not run.begun:
            raise UsageError(f"{folder}: no run has begun here; in a terminal, without --once, it is waited for")
        _print(run, hint=not once)
        return
    ended = False
    with _screen() as screen:
        ended = _show(run, screen)
    if ended:
        _print(run, hint=False)


def _show(run: Watched, screen: "_Screen") -> bool:
    """Redraw until the run has ended (True) or the person leaves (False)."""
    drawn, size, more = -math.inf, (0, 0), True
    while True:
        due = more or time.monotonic() - drawn >= _REDRAW_SECONDS
        if due:
            more = _update(run)
        if due or screen.size() != size or screen.fresh:
            drawn, size = time.monotonic(), screen.size()
            screen.draw(frame(run, _look(*size), time.time(), _KEYS))
            if not more and run.standing(time.time()).ended:
                return True
        if "q" in screen.key(0.0 if more else _LOOK_SECONDS).lower():
            return False


def _update(run: Watched) -> bool:
    try:
        return run.update()
    except OSError as error:
        raise WorkerError(f"{error.filename or run.folder}: cannot be read: {error.strerror or error}") from None


def _print(run: Watched, hint: bool) -> None:
    """Print one picture, as long as it is."""
    width, height = _Screen.size() if sys.stdout.isatty() else (_FILE_COLUMNS, _FILE_LINES)
    for line in frame(run, _look(width, height), time.time()):
        print(line)
    if hint:
        print("(shown once, since the output is no terminal; in a terminal, it is a live view)")


def _look(width: int, height: int) -> Look:
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return Look(max(_NARROWEST, width), max(_LOWEST, height), terminal, encoding == "utf8")


class _Screen:
    """A terminal that shows pictures and gives keys as they are pressed."""

    def __init__(self) -> None:
        self._keyboard = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._before = None if self._keyboard is None else termios.tcgetattr(self._keyboard)
        self.fresh = True
        """Whether nothing is drawn on it yet."""

    def enter(self) -> None:
        """Take the terminal."""
        if self._keyboard is not None:
            tty.setcbreak(self._keyboard)
        sys.stdout.write(_ENTER)
        sys.stdout.flush()
        self.fresh = True

    def leave(self) -> None:
        """Give it back as it was."""
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        if self._keyboard is not None and self._before is not None:
            termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._before)

    @staticmethod
    def size() -> tuple[int, int]:
        """Columns and lines."""
        width, height = 0, 0
        with contextlib.suppress(OSError):
            width, height = os.get_terminal_size(sys.stdout.fileno())
        return width or 80, height or 24  # some serial lines and containers do not know theirs

    def draw(self, lines: list[str]) -> None:
        """Show lines in place of those before."""
        text = f"{_END_OF_LINE}\n".join(lines)
        sys.stdout.write(f"{_HOME}{text}{_END_OF_LINE}{_BELOW}")
        sys.stdout.flush()
        self.fresh = False

    def key(self, seconds: float) -> str:
        """Wait for a key; empty without one."""
        if self._keyboard is None:
            time.sleep(seconds)
            return ""
        if not select.select([self._keyboard], [], [], seconds)[0]:
            return ""
        pressed = os.read(self._keyboard, 64)
        return pressed.decode("utf-8", "replace") or "q"  # the terminal is gone


@contextlib.contextmanager
def _screen() -> Iterator[_Screen]:
    """The terminal, for the time of the block; given back at its end, at a signal, and while the command is stopped."""
    screen = _Screen()

    def end(number: int, at: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def stop(number: int, at: FrameType | None) -> None:
        screen.leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        screen.enter()  # after fg

    handlers = {signal.SIGTERM: end, signal.SIGHUP: end, signal.SIGTSTP: stop}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    screen.enter()
    try:
        yield screen
    except KeyboardInterrupt:
        pass
    finally:
        screen.leave()
        for number, handler in before.items():
            signal.signal(number, handler)
