"""Sources as streams of bytes: decompressed, decoded to UTF-8, and with one record per line."""

import codecs
from collections.abc import Iterator

from megazh.corpus.compression import Stream, open_bytes
from megazh.corpus.convert import csv_lines, json_lines
from megazh.corpus.encodings import INVALID
from megazh.corpus.formats import COLUMNAR, CONVERTED, Format
from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import Source


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
    stream = open_bytes(source.path, source.compression)
    if options.encoding:
        stream = _Decoded(stream, options.encoding)
    if source.format is Format.JSON:
        return _Lines(stream, json_lines(source.path, stream, options))
    if source.format in (Format.CSV, Format.TSV):
        return _Lines(stream, csv_lines(source.path, stream, options, source.format is Format.TSV))
    return stream


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
