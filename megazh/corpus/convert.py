"""Records that do not lie one per line (JSON arrays, CSV) rewritten as one JSON value per line."""

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions
from megazh.corpus.records import Reason, RecordError, decode
from megazh.errors import DataError, UsageError

_BLOCK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_LINE_BREAKS = re.compile(r"[\r\n]+")
_NEAR = 16  # characters; an error so near the end of what was read may be due to that end
_DELIMITERS = ",;\t|"


def json_lines(path: Path, stream: Any, options: ReadOptions) -> Iterator[bytes]:
    """The values of a JSON array, or of a file of values one after another, as one line each.

    Only line breaks between the tokens of a value are changed. Bytes that are not UTF-8 stay as they are.

    Raises:
        DataError: a value is not valid JSON, or the file ends within it.
    """
    reader = _JsonReader(path, stream, options.max_raw_bytes(Format.JSON))
    in_array = reader.skip("[")
    if in_array and reader.skip("]"):
        in_array = False
    else:
        while in_array or not reader.at_end():
            yield reader.value()
            if in_array and not reader.skip(","):
                if not reader.skip("]"):
                    raise reader.fault("expected , or ] after the record")
                in_array = False
                break
            if not in_array:
                reader.skip(",")
    if not reader.at_end():
        raise reader.fault("there is more behind the end of the array")


class _JsonReader:
    """Reads JSON values from a stream; holds little more than one value at a time."""

    def __init__(self, path: Path, stream: Any, limit: int) -> None:
        self._path, self._stream, self._limit = path, stream, limit
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._before = 0  # characters before those of `_text`
        self._count = 0
        self._more()
        self._text = self._text.removeprefix("\ufeff")

    def _more(self) -> None:
        """Read about as much again as is held."""
        raw = self._stream.read(max(_BLOCK, 2 * (len(self._text) - self._at)))
        self._before += self._at
        self._text = self._text[self._at :] + self._decode(raw, final=not raw)
        self._at, self._ended = 0, not raw

    def skip(self, mark: str) -> bool:
        """Skip white space and then `mark`, if it comes next; returns whether it did."""
        if self.at_end() or self._text[self._at] != mark:
            return False
        self._at += 1
        return True

    def at_end(self) -> bool:
        """Skip white space; returns whether nothing follows."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None, "matches the empty text, too"
            self._at = space.end()
            if self._at < len(self._text):
                return False
            if self._ended:
                return True
            self._more()

    def value(self) -> bytes:
        """The next value as a line."""
        self.at_end()
        while True:
            fault, at = "", 0
            try:
                _, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                end, fault, at = len(self._text), error.msg, error.pos
            except RecursionError:
                raise self.fault("nested too deeply") from None
            if self._ended or (end < len(self._text) and not fault):
                break
            if fault and at < len(self._text) - _NEAR and not fault.startswith("Unterminated string"):
                break
            if len(self._text) - self._at > self._limit:
                raise self.fault(f"longer than {self._limit:,} characters; raise --max-document-bytes")
            self._more()
        if fault:
            is_cut = fault.startswith("Unterminated string") or not self._text[at:].strip()
            raise self.fault("the file ends within it: it is cut off" if self._ended and is_cut else fault, at)
        line = _LINE_BREAKS.sub(" ", self._text[self._at : end])
        self._at, self._count = end, self._count + 1
        return line.encode("utf-8", "surrogateescape") + b"\n"

    def fault(self, why: str, at: int | None = None) -> DataError:
        """One-line error that names the record and the place."""
        position = self._before + (self._at if at is None else at)
        return DataError(
            f"{self._path}: broken JSON at record {self._count + 1:,}, character {position:,}: {why}; repair the file, "
            "or fetch it again"
        )


class ByteReader(io.RawIOBase):
    """A stream as Python's `io` reads it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._rest = stream, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._rest or self._stream.read(_BLOCK)
        size = min(len(data), len(buffer))
        buffer[:size], self._rest = data[:size], data[size:]
        return size


def csv_lines(path: Path, stream: Any, options: ReadOptions, tabs: bool) -> Iterator[bytes]:
    """The rows below the header as `{"<key>": "<text>"}`, one per line.

    A row that gives no text is written as `["<reason>", "<detail>"]`. Rows without any field (blank lines) are skipped.

    Args:
        tabs: whether tabs separate the fields. Otherwise commas do, or whichever of `;`, tab and `|` gives a header
            with the column.

    Raises:
        UsageError: the header has no column `options.text_key`, or has it twice.
        DataError: a quoted field is broken, or never ends.
    """
    key, limit = options.text_key, options.max_raw_bytes(Format.CSV)
    file = io.TextIOWrapper(io.BufferedReader(ByteReader(stream), _BLOCK), "utf-8-sig", "surrogateescape", newline="")
    first = file.readline(limit)
    if not first:
        return
    delimiter = "\t" if tabs else _delimiter(first, key)
    if re.fullmatch(r"sep=.\r?\n", first):  # Excel's own first line
        first, delimiter = file.readline(limit), first[4]
    csv.field_size_limit(limit)  # Python's own limit is 131,072 characters
    rows = csv.reader(itertools.chain([first], _lines(path, file, limit)), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        column = _column(path, header, key)
        for row in rows:
            if row:
                yield _csv_line(row, column, len(header), key)
    except csv.Error as error:
        why = str(error)
        if "field larger" in why or "unexpected end" in why:
            why = f"{why}: a quoted field never ends"
        raise DataError(
            f'{path}: broken CSV at line {rows.line_num:,}: {why}; a quote inside a field is written as two: ""'
        ) from None


def _lines(path: Path, file: io.TextIOWrapper, limit: int) -> Iterator[str]:
    while line := file.readline(limit):
        if len(line) == limit:
            raise DataError(f"{path}: a line of more than {limit:,} characters; raise --max-document-bytes")
        yield line


def _delimiter(line: str, key: str) -> str:
    """The delimiter that gives a header with the column `key`; a comma if none does."""
    for delimiter in _DELIMITERS:
        names = next(csv.reader([line], delimiter=delimiter), [])
        if key in [name.strip() for name in names]:
            return delimiter
    return ","


def _column(path: Path, header: list[str], key: str) -> int:
    if header.count(key) > 1:
        raise UsageError(f"{path}: has {header.count(key)} columns '{key}'; rename all but one")
    if key in header:
        return header.index(key)
    names = ", ".join(name[:40] for name in header[:20]).encode("utf-8", "replace").decode()
    raise UsageError(f"{path}: no column '{key}'; its first line names: {names} (choose one with --text-key)")


def _csv_line(row: list[str], column: int, columns: int, key: str) -> bytes:
    if len(row) < columns or any(row[columns:]):
        detail = f"{len(row)} fields, and the header has {columns}: is a delimiter or a line break not quoted?"
        return _fault(Reason.BROKEN_ROW, detail)
    text = row[column]
    try:
        return orjson.dumps({key: text}) + b"\n"
    except (TypeError, ValueError):  # lone surrogates, which stand for bytes that are not valid
        pass
    try:
        decode(text.encode("utf-8", "surrogateescape"))
    except RecordError as error:
        return _fault(error.reason, error.detail)
    except UnicodeEncodeError as error:
        return _fault(Reason.LONE_SURROGATE, f"character {error.start}")
    raise AssertionError("text that cannot be written as JSON is not valid UTF-8")


def _fault(reason: Reason, detail: str) -> bytes:
    return orjson.dumps([reason.value, detail]) + b"\n"
