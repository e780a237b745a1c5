"""How sources are cut into pieces that workers take: by bytes, row groups, record batches, files or stream chunks.

Where the cuts fall depends on the sources and the options alone, never on how many workers there are.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megazh.corpus.sources import Format, Source
from megazh.errors import DataError, UsageError

_BLOCK = 1 << 20
_SEARCH = 1 << 16
_OVERLAP = 1 << 10  # a blank line with more white space than this may go unseen at the edge of a block
ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, SystemError)
"""What pyarrow raises for damaged files; the last two for bytes that make no sense deep inside."""
BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n")


class TextDocuments(StrEnum):
    """Where a document ends in plain text."""

    FILE = "file"
    """At the end of the file."""
    BLANK_LINES = "blank-lines"
    """At a line that holds nothing but ASCII white space."""


@dataclass(frozen=True)
class ReadOptions:
    """What tells the documents in a source apart."""

    text_key: str = "text"
    text_documents: TextDocuments = TextDocuments.FILE
    max_document_bytes: int = 64_000_000

    def max_raw_bytes(self, format: Format) -> int:
        """Longer records are not held in memory: JSON writes a byte of text in up to six bytes."""
        return (6 if format is Format.JSONL else 1) * self.max_document_bytes + _BLOCK


@dataclass(frozen=True)
class Piece:
    """A part of a source, small enough for one worker."""

    source: int
    """Number of the source in the sorted list (the first one, where a piece is several whole files)."""
    ordinal: int
    """Number of the piece within its source."""
    start: int
    end: int
    """Half-open range: bytes, row groups, record batches or source numbers, by what the source is."""
    weight: int
    """Bytes on disk that the piece stands for, for progress."""
    data: bytes | None = None
    """What a chunk of a compressed stream holds; None for all other pieces."""
    cut_short: bool = False
    """`data` ends within a record that is too long to be held in memory; the piece has nothing after that record."""
    lines_cut: int = 0
    """Newlines of that record which `data` does not hold."""

    @property
    def key(self) -> str:
        """Name of the piece; in the order of the documents when sorted."""
        return f"{self.source:06d}-{self.ordinal:08d}"


def piece_sources(sources: Sequence[Source], piece: Piece, options: ReadOptions) -> Sequence[Source]:
    """The files of a piece: one, or several where a document is a file."""
    if sources[piece.source].format is Format.TEXT and options.text_documents is TextDocuments.FILE:
        return sources[piece.start : piece.end]
    return sources[piece.source : piece.source + 1]


def piece_size(sources: Sequence[Source]) -> int:
    """Bytes a piece: 1 MiB for small corpora, so that all workers have some, up to 16 MiB for large ones."""
    return min(max(sum(source.size for source in sources) // 256, 1 << 20), 16 << 20)


def cut(sources: Sequence[Source], options: ReadOptions, size: int) -> Iterator[Piece]:
    """All pieces in the order of the documents. Streams are decompressed here, once.

    Raises:
        DataError: a source is damaged or holds no such column.
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
        if source.compression:
            yield from _cut_stream(number, source, options, size)
        elif source.format is Format.PARQUET:
            yield from _cut_groups(number, source, _parquet_group_sizes(source, options.text_key), size)
        elif source.format is Format.ARROW:
            yield from _cut_groups(number, source, _arrow_batch_sizes(source, options.text_key), size)
        else:
            yield from _cut_plain(number, source, size)
        number += 1


