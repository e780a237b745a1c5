"""The files that the commands for preference data write: rows, and beside them the rows that were rejected."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import orjson

from megazh.corpus.sources import Source
from megazh.errors import UsageError
from megazh.files import NewFile, fsync_directory, locked
from megazh.prefs.messages import RowError
from megazh.writing import check_writable, writing


def rejected_path(output: Path) -> Path:
    """`OUT.rejected.jsonl` for `OUT.jsonl`."""
    return output.with_name(f"{output.stem}.rejected.jsonl")


def check_output(output: Path, sources: Sequence[Source], overwrite: bool) -> None:
    """Check, before anything is read, that the output can be written and replaces nothing by mistake.

    Raises:
        UsageError: it is a folder, an input, has another suffix, is there already, or cannot be written.
    """
    if output.is_dir():
        raise UsageError(f"--to {output}: is a folder; give a file, such as {output}/prefs.jsonl")
    if output.suffix != ".jsonl":
        raise UsageError(f"--to {output}: expected a name that ends in .jsonl")
    for path in (output, rejected_path(output)):
        if any(os.path.realpath(path) == os.path.realpath(source.path) for source in sources):
            raise UsageError(f"--to {output}: {path} is one of the inputs; give another name")
    if output.exists() and not overwrite:
        raise UsageError(f"--to {output}: is there already; give another name, or --force to replace it")
    check_writable(output.parent, "choose another --to", f"--to {output}")


@contextlib.contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Keep other commands from writing `output` inside the block. Raises BusyError if one does."""
    lock = output.with_name(f".{output.name}.lock")
    with locked(lock, f"{output}: another command writes it"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


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
    """The rejected rows of a command: counted by reason, and written beside the output.

    Args:
        output: the file of good rows.
    """

    def __init__(self, output: Path) -> None:
        self.path = rejected_path(output)
        self.reasons: Counter[str] = Counter()
        self.first = ""
        """File, line and detail of the first one."""
        self._file = RowFile(self.path)

    def add(self, source: Source, line: int, error: RowError) -> None:
        """Take a rejected row."""
        self.reasons[error.fault.value] += 1
        self.first = self.first or f"{source.name} line {line:,}: {error.detail}"
        self._file.add({"file": source.name, "line": line, "reason": error.fault.value, "detail": error.detail})

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
