"""Cutting of sources into pieces for workers: byte ranges, row groups, record batches, whole files or stream chunks.

Streams (compressed files, other encodings, JSON arrays, CSV) are read once, here, and their text goes with the pieces.

Where the cuts fall depends on the sources and the options alone, never on the number of workers.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megazh.corpus.compression import Stream, for_pyarrow
from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions, TextDocuments
from megazh.corpus.sources import Source
from megazh.corpus.streams import is_stream, open_stream
from megazh.errors import DataError, UsageError

_BLOCK = 1 << 20
_SEARCH = 1 << 16
_OVERLAP = 1 << 10  # a blank line with more white space than this may be missed between two blocks
ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, SystemError)
"""Exceptions that pyarrow raises for damaged files; ValueError and SystemError come from damage deep inside a file."""
# White space as Unicode defines it, and two invisible characters, zero-width space and byte order mark, in UTF-8.
_SPACES = (
    rb"(?:[ \t\r\f\v\x1c-\x1f]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8b\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"
    rb"|\xef\xbb\xbf)*"
)
BLANK = re.compile(_SPACES + rb"\n?")
"""A line without any visible character."""
BLANK_LINE = re.compile(rb"\n" + _SPACES + rb"\n")


@dataclass(frozen=True)
class Piece:
    """A part of a source, small enough for one worker."""

    source: int
    """Index of the source in the sorted list; of the first source if the piece is several whole files."""
    ordinal: int
    """Index of the piece within its source."""
    start: int
    end: int
    """Half-open range `start:end` in the unit of the source: bytes, row groups, record batches or source indexes."""
    weight: int
    """Bytes on disk that the piece stands for; used for the progress bar."""
    data: bytes | None = None
    """Bytes of a stream chunk; None for all other pieces."""
    cut_short: bool = False
    """Whether `data` ends within a record too long to be held in memory. That record is the last of the piece."""
    lines_cut: int = 0
    """Number of newlines in the part of that record that `data` lacks."""

    @property
    def key(self) -> str:
        """Name of the piece; sorted names are in document order."""
        return f"{self.source:06d}-{self.ordinal:08d}"


def piece_sources(sources: Sequence[Source], piece: Piece, options: ReadOptions) -> Sequence[Source]:
    """Source files of a piece: one, or several if each file is one document."""
    if sources[piece.source].format is Format.TEXT and options.text_documents is TextDocuments.FILE:
        return sources[piece.start : piece.end]
    return sources[piece.source : piece.source + 1]


def piece_size(sources: Sequence[Source]) -> int:
    """Target size of a piece in bytes: a 256th of the corpus, but at least 1 MiB and at most 16 MiB."""
    return min(max(sum(source.size for source in sources) // 256, 1 << 20), 16 << 20)


def cut(sources: Sequence[Source], options: ReadOptions, size: int) -> Iterator[Piece]:
    """All pieces of about `size` bytes, in document order. Streams are read here, once.

    Raises:
        DataError: a source is damaged, or shorter than when it was found.
        UsageError: a table has no text column `options.text_key`, or several.
    """
    number = 0
    while number < len(sources):
        source = sources[number]
        if source.format is Format.TEXT and options.text_documents is TextDocuments.FILE:
            end, weight = number + 1, source.size
            while end < len(sources) and sources[end].format is Format.TEXT and weight + sources[end].size <= size:
                weight += sources[end].size
                end += 1
            yield Piece(number, 0, number, end, weight)
            number = end
            continue
        if is_stream(source, options):
            yield from _cut_stream(number, source, options, size)
        elif source.format is Format.PARQUET:
            yield from _cut_groups(number, source, _parquet_group_sizes(source, options.text_key), size)
        elif source.format is Format.ARROW:
            yield from _cut_groups(number, source, _arrow_batch_sizes(source, options.text_key), size)
        else:
            yield from _cut_plain(number, source, size)
        number += 1


def _cut_groups(number: int, source: Source, sizes: Sequence[int], size: int) -> Iterator[Piece]:
    """Pieces of consecutive whole groups (row groups or record batches), each of about `size` bytes."""
    start = ordinal = weight = 0
    total = max(sum(sizes), 1)
    for end, group in enumerate(sizes, start=1):
        weight += group
        if weight >= size or end == len(sizes):
            yield Piece(number, ordinal, start, end, weight * source.size // total)
            start, ordinal, weight = end, ordinal + 1, 0


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file for reading in small steps. Raises DataError if it is not a Parquet file."""
    try:
        return pq.ParquetFile(for_pyarrow(path), buffer_size=_BLOCK, pre_buffer=False)
    except ARROW_ERRORS as error:
        raise damaged(path, "Parquet", error) from None


def open_arrow(path: Path) -> tuple[Any, bool]:
    """Open an Arrow IPC file or stream: (reader, whether it is a file). Raises DataError if it is neither."""
    try:
        named = for_pyarrow(path)
        mapped = pa.memory_map(named) if isinstance(named, str) else pa.PythonFile(named, "r")
        try:
            return pa.ipc.open_file(mapped), True
        except pa.ArrowInvalid:
            mapped.seek(0)
            return pa.ipc.open_stream(mapped), False
    except ARROW_ERRORS as error:
        raise damaged(path, "Arrow", error) from None


