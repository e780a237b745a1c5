"""Progress on the terminal: a bar with rate and ETA, or a line every half minute where the output is a log file."""

import sys
import time
from typing import Self

from tqdm import tqdm

from megazh.console import lenient

_LOG_SECONDS = 30.0


class Progress:
    """Counts bytes of input, and tokens if any, and shows them on stderr.

    Args:
        what: the word in front of the bar.
        total: number of bytes to process.
        quiet: write nothing (every rank but one).
        unit: what is counted in place of bytes, such as "rows".
    """

    def __init__(self, what: str, total: int, quiet: bool = False, unit: str = "B") -> None:
        self._what, self._total, self._quiet, self._unit = what, total, quiet, unit
        self._done = self._tokens = 0
        self._begin = self._printed = time.monotonic()
        self._output = lenient(sys.stderr)  # work goes on where nobody reads
        terminal = self._output.isatty() and not quiet
        self._bar = (
            tqdm(total=total, unit=unit, unit_scale=True, desc=what, dynamic_ncols=True, leave=False, file=self._output)
            if terminal
            else None
        )

    def advance(self, size: int, tokens: int = 0) -> None:
        """Count `size` more bytes and `tokens` more tokens as done."""
        self._done += size
        self._tokens += tokens
        seconds = time.monotonic() - self._begin
        if self._bar is not None:
            if self._tokens:
                self._bar.set_postfix_str(f"{_scaled(self._tokens / max(seconds, 1e-9))}tok/s", refresh=False)
            self._bar.update(size)
        elif not self._quiet and time.monotonic() - self._printed >= _LOG_SECONDS:
            self._printed = time.monotonic()
            left = seconds * (self._total - self._done) / max(self._done, 1)
            rate = f", {_scaled(self._tokens / seconds)}tok/s" if self._tokens else ""
            self._output.write(
                f"{self._what}: {_scaled(self._done)}{self._unit} of {_scaled(self._total)}{self._unit}, "
                f"{_scaled(self._done / seconds)}{self._unit}/s{rate}, {duration(left)} left\n"
            )
            self._output.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class Elapsed:
    """Shows on stderr for how long some work of unknown length has been going on.

    Args:
        what: the word in front of the time.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._begin = self._printed = time.monotonic()
        self._output = lenient(sys.stderr)  # as in `Progress`
        self._terminal = self._output.isatty()

    def tick(self) -> None:
        """Show the time so far: each second on a terminal, each half minute in a log file."""
        now = time.monotonic()
        if now - self._printed < (1 if self._terminal else _LOG_SECONDS):
            return
        self._printed = now
        line = f"{self._what}: {duration(now - self._begin)} so far"
        self._output.write(f"\r{line}" if self._terminal else f"{line}\n")
        self._output.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._printed > self._begin:
            self._output.write("\r\033[K")
            self._output.flush()


def _scaled(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} T"


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
