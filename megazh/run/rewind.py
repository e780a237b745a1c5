"""The end of a metrics.jsonl: what is recorded of a step, and what a run drops that goes on from an earlier one.

The file is read from its end, and only as far as needed: a run of a million steps has half a gigabyte of records.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megazh.errors import DataError
from megazh.files import fsync_directory
from megazh.run.records import record_of

_BLOCK = 1 << 20


def drop_after(path: Path, step: int) -> None:
    """Rewrite a metrics.jsonl without records after `step`, but for events.

    Lines behind the record of `step` that cannot be read go, too: a power cut may leave such. All that stays before was
    flushed to disk before the checkpoint of `step` got its name.

    Args:
        path: the file.
        step: the step to go on from; of 0, nothing but events stays.

    Raises:
        DataError: a line is of a newer schema.
        OSError: it cannot be rewritten; the old content stays.
    """
    kept: list[bytes] = []
    head = dropped = unreadable = 0
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        for at, line in _lines_backwards(file):
            record, end = _record_of(path, line), at + len(line) + 1
            if record is None:
                dropped += len(line) > 0
                unreadable += end <= size  # else incomplete, as a kill leaves it, or empty
            elif record["kind"] == "step" and 0 < record["step"] <= step and end <= size:
                head = end
                break
            elif record["kind"] == "event" or 0 < step >= record["step"]:
                kept.append(line + b"\n")
                dropped += end > size  # its line end is missing
            else:
                dropped += 1
        if unreadable:
            print(
                f"warning: {path}: {unreadable:,} lines behind step {step:,} cannot be read, as a power cut may leave "
                "them; they are removed",
                file=sys.stderr,
                flush=True,
            )
        if dropped or unreadable:
            _rewrite(path, file, head, b"".join(reversed(kept)))


def records_of_step(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of a step at the end of a metrics.jsonl, last one first; lines that cannot be read are passed over.

    Raises:
        DataError: a line is of a newer schema.
    """
    found = []
    with open(path, "rb") as file:
        for _, line in _lines_backwards(file):
            record = _record_of(path, line)
            if record is None:
                continue
            if record["step"] == step:
                found.append(record)
            elif record["kind"] != "event" and record["step"] < step:
                break
    return found


def _lines_backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the offset of each line and the line without its end, last one first.

    The first is what is behind the last line end: empty, or a line that is not complete.
    """
    begin, rest = file.seek(0, os.SEEK_END), b""
    while begin > 0:
        size = min(begin, _BLOCK)
        begin -= size
        file.seek(begin)
        rest, *lines = (file.read(size) + rest).split(b"\n")
        end = begin + len(rest) + sum(len(line) + 1 for line in lines)
        for line in reversed(lines):
            yield end - len(line), line
            end -= len(line) + 1
    yield 0, rest


def _record_of(path: Path, line: bytes) -> dict[str, Any] | None:
    try:
        return record_of(line)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _rewrite(path: Path, file: BinaryIO, head: int, tail: bytes) -> None:
    """Replace a file by its first `head` bytes and `tail`: temporary name, fsync, rename."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as new:
            file.seek(0)
            shutil.copyfileobj(file, new, _BLOCK)
            new.truncate(head)
            new.seek(head)
            new.write(tail)
            new.flush()
            os.fsync(new.fileno())
        os.chmod(name, 0o644)
        os.rename(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