def damaged(path: Path, what: str, error: Exception) -> DataError:
    """One-line error for a file of format `what` that its library cannot read."""
    return DataError(f"{path}: truncated or damaged {what} file: {' '.join(str(error).split())}; fetch it again")


_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_null,
)


def check_column(path: Path, schema: pa.Schema, key: str) -> None:
    """Raises UsageError if column `key` (`a.b` for a field of nested structs) is missing, twice there, or not text."""
    parts = [key] if key in schema.names else key.split(".")
    fields, found = list(schema), None
    for number, part in enumerate(parts):
        same = [field for field in fields if field.name == part]
        if len(same) > 1:
            name = ".".join(parts[: number + 1])
            raise UsageError(f"{path}: has {len(same)} columns '{name}'; rename all but one")
        found = same[0].type if same else None
        fields = list(found) if found is not None and pa.types.is_struct(found) else []
    if found is None:
        raise UsageError(f"{path}: no column '{key}'; columns: {', '.join(schema.names)} (choose one with --text-key)")
    value = found.value_type if pa.types.is_dictionary(found) else found
    if not any(is_type(value) for is_type in _TEXT_TYPES):
        raise UsageError(f"{path}: column '{key}' is {found}, not text (choose another with --text-key)")


def _parquet_group_sizes(source: Source, key: str) -> list[int]:
    with open_parquet(source.path) as file:
        check_column(source.path, file.schema_arrow, key)
        return [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]


def _arrow_batch_sizes(source: Source, key: str) -> list[int]:
    reader, is_file = open_arrow(source.path)
    check_column(source.path, reader.schema, key)
    try:
        batches = reader.num_record_batches if is_file else sum(1 for _ in reader)
    except ARROW_ERRORS as error:
        raise damaged(source.path, "Arrow", error) from None
    return [source.size // batches] * batches if batches else []


def read_block(stream: Stream, size: int = _BLOCK) -> bytes:
    """The next bytes of a stream, b"" at its end. Raises DataError if it is truncated or damaged."""
    return stream.read(size)


def _cut_plain(number: int, source: Source, size: int) -> Iterator[Piece]:
    """Byte ranges of whole records: each ends with the first record that ends `size` or more bytes from its start."""
    with open(source.path, "rb") as file:
        start = ordinal = 0
        while start < source.size:
            end = start + size - 1
            file.seek(end)
            tail = b""
            while end < source.size:
                block = file.read(_SEARCH)
                if not block:
                    raise DataError(
                        f"{source.path}: shorter than the {source.size} bytes it had at first; do not change inputs"
                    )
                tail = tail[-_OVERLAP:] + block
                file_position = file.tell()
                if found := _record_end(tail, 0, source.format):
                    end = file_position - len(tail) + found
                    break
                end = file_position
            end = min(end, source.size)
            yield Piece(number, ordinal, start, end, end - start)
            start, ordinal = end, ordinal + 1


def _cut_stream(number: int, source: Source, options: ReadOptions, size: int) -> Iterator[Piece]:
    """Chunks of whole records, cut as in `_cut_plain`; of a record too long for memory, only the beginning is kept."""
    limit = size + options.max_raw_bytes(source.format)
    stream = open_stream(source, options)
    pending = bytearray()
    ordinal = position = 0
    at_end = False
    while not at_end:
        searched = size - 1
        end = lines_cut = 0
        cut_short = False
        while not end and not at_end:
            if len(pending) > searched:
                end = _record_end(pending, searched, source.format)
                searched = max(len(pending) - _OVERLAP, size - 1)
            if end:
                break
            if len(pending) > limit:
                cut_short = True
                overlap = min(_OVERLAP, len(pending) - (size - 1))  # bytes before `size - 1` must not be searched
                lines_cut, rest = _skip_record(source, stream, bytes(pending[-overlap:]))
                end = len(pending)
                pending += rest
            else:
                block = read_block(stream)
                at_end = not block
                pending += block
        position, before = stream.tell(), position
        data = bytes(pending[:end] if end else pending)
        if data:
            yield Piece(number, ordinal, 0, 0, position - before, data, cut_short, lines_cut)
        del pending[: len(data)]
        ordinal += 1


def _skip_record(source: Source, stream: Stream, tail: bytes) -> tuple[int, bytes]:
    """Read to the end of a record whose bytes read so far end with `tail`: (newlines skipped, bytes after it)."""
    lines = 0
    old = len(tail)
    while block := read_block(stream):
        tail += block
        if end := _record_end(tail, 0, source.format):
            return lines + tail[old:end].count(b"\n"), tail[end:]
        lines += tail[old:].count(b"\n")
        tail = tail[-_OVERLAP:]
        old = len(tail)
    return lines, b""


def _record_end(data: bytes | bytearray, start: int, format: Format) -> int:
    """End of the first record that ends after `start`: behind a blank line (text) or a newline; 0 if none."""
    if format is not Format.TEXT:
        return data.find(b"\n", start) + 1
    match = BLANK_LINE.search(data, start)
    return match.end() if match else 0
