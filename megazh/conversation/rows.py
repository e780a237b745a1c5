"""Rows of JSON, JSONL, Parquet and Arrow files, one at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megazh.conversation.faults import Fault, RowError, type_name
from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions
from megazh.corpus.pieces import ARROW_ERRORS, damaged, open_arrow, open_parquet
from megazh.corpus.records import RecordError, json_value
from megazh.corpus.sources import Listing, Source, list_inputs
from megazh.corpus.streams import json_records
from megazh.errors import DataError, UsageError

FORMATS = (Format.JSONL, Format.JSON, Format.PARQUET, Format.ARROW)
"""Formats that hold whole rows, not just a text."""
_ROWS = 256


@dataclass(frozen=True)
class Row:
    """A row of a file, or why there is none."""

    line: int
    """Number of the line, of the element of a JSON array, or of the row of a table, from 1."""
    value: dict[str, Any] | RowError
    position: int
    """Bytes of the file that were read up to it."""


def find_rows(inputs: Sequence[str], format: Format | None, encoding: str | None) -> tuple[Listing, ReadOptions]:
    """The files that inputs (files, folders, globs) lead to, and how to read them.

    Raises:
        UsageError: an input matches no file, or a file cannot hold rows.
        DataError: a file cannot be read, or is not what its suffix says.
    """
    # A folder's single object with messages in it is a row, not a description of the folder.
    options = ReadOptions(text_key="conversations", encoding=encoding)
    try:
        listing = list_inputs(inputs, format, options)
    except UsageError as error:
        raise UsageError(str(error).removeprefix("--input ")) from None
    for source in listing.sources:
        if source.format not in FORMATS:
            raise UsageError(
                f"{source.path}: {source.format.value} files hold no rows of questions and answers; give JSON, JSONL, "
                "Parquet or Arrow"
            )
    return listing, options


def read_rows(source: Source, options: ReadOptions) -> Iterator[Row]:
    """The rows of a file, in order; blank lines are passed over.

    Raises:
        DataError: the file is damaged; the message names the place. All whole rows before it were given.
    """
    rows = _table_rows(source) if source.format in (Format.PARQUET, Format.ARROW) else _json_rows(source, options)
    line = 0
    try:
        for line, row in enumerate(rows, start=1):
            if row is not None:
                value, position = row
                yield Row(line, value, position)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read: {error.strerror or error}") from None
    except DataError as error:
        raise DataError(f"{error} (the {line:,} rows before it were read)") from None


_Found = tuple[dict[str, Any] | RowError, int] | None


def _json_rows(source: Source, options: ReadOptions) -> Iterator[_Found]:
    limit = options.max_raw_bytes(source.format)
    for line, position in json_records(source, options):
        if not line.strip():
            yield None
        elif len(line) >= limit:
            yield RowError(Fault.BROKEN_JSON, f"a line of {limit:,} bytes or more"), position
        else:
            yield _object(line), position


def _object(line: bytes) -> dict[str, Any] | RowError:
    try:
        value = json_value(line)
    except RecordError as error:
        return RowError(Fault.BROKEN_JSON, error.detail)
    return value if isinstance(value, dict) else RowError(Fault.NOT_AN_OBJECT, f"it is {type_name(value)}")


def _table_rows(source: Source) -> Iterator[_Found]:
    done = 0
    try:
        if source.format is Format.PARQUET:
            with open_parquet(source.path) as file:
                total = max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(batch_size=_ROWS):
                    batch.validate(full=True)  # in a damaged file, offsets may point anywhere
                    for value in batch.to_pylist():
                        done += 1
                        yield value, source.size * done // total
            return
        reader, is_file = open_arrow(source.path)
        count = reader.num_record_batches if is_file else 0
        batches = map(reader.get_batch, range(count)) if is_file else iter(reader)
        for number, batch in enumerate(batches, start=1):
            batch.validate(full=True)
            for value in batch.to_pylist():
                # A stream does not know its length before its end.
                yield value, source.size * number // count if count else 0
    except ARROW_ERRORS as error:
        raise damaged(source.path, source.format.value, error) from None