def _cut_groups(number: int, source: Source, sizes: Sequence[int], size: int) -> Iterator[Piece]:
    """Runs of whole groups of about `size` bytes."""
    start = ordinal = weight = 0
    total = max(sum(sizes), 1)
    for end, group in enumerate(sizes, start=1):
        weight += group
        if weight >= size or end == len(sizes):
            yield Piece(number, ordinal, start, end, weight * source.size // total)
            start, ordinal, weight = end, ordinal + 1, 0


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open for reading in small steps. Raises DataError where it is no Parquet file."""
    try:
        return pq.ParquetFile(path, buffer_size=_BLOCK, pre_buffer=False)
    except ARROW_ERRORS as error:
        raise damaged(path, "Parquet", error) from None


def open_arrow(path: Path) -> tuple[Any, bool]:
    """Open an Arrow IPC file (True) or stream (False). Raises DataError where it is neither."""
    try:
        mapped = pa.memory_map(str(path))
        try:
            return pa.ipc.open_file(mapped), True
        except pa.ArrowInvalid:
            mapped.seek(0)
            return pa.ipc.open_stream(mapped), False
    except ARROW_ERRORS as error:
        raise damaged(path, "Arrow", error) from None


def damaged(path: Path, what: str, error: Exception) -> DataError:
    """One line for a file that its own library cannot read."""
    return DataError(f"{path}: truncated or damaged {what} file: {' '.join(str(error).split())}")


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
    """Raises UsageError where `key` (a column, or `a.b` within structs) is missing, or holds no text."""
    if key in schema.names:
        found = schema.field(key).type
    else:
        head, *rest = key.split(".")
        found = schema.field(head).type if head in schema.names else None
        for part in rest:
            if found is None or not pa.types.is_struct(found) or found.get_field_index(part) < 0:
                found = None
                break
            found = found.field(part).type
    if found is None:
        raise UsageError(f"{path}: no column '{key}'; columns: {', '.join(schema.names)} (choose with --text-key)")
    value = found.value_type if pa.types.is_dictionary(found) else found
    if not any(is_kind(value) for is_kind in _TEXT_TYPES):
        raise UsageError(f"{path}: column '{key}' is {found}, not text (choose with --text-key)")


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


def open_compressed(source: Source) -> tuple[Any, Any]:
    """The decompressed stream of a source, and the file under it, whose `tell()` gives progress."""
    file = pa.OSFile(str(source.path))
    return pa.CompressedInputStream(file, source.compression), file


def read_block(source: Source, stream: Any, size: int = _BLOCK) -> bytes:
    """The next bytes of a decompressed stream. Raises DataError where it is truncated or damaged."""
    try:
        return stream.read(size)
    except ARROW_ERRORS as error:
        raise damaged(source.path, str(source.compression), error) from None


def _cut_plain(number: int, source: Source, size: int) -> Iterator[Piece]:
    """Byte ranges of whole records: each ends with the first record that ends `size` bytes on, or later."""
    with open(source.path, "rb") as file:
        start = ordinal = 0
        while start < source.size:
            end = start + size - 1
            file.seek(end)
            tail = b""
            while end < source.size:
                block = file.read(_SEARCH)
                if not block:
                    raise DataError(f"{source.path}: shorter than the {source.size} bytes it had at the start")
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
    """Chunks of whole records by the same rule; of a record too long for memory, only the beginning is kept."""
    limit = size + options.max_raw_bytes(source.format)
    stream, file = open_compressed(source)
    pending = bytearray()
    ordinal = told = 0
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
                overlap = min(_OVERLAP, len(pending) - (size - 1))  # no more than was searched
                lines_cut, rest = _pass_over(source, stream, bytes(pending[-overlap:]))
                end = len(pending)
                pending += rest
            else:
                block = read_block(source, stream)
                at_end = not block
                pending += block
        told, before = file.tell(), told
        data = bytes(pending[:end] if end else pending)
        if data:
            yield Piece(number, ordinal, 0, 0, told - before, data, cut_short, lines_cut)
        del pending[: len(data)]
        ordinal += 1


def _pass_over(source: Source, stream: Any, tail: bytes) -> tuple[int, bytes]:
    """Read on to the end of the record of which `tail` was read: (newlines passed, what follows the record)."""
    lines = 0
    old = len(tail)
    while block := read_block(source, stream):
        tail += block
        if end := _record_end(tail, 0, source.format):
            return lines + tail[old:end].count(b"\n"), tail[end:]
        lines += tail[old:].count(b"\n")
        tail = tail[-_OVERLAP:]
        old = len(tail)
    return lines, b""


def _record_end(data: bytes | bytearray, start: int, format: Format) -> int:
    """Where the first record ends that ends after `start`: after a newline (JSONL) or a blank line; 0 where none."""
    if format is Format.JSONL:
        return data.find(b"\n", start) + 1
    match = BLANK_LINE.search(data, start)
    return match.end() if match else 0
