"""The answers that a model has given so far: appended to a file, so that an interrupted command goes on after them."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from megazh.errors import DataError, UsageError
from megazh.writing import write_all, writing


class Answers:
    """`OUT.jsonl.partial`: a line with the settings, then a line for each row that was answered, in order.

    A line is written at once, whole; what a killed process left of its last line is cut off.

    Args:
        path: the file.
        settings: what the answers depend on. A file that was begun with other settings is refused.
        replace: whether to begin such a file anew instead.

    Raises:
        UsageError: the file was begun with other settings.
        DataError: a line of it is damaged.
        WriteError: it cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any], replace: bool) -> None:
        self._path = path
        self.count = 0
        """Number of rows that are answered."""
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        try:
            self._begin(settings, replace)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, settings: dict[str, Any], replace: bool) -> None:
        whole = _whole_bytes(self._path)
        begun = next(self._lines()).get("settings") if whole else settings
        begun = begun if isinstance(begun, dict) else {}
        differing = next((name for name in settings if begun.get(name) != settings[name]), None)
        if differing and not replace:
            raise UsageError(
                f"{self._path}: holds answers that were begun with {differing} {_shown(begun.get(differing))}, and "
                f"this command has {_shown(settings[differing])}; give the same, another --to, or --force to "
                "begin anew"
            )
        if differing:
            whole = 0
        with writing(self._path):
            self._file.truncate(whole)
        if not whole:
            self._write({"settings": settings})
        self.count = sum(1 for _ in self.read())

    def add(self, answer: dict[str, Any]) -> None:
        """Append the answer to the next row."""
        self._write(answer)
        self.count += 1

    def read(self) -> Iterator[dict[str, Any]]:
        """All answers, in order. Raises DataError if a line is damaged."""
        return itertools.islice(self._lines(), 1, None)

    def _lines(self) -> Iterator[dict[str, Any]]:
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    value = orjson.loads(line)
                except orjson.JSONDecodeError:
                    value = None
                if not isinstance(value, dict):
                    raise DataError(f"{self._path}: line {number:,} is damaged; remove the file, and begin anew")
                yield value

    def _write(self, value: dict[str, Any]) -> None:
        with writing(self._path, kept="earlier answers are kept"):
            write_all(self._file, orjson.dumps(value) + b"\n")

    def close(self) -> None:
        """Close the file; it stays where it is."""
        with writing(self._path):
            os.fsync(self._file.fileno())
            self._file.close()

    def remove(self) -> None:
        """Remove the file, once its answers are elsewhere."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def _whole_bytes(path: Path) -> int:
    """Size in bytes of the whole lines of a file."""
    with open(path, "rb") as file:
        return _end_of_last_line(file, os.fstat(file.fileno()).st_size)


def _end_of_last_line(file: BinaryIO, size: int) -> int:
    block = 1 << 16
    for start in range((size - 1) // block * block, -1, -block):
        file.seek(start)
        found = file.read(block).rfind(b"\n")
        if found >= 0:
            return start + found + 1
    return 0


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}..."
