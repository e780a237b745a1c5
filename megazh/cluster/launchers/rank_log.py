"""The log file of a rank: copied to the terminal while the rank runs, searched for the reason when it has died."""

import os
import re
import sys
from pathlib import Path

_TAIL_BYTES = 1 << 16
_LONGEST_MESSAGE = 300

# torch.distributed puts the rank in front of a traceback.
_RANK = r"^(?:\[rank\d+\]: ?)?"
_ERROR = re.compile(_RANK + r"(error: .+)")
_FINAL = re.compile(_RANK + r"(?:error: |interrupted|Traceback \(most recent call last\))")
_EXCEPTION = re.compile(_RANK + r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception)(?:: .*)?)$")


class RankLog:
    """The log of one rank. It is appended to; output of earlier attempts is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin = self._shown = path.stat().st_size if path.exists() else 0
        self._showing = True

    def show(self) -> None:
        """Copy new lines to stderr, up to a final error: that is reported by the launcher."""
        if not self._showing or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._shown)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            text = line.decode(errors="replace")
            if not text.endswith(("\n", "\r")):
                break
            if _FINAL.match(text):
                self._showing = False
                break
            self._shown += len(line)
            sys.stderr.write(text)
        if lines:
            sys.stderr.flush()

    def hide(self) -> None:
        """Show nothing more: the output of a rank after another has failed does not help."""
        self._showing = False

    def tail(self) -> list[str]:
        """The last lines of this attempt."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._begin, size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()

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
