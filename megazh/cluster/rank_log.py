"""What a rank says: its log file, shown on the terminal while it runs, and searched for the reason when it has died."""

import os
import re
import sys
from pathlib import Path

_TAIL_BYTES = 1 << 16
_WORDS = 300

# torch.distributed puts the rank in front of a traceback.
_RANK = r"^(?:\[rank\d+\]: ?)?"
_ERROR = re.compile(_RANK + r"(error: .+)")
_FINAL = re.compile(_RANK + r"(?:error: |interrupted|Traceback \(most recent call last\))")
_EXCEPTION = re.compile(_RANK + r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception)(?:: .*)?)$")


class RankLog:
    """The log of one rank, which goes on where earlier runs left it; what these wrote does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin = self._shown = path.stat().st_size if path.exists() else 0
        self._showing = True

    def show(self) -> None:
        """Copy to stderr the lines that have come since the last call, up to the last words: those are reported."""
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
        """Show nothing more: what a rank says after another has failed is of no use."""
        self._showing = False

    def tail(self) -> list[str]:
        """The last lines of this run."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._begin, size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()

    def own_error(self) -> str:
        """The line `error: ...` by which a megazh process says why it ends; empty without one."""
        found = [match[1] for line in self.tail() if (match := _ERROR.match(line))]
        return found[-1] if found else ""

    def last_words(self) -> str:
        """The exception at the end of the traceback, or else the last line; empty where nothing was said."""
        lines = [line for line in self.tail() if line.strip()]
        found = [match[1] for line in lines if (match := _EXCEPTION.match(line))] or lines
        return found[-1].strip()[:_WORDS] if found else ""
