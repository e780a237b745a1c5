"""Follows the metrics of a run that is under way: each call reads only what was written since the last one."""

import json
import os
from pathlib import Path
from typing import Any

_CHUNK = 1 << 24


class Tail:
    """Reads metrics.jsonl as it grows.

    A resume rewrites the file without the steps that were lost; then, it is read again from its begin.

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._at, self._begun = 0, 0, b""
        self.unreadable = 0
        """Whole lines that are no JSON object with a kind and a step; they are left out."""
        self.behind = False
        """Whether the last call has left a part of the file for the next one."""

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """Read what is new; of very much, a part (see `behind`).

        Returns:
            Whether the file is another one than before, so that earlier records no longer count, and the new records,
            oldest first. A line that is not complete yet comes with a later call.
        """
        try:
            with open(self._path, "rb") as file:
                anew = self._begin_again(file.fileno())
                file.seek(self._at)
                data = file.read(_CHUNK)
        except FileNotFoundError:
            anew = self._at > 0
            self._inode, self._at, self._begun, self.behind = 0, 0, b"", False
            return anew, []
        self._at += len(data)
        self.behind = len(data) == _CHUNK
        *lines, self._begun = (self._begun + data).split(b"\n")
        return anew, [record for line in lines if (record := self._record(line)) is not None]

    def _begin_again(self, descriptor: int) -> bool:
        found = os.fstat(descriptor)
        anew = self._at > 0 and (found.st_ino != self._inode or found.st_size < self._at)
        if anew:
            self._at, self._begun, self.unreadable = 0, b"", 0
        self._inode = found.st_ino
        return anew

    def _record(self, line: bytes) -> dict[str, Any] | None:
        try:
            record = json.loads(line)
            if isinstance(record["kind"], str) and isinstance(record["step"], int):
                return record
        except (ValueError, KeyError, TypeError):
            pass
        self.unreadable += 1
        return None
