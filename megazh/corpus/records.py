"""Documents and rejected lines: what counts as a document, and why a line is rejected."""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import orjson

_DETAIL = 200  # characters


class Reason(StrEnum):
    """Why a line was rejected."""

    BROKEN_JSON = "broken JSON"
    MISSING_KEY = "missing key"
    NOT_TEXT = "not text"
    INVALID_UTF8 = "invalid UTF-8"
    LONE_SURROGATE = "lone surrogate"
    TOO_LONG = "too long"
    BROKEN_ROW = "broken row"
    """A row of a CSV file with another number of fields than its header."""
    INVALID_ENCODING = "invalid in its encoding"
    """Bytes that are not valid in the encoding that was given."""


@dataclass(frozen=True)
class Rejected:
    """A line that gives no document; `line` counts from 1 at the start of its batch.

    A line is a row in Parquet, Arrow and CSV, and an element of a JSON array.
    """

    line: int
    reason: Reason
    detail: str


@dataclass
class Batch:
    """Consecutive documents of one source."""

    texts: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    empty: int = 0
    """Number of documents without any character; they are skipped."""
    lines: int = 0
    """Number of lines (rows) read, whether or not they gave a document."""


class RecordError(Exception):
    """A record gives no document. Carries the reason and a detail, both for the reject file."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail[:_DETAIL].encode("utf-8", "backslashreplace").decode()  # may quote a lone surrogate


def decode(raw: bytes) -> str:
    """Decode UTF-8. Raises RecordError if the bytes are not valid UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        where = f"byte {error.start}: {raw[error.start : error.start + 4].hex(' ')}"
    try:
        raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise RecordError(Reason.INVALID_UTF8, where) from None
    raise RecordError(Reason.LONE_SURROGATE, where)


def check_length(text: str, max_bytes: int) -> None:
    """Raises RecordError if `text` is longer than `max_bytes` in UTF-8."""
    if 4 * len(text) > max_bytes and (size := len(text.encode())) > max_bytes:
        raise RecordError(Reason.TOO_LONG, f"{size} bytes, more than {max_bytes}")


def add_text(batch: Batch, line: int, text: str, max_bytes: int) -> None:
    """Add the text of a document to `batch`, without a byte order mark but otherwise as it is.

    An empty text is counted only; one longer than `max_bytes` in UTF-8 is rejected.
    """
    if text.startswith("\ufeff"):
        text = text[1:]
    if not text:
        batch.empty += 1
        return
    try:
        check_length(text, max_bytes)
    except RecordError as error:
        batch.rejected.append(Rejected(line, error.reason, error.detail))
        return
    batch.texts.append(text)


def json_text(line: bytes, key: str) -> str | None:
    """Text under `key` in a JSON line (`a.b` reaches into nested objects); None for a blank line.

    `NaN` and `Infinity`, which strict JSON lacks, are accepted, since Python's own `json` writes them.

    Raises:
        RecordError: the line is not valid JSON or holds no text under `key`.
    """
    if not line.strip():
        return None
    text = value_at(json_value(line), key)
    if not isinstance(text, str):
        raise RecordError(Reason.NOT_TEXT, f"'{key}' is {_type_name(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(Reason.LONE_SURROGATE, f"character {error.start}: {text[error.start]!a}") from None
    return text


def json_value(line: bytes) -> Any:
    """The value of a JSON line, `NaN` and `Infinity` included. Raises RecordError if it is not valid JSON."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return _python_json(line)


def row_text(line: bytes, key: str) -> str:
    """Text of a CSV row as `megazh.corpus.convert.csv_lines` writes it. Raises RecordError if it gives none."""
    value = orjson.loads(line)
    if isinstance(value, list):
        reason, detail = value
        raise RecordError(Reason(reason), detail)
    return value[key]


def _python_json(line: bytes) -> Any:
    """Parse a line that orjson refuses with Python's own `json`, which is more lenient and much slower."""
    try:
        return json.loads(decode(line))
    except (ValueError, RecursionError) as error:
        raise RecordError(Reason.BROKEN_JSON, str(error)) from None


def value_at(value: Any, key: str) -> Any:
    """The value under `key` (`a.b` reaches into nested objects). Raises RecordError if there is none."""
    if isinstance(value, dict) and key in value:
        return value[key]
    at = value
    for part in key.split("."):
        if not isinstance(at, dict) or part not in at:
            is_object = isinstance(value, dict)
            found = f"keys: {', '.join(list(value)[:8])}" if is_object else f"the line is {_type_name(value)}"
            raise RecordError(Reason.MISSING_KEY, f"no '{key}'; {found}")
        at = at[part]
    return at


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "a string"}
    return names.get(type(value), "a number")
