"""Sources as streams of bytes: decompressed, decoded to UTF-8, and with one record per line."""

import codecs
import io
from collections.abc import Iterator

from megazh.corpus.compression import Stream, open_bytes
from megazh.corpus.convert import ByteReader, csv_lines, json_lines
from megazh.corpus.encodings import INVALID
from megazh.corpus.formats import COLUMNAR, CONVERTED, Format
from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import Source
from megazh.errors import DataError

_BUFFER = 1 << 18


def is_stream(source: Source, options: ReadOptions) -> bool:
    """Whether a source has to be read from its beginning, and so is cut by one process for all others."""
    if source.format in COLUMNAR:
        return False
    return bool(source.compression or options.encoding) or source.format in CONVERTED


def open_stream(source: Source, options: ReadOptions) -> Stream:
    """The text of a source in UTF-8; of JSON arrays, CSV and TSV, one JSON value per record and line.

    Raises:
        OSError: the file cannot be opened.
    """
    stream = _open_text(source, options)
    if source.format is Format.JSON:
        return _Lines(stream, json_lines(source.path, stream, options))
    if source.format in (Format.CSV, Format.TSV):
        return _Lines(stream, csv_lines(source.path, stream, options, source.format is Format.TSV))
    return stream


def json_records(source: Source, options: ReadOptions) -> Iterator[tuple[bytes, int]]:
    """Each record of a JSONL or JSON source as one line, with the number of bytes of the file that were read so far.

    A line of JSONL that is longer than `options.max_raw_bytes` is cut there, and its rest left out.

    Raises:
        OSError: the file cannot be opened or read.
        DataError: the file is damaged. All whole records before the damage were given, up to the last 64 KiB of them
            where the file is compressed.
    """
    stream = _ErrorsLast(_open_text(source, options))
    if source.format is Format.JSON:
        for line in json_lines(source.path, stream, options):
            yield line, stream.tell()
        return
    file = io.BufferedReader(ByteReader(stream), _BUFFER)
    limit, at_start = options.max_raw_bytes(source.format), True
    while line := file.readline(limit):
        yield (line.removeprefix(codecs.BOM_UTF8) if at_start else line), stream.tell()
        at_start = False
        while len(line) == limit and not line.endswith(b"\n"):
            line = file.readline(limit)


def _open_text(source: Source, options: ReadOptions) -> Stream:
    """The bytes of a source, decompressed and in UTF-8."""
    stream = open_bytes(source.path, source.compression)
    return _Decoded(stream, options.encoding) if options.encoding else stream


class _ErrorsLast:
    """A stream that gives all that could be read before it raises an error."""

    _STEP = 1 << 16

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._error: DataError | None = None

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int) -> bytes:
        if self._error:
            raise self._error
        found, length = [], 0
        try:
            while length < size and (part := self._stream.read(min(size - length, self._STEP))):
                found.append(part)
                length += len(part)
        except DataError as error:
            if not found:
                raise
            self._error = error
        return b"".join(found)


class _Decoded:
    """A stream in another encoding as UTF-8. Bytes that are not valid become the byte 0xFF, which UTF-8 never has."""

    def __init__(self, stream: Stream, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(INVALID)
        self._ended = False

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int) -> bytes:
        while not self._ended:
            raw = self._stream.read(size)
            self._ended = not raw
            if text := self._decoder.decode(raw, final=self._ended):
                return text.encode("utf-8", "surrogateescape")
        return b""


class _Lines:
    """A stream of lines that are made from another stream."""

    def __init__(self, below: Stream, lines: Iterator[bytes]) -> None:
        self._below, self._lines = below, lines

    def tell(self) -> int:
        return self._below.tell()

    def read(self, size: int) -> bytes:
        found, length = [], 0
        for line in self._lines:
            found.append(line)
            length += len(line)
            if length >= size:
                break
        return b"".join(found)
