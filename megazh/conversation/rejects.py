"""Files of rows: JSONL that appears when it is complete, and beside it the rows that were rejected."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import orjson

from megazh.conversation.faults import RowError
from megazh.files import NewFile, fsync_directory
from megazh.writing import writing


def rejected_path(output: Path) -> Path:
    """`OUT.rejected.jsonl` for `OUT.jsonl`."""
    return output.with_name(f"{output.stem}.rejected.jsonl")


class RowFile:
    """A JSONL file that appears under its name, complete, when it is committed.

    Raises:
        WriteError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows = 0
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = NewFile(path.with_name(f".{path.name}.{os.getpid()}"), named=path)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows += 1
        self._file.write(orjson.dumps(row) + b"\n")

    def commit(self) -> None:
        """Flush the file to disk and give it its name."""
        self._file.close()
        with writing(self._path):
            os.chmod(self._file.path, 0o644)
            os.rename(self._file.path, self._path)
            fsync_directory(self._path.parent)

    def discard(self) -> None:
        """Remove the file."""
        self._file.discard()


class Rejects:
    """The rejected rows of a command: counted by reason, and written to a file of their own.

    Args:
        path: the file of rejected rows, such as `rejected_path` gives it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reasons: Counter[str] = Counter()
        self.first = ""
        """File, line and detail of the first one."""
        self._file = RowFile(self.path)

    def add(self, file: str, line: int, error: RowError) -> None:
        """Take a rejected row.

        Args:
            file: name of its file.
            line: its number in the file, from 1.
            error: the reason.
        """
        self.reasons[error.fault.value] += 1
        self.first = self.first or f"{file} line {line:,}: {error.detail}"
        self._file.add({"file": file, "line": line, "reason": error.fault.value, "detail": error.detail})

    @property
    def total(self) -> int:
        """Number of rejected rows."""
        return self.reasons.total()

    def commit(self) -> None:
        """Give the file its name; without a rejected row there is none, also none of an earlier command."""
        if self.total:
            self._file.commit()
            return
        self._file.discard()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def describe(self) -> str:
        """Counts by reason, largest first, such as `3 empty answer, 1 equal answers`."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.discard()


@contextlib.contextmanager
def new_rows(path: Path) -> Iterator[RowFile]:
    """A `RowFile` that is removed unless it was committed."""
    file = RowFile(path)
    try:
        yield file
    finally:
        file.discard()
