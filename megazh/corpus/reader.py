"""Documents of a piece, in batches small enough for one encoder call."""

import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from megazh.corpus.formats import CONVERTED, Format
from megazh.corpus.options import ReadOptions, TextDocuments
from megazh.corpus.pieces import ARROW_ERRORS, BLANK, Piece, damaged, open_arrow, open_parquet, read_block
from megazh.corpus.records import Batch, Reason, RecordError, Rejected, add_text, decode, json_text, row_text
from megazh.corpus.sources import Source
from megazh.corpus.streams import is_stream, open_stream
from megazh.errors import DataError

_BOM = b"\xef\xbb\xbf"
_BATCH_BYTES = 1 << 19
_BUFFER = 1 << 18
_BATCH_ROWS = 256
_BLANK_BYTES = 1 << 10
_PIECE_BYTES = 16 << 20  # a piece is no longer than this and the record that it ends with


def read_piece(sources: Sequence[Source], piece: Piece, options: ReadOptions) -> Iterator[Batch]:
    """Batches of the documents of `piece`, in order. Line numbers in a batch count from 1 at the start of the batch.

    Args:
        sources: the files of the piece, `piece_sources(all_sources, piece, options)`.

    Raises:
        DataError: a file is damaged, cannot be read, or is shorter than when it was cut.
    """
    source = sources[0]
    try:
        if source.format is Format.TEXT and options.text_documents is TextDocuments.FILE:
            yield from _whole_files(sources, options)
        elif source.format is Format.PARQUET:
            yield from _parquet_rows(source, piece, options)
        elif source.format is Format.ARROW:
            yield from _arrow_rows(source, piece, options)
        elif source.format is Format.JSONL or source.format in CONVERTED:
            yield from _json_lines(source, piece, options)
        else:
            yield from _paragraphs(_records(source, piece, options), options)
    except OSError as error:
        raise DataError(f"{error.filename or source.path}: cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class _Records:
    """Bytes of whole records; `cut_short` and `lines_cut` are those of `Piece`."""

    data: bytes
    cut_short: bool
    lines_cut: int


def _records(source: Source, piece: Piece, options: ReadOptions) -> _Records:
    if piece.data is not None:
        data, cut_short, lines_cut = piece.data, piece.cut_short, piece.lines_cut
    else:
        size = piece.end - piece.start
        held = min(size, _PIECE_BYTES + options.max_raw_bytes(source.format))
        with open(source.path, "rb") as file:
            file.seek(piece.start)
            data = file.read(held)
            if len(data) != held:
                raise _shorter(source)
            cut_short, lines_cut, left = held < size, 0, size - held
            while left and (block := file.read(min(left, _PIECE_BYTES))):
                lines_cut += block.count(b"\n")
                left -= len(block)
    if piece.ordinal == 0:
        data = data.removeprefix(_BOM)
    return _Records(data, cut_short, lines_cut)


def _too_long(line: int, options: ReadOptions) -> Rejected:
    return Rejected(line, Reason.TOO_LONG, f"more than {options.max_document_bytes} bytes")


def _json_lines(source: Source, piece: Piece, options: ReadOptions) -> Iterator[Batch]:
    limit = options.max_raw_bytes(source.format)
    key = options.text_key
    plain = options.max_document_bytes // 4  # characters of at most four bytes: no text of this length is too long
    loads = orjson.loads
    text_of = row_text if source.format in (Format.CSV, Format.TSV) else json_text
    batch = Batch()
    line = batch_line = position = 0
    batch_end = _BATCH_BYTES
    with contextlib.ExitStack() as stack:
        file: BinaryIO
        if piece.data is not None:
            file, size, cut_short = io.BytesIO(piece.data), len(piece.data), piece.cut_short
        else:
            file = stack.enter_context(open(source.path, "rb", buffering=_BUFFER))
            file.seek(piece.start)
            size = piece.end - piece.start
            cut_short = size > _PIECE_BYTES + limit
        for raw in iter(lambda: file.readline(limit + 1), b"") if cut_short else file:
            position += len(raw)
            line += 1
            if line == 1 and piece.ordinal == 0:
                raw = raw.removeprefix(_BOM)
            try:  # fast path for ordinary lines; all others go through the checks of _add_json
                text = loads(raw)[key]
                simple = type(text) is str and 0 < len(text) <= plain and text[0] != "\ufeff"
            except (orjson.JSONDecodeError, KeyError, TypeError):
                simple = False
            if simple:
                batch.texts.append(text)
            elif cut_short and not raw.endswith(b"\n"):
                batch.rejected.append(_too_long(line - batch_line, options))
                position = size
            else:
                _add_json(batch, line - batch_line, raw, options, text_of)
            if position >= batch_end:
                batch.lines = line - batch_line
                raw = b""
                yield batch
                batch, batch_line, batch_end = Batch(), line, position + _BATCH_BYTES
            if position >= size:
                break
    if position < size:
        raise _shorter(source)
    batch.lines = line - batch_line
    yield batch


def _shorter(source: Source) -> DataError:
    return DataError(f"{source.path}: shorter than the {source.size} bytes it had at first; do not change inputs")


def _add_json(
    batch: Batch, line: int, raw: bytes, options: ReadOptions, text_of: Callable[[bytes, str], str | None]
) -> None:
    try:
        text = text_of(raw, options.text_key)
        if text is not None:
            add_text(batch, line, text, options.max_document_bytes)
    except RecordError as error:
        batch.rejected.append(_rejected(line, error, options))


def _rejected(line: int, error: RecordError, options: ReadOptions) -> Rejected:
    if options.encoding and error.reason is Reason.INVALID_UTF8:
        # The stream was decoded from its encoding; what was not valid there is not valid now.
        return Rejected(line, Reason.INVALID_ENCODING, f"not valid {options.encoding}")
    return Rejected(line, error.reason, error.detail)


def _paragraphs(records: _Records, options: ReadOptions) -> Iterator[Batch]:
    """Documents separated by blank lines; the line end of a document's last line is dropped, all others are kept."""
    batch = Batch()
    line = batch_line = 0
    batch_start = start = position = 0
    first = last_end = 0  # number of the document's first line (0: between documents), offset of its end
    for raw in io.BytesIO(records.data):
        line += 1
        if not BLANK.fullmatch(raw):
            if not first:
                first, start = line, position
            last_end = position + len(raw)
        elif first:
            _add_raw(batch, first - batch_line, _without_line_end(records.data[start:last_end]), options)
            first = 0
            if position - batch_start >= _BATCH_BYTES:
                batch.lines = line - batch_line
                yield batch
                batch, batch_start, batch_line = Batch(), position, line
        position += len(raw)
    if records.cut_short:
        # If the data ends in the blank lines after a document, that document is whole and nothing was lost. But a
        # longer run of white space may hide the beginning of the next document.
        if first or len(records.data) - last_end > _BLANK_BYTES:
            batch.rejected.append(_too_long((first or line + 1) - batch_line, options))
    elif first:
        _add_raw(batch, first - batch_line, _without_line_end(records.data[start:last_end]), options)
    # A line in which the data ends is counted in `line`, and its newline in `lines_cut`.
    counted_twice = records.lines_cut > 0 and not records.data.endswith(b"\n")
    batch.lines = line - batch_line + records.lines_cut - counted_twice
    yield batch


def _without_line_end(raw: bytes) -> bytes:
    return raw.removesuffix(b"\n").removesuffix(b"\r") if raw.endswith(b"\n") else raw


def _add_raw(batch: Batch, line: int, raw: bytes, options: ReadOptions) -> None:
    try:
        add_text(batch, line, decode(raw), options.max_document_bytes)
    except RecordError as error:
        batch.rejected.append(_rejected(line, error, options))


def _whole_files(sources: Sequence[Source], options: ReadOptions) -> Iterator[Batch]:
    """One batch per file; a file counts as one line."""
    for source in sources:
        batch = Batch(lines=1)
        limit = options.max_document_bytes + len(_BOM) + 1
        if is_stream(source, options):
            stream = open_stream(source, options)
            raw = b""
            while len(raw) < limit and (block := read_block(stream, limit - len(raw))):
                raw += block
            raw = raw[:limit]  # a stream may give a little more than it was asked for
        else:
            with open(source.path, "rb") as file:
                raw = file.read(limit)
        if len(raw) == limit:
            batch.rejected.append(_too_long(1, options))
        else:
            _add_raw(batch, 1, raw, options)
        yield batch


def _parquet_rows(source: Source, piece: Piece, options: ReadOptions) -> Iterator[Batch]:
    with open_parquet(source.path) as file:
        groups = list(range(piece.start, piece.end))
        batches = file.iter_batches(
            batch_size=_BATCH_ROWS, row_groups=groups, columns=[options.text_key], use_threads=False
        )
        yield from _rows(source, batches, options)


def _arrow_rows(source: Source, piece: Piece, options: ReadOptions) -> Iterator[Batch]:
    reader, is_file = open_arrow(source.path)
    batches: Iterable[pa.RecordBatch]
    if is_file:
        batches = (reader.get_batch(number) for number in range(piece.start, piece.end))
    else:
        batches = itertools.islice(reader, piece.start, piece.end)
    yield from _rows(source, batches, options)


def _rows(source: Source, batches: Iterable[pa.RecordBatch], options: ReadOptions) -> Iterator[Batch]:
    options = replace(options, encoding=None)  # which is for text, JSON and CSV: tables hold UTF-8
    try:
        for rows in batches:
            column = _column(rows, options.text_key)
            for start in range(0, len(column), _BATCH_ROWS):
                part = column.slice(start, _BATCH_ROWS).cast(pa.large_binary())
                part.validate(full=True)  # in a damaged file, offsets may point anywhere
                values = part.to_pylist()
                batch = Batch(lines=len(values))
                for line, raw in enumerate(values, start=1):
                    if raw is None:
                        batch.rejected.append(Rejected(line, Reason.NOT_TEXT, f"'{options.text_key}' is null"))
                    else:
                        _add_raw(batch, line, raw, options)
                yield batch
    except ARROW_ERRORS as error:
        raise damaged(source.path, source.format.value, error) from None


def _column(rows: pa.RecordBatch, key: str) -> pa.Array:
    """Column `key`, or the field that `a.b` names in nested structs; a dictionary column is decoded."""
    if key in rows.schema.names:
        column = rows.column(key)
    else:
        head, *rest = key.split(".")
        column = pc.struct_field(rows.column(head), rest)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
