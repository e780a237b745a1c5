"""From the inputs that a user names (files, folders, globs) to a sorted list of source files of known format.

`docs/data.md` (Which files are read) states the rule.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megazh.corpus.compression import open_bytes
from megazh.corpus.encodings import SAMPLE_BYTES, byte_order_mark, encoding_fault
from megazh.corpus.formats import (
    COLUMNAR,
    HEAD_BYTES,
    Content,
    Format,
    by_suffix,
    content_of,
    remedy_for,
    unknown_suffix,
)
from megazh.corpus.listing import Candidate, LeftOut, list_files, printable
from megazh.corpus.options import ReadOptions
from megazh.corpus.records import RecordError, value_at
from megazh.errors import DataError, UsageError
from megazh.progress import Elapsed

_LATER_BYTES = 1 << 14
_LARGEST_DESCRIPTION = 32 << 20
"""Size in bytes up to which a `.json` file of a folder is looked at whole: it may be a description, not text."""
_ABOUT = re.compile(
    r"(?:readme|licen[cs]e)(?:[._-][a-z]{2,8}){0,2}|copying|notice|changelog|contributing|code_of_conduct|citation"
    r"|(?:md5|sha1|sha256)sums?|checksums?|vocab|merges",
    re.IGNORECASE,
)
"""Names, without suffix, of text files that are not text of a data set: about it, or part of a tokenizer."""
_CACHED = re.compile(r"cache-[0-9a-f]{8,}(?:_\d+_of_\d+)?\.arrow")
"""Names of what `datasets` keeps beside a data set: the result of a step, with the same texts again."""
_REJECTED_KEYS = {"file", "line", "reason", "detail"}
_BOM = "\ufeff"


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    name: str
    """Path relative to the innermost folder that holds all sources, so the same wherever that folder is."""
    format: Format
    compression: str | None
    """`gzip`, `zstd`, `bz2`, `xz`, or None for an uncompressed file."""
    size: int
    """Size on disk in bytes."""


@dataclass
class Listing:
    """The files that the inputs lead to."""

    sources: list[Source] = field(default_factory=list)
    """Files to read, sorted by path."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Files that were found and are not read."""

    def notes(self) -> list[str]:
        """Lines for the person at the terminal: what is left out, and which files are empty."""
        empty = [source.name for source in self.sources if not source.size]
        lines = []
        if self.left_out:
            lines.append(f"left out: {self.left_out.describe()}")
        if empty:
            more = f" and {len(empty) - 3:,} more" if len(empty) > 3 else ""
            lines.append(f"empty files: {', '.join(empty[:3])}{more}")
        return lines


_Properties = tuple[Format, str | None, int]  # format, compression, size of a source


class _NotText(Exception):
    """A file of a folder that is no text of a data set; label and suffix as in `LeftOut.add`."""

    def __init__(self, label: str, suffix: str = "") -> None:
        super().__init__(label)
        self.label, self.suffix = label, suffix


def find_sources(inputs: Sequence[str], format: Format | None = None, read: ReadOptions | None = None) -> list[Source]:
    """The sources of `list_inputs`."""
    return list_inputs(inputs, format, read).sources


def list_inputs(
    inputs: Sequence[str], format: Format | None = None, read: ReadOptions | None = None, ignored: Path | None = None
) -> Listing:
    """Expand files, folders (searched recursively) and globs into sources, sorted by path, each real file once.

    Args:
        inputs: paths of files and folders, and globs.
        format: format of all files; by default, each file's suffix decides. With it, a folder's files of any suffix
            are taken; without it, those of an unknown suffix are left out.
        read: text key and encoding, which decide whether a file can be read.
        ignored: a folder that is passed over without a word.

    Raises:
        UsageError: an input matches no file, or a file that is named by its path has an unknown suffix.
        DataError: a file or folder cannot be read, or is not what its suffix says.
    """
    read = read or ReadOptions()
    listing = Listing()
    found: list[tuple[str, _Properties]] = []
    used: list[Candidate] = []
    with Elapsed("looking at the input") as elapsed:
        files = list_files(inputs, listing.left_out, ignored, elapsed.tick)
        for candidate in files.candidates:
            elapsed.tick()
            path, by_name, compression = _chosen_name(candidate, format)
            try:
                if not candidate.is_named:
                    _check_name(os.path.basename(path), by_name)
                found.append((path, _look_at(Path(path), by_name, compression, format, candidate.is_named, read)))
                used.append(candidate)
            except _NotText as kind:
                listing.left_out.add(kind.label, os.path.basename(path), kind.suffix)
    without = files.without_any(used)
    if without is not None:
        left = f"; left out: {listing.left_out.describe()}" if listing.left_out else ""
        any_suffix = "" if format else "; --format reads files of other suffixes, too"
        raise UsageError(f"--input {without}: no file with text{left}{any_suffix if left else ''}")
    found.sort()
    root = os.path.commonpath([os.path.dirname(path) for path, _ in found])
    listing.sources = [
        Source(Path(path), printable(os.path.relpath(path, root)), *properties) for path, properties in found
    ]
    return listing


def _chosen_name(candidate: Candidate, given: Format | None) -> tuple[str, Format | None, str | None]:
    """The first name of a file whose suffix names a format (else its first name), with format and compression."""
    for path in candidate.names:
        format, compression = by_suffix(path)
        if format or given:
            return path, given or format, compression
    return candidate.names[0], None, None


def _check_name(name: str, format: Format | None) -> None:
    """Raises _NotText for a file of a folder whose name shows that it is no text of a data set.

    Args:
        format: the format of the file, by its suffix or as given.
    """
    own_format = by_suffix(name)[0]
    if own_format in (None, Format.TEXT) and _ABOUT.fullmatch(os.path.splitext(name)[0]):
        raise _NotText(name)
    if _CACHED.fullmatch(name):
        raise _NotText("cache-*.arrow")
    if own_format is None:
        suffix = unknown_suffix(name)
        if format is None or remedy_for(suffix):
            raise _NotText(f"*{suffix}" if suffix else "without a suffix", suffix)


def _look_at(
    path: Path, format: Format | None, compression: str | None, given: Format | None, is_named: bool, read: ReadOptions
) -> _Properties:
    """Format, compression and size of a file, whose beginning is looked at.

    Raises:
        UsageError, DataError: as `list_inputs`.
        _NotText: a file that is not named by the user is no text of a data set.
    """
    if format is None:
        raise _unknown(path)
    if compression and format in COLUMNAR:
        raise UsageError(f"{path}: a compressed {format.value} file cannot be read in parts; decompress it first")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            sample = file.read(SAMPLE_BYTES + 1)
        head = sample[:HEAD_BYTES]
        _check_content(path, head, content_of(head), format, compression, given)
        if format in COLUMNAR:
            return format, compression, size
        if compression:
            sample = _unpacked_sample(path, compression)
        sample, whole = sample[:SAMPLE_BYTES], len(sample) <= SAMPLE_BYTES
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if compression:
        _check_content(path, sample[:HEAD_BYTES], content_of(sample[:HEAD_BYTES]), format, None, given, within=True)
    is_lines = format is not Format.TEXT or read.text_documents.value != "file"
    later = _later_lines(path) if sample.isascii() and not whole and compression is None else b""
    if fault := encoding_fault(sample + later, read.encoding, is_lines):
        raise DataError(f"{path}: {fault}")
    if format in (Format.JSONL, Format.JSON):
        text = sample.decode(read.encoding or "utf-8", "surrogateescape" if read.encoding is None else "replace")
        if not is_named:
            _check_description(path, text.removeprefix(_BOM), whole, compression, size, read)
        format = _json_format(text.removeprefix(_BOM), format)
    return format, compression, size


def _unknown(path: Path) -> UsageError:
    suffix = unknown_suffix(path)
    if remedy := remedy_for(suffix):
        return UsageError(f"{path}: {suffix} files are not read; {remedy}")
    formats = "|".join(Format)
    return UsageError(f"{path}: its suffix names no known format; give --format {formats}")


def _unpacked_sample(path: Path, compression: str) -> bytes:
    """The first `SAMPLE_BYTES` and one more of a file, decompressed."""
    stream, sample = open_bytes(path, compression), b""
    while len(sample) <= SAMPLE_BYTES and (block := stream.read(SAMPLE_BYTES + 1 - len(sample))):
        sample += block
    return sample


def _later_lines(path: Path) -> bytes:
    """Whole lines from a quarter, the middle and three quarters of a file whose beginning shows no encoding."""
    size, found = path.stat().st_size, b""
    with open(path, "rb") as file:
        for quarter in (1, 2, 3):
            file.seek(size * quarter // 4)
            found += file.read(_LATER_BYTES).partition(b"\n")[2].rpartition(b"\n")[0] + b"\n"
    return found


def _check_content(
    path: Path,
    head: bytes,
    content: Content | None,
    format: Format,
    compression: str | None,
    given: Format | None,
    within: bool = False,
) -> None:
    """Raises DataError if the first bytes of a file show that it is not what its suffix says.

    Args:
        within: whether `head` comes from within a compressed file.
    """
    expected = compression or (format.value if format in COLUMNAR else None)
    if content is None:
        if expected is None:
            return
        if not head:
            raise DataError(f"{path}: is empty, and no {expected} file; fetch it again, or leave it out")
        if not compression:
            if not _is_text(head):
                return  # an Arrow stream, or a damaged table: its reader will tell
            how = "give another --format" if given else "rename it to end in what it is (.jsonl, .csv, .txt)"
            raise DataError(f"{path}: holds text, not {expected}; {how}")
        plain = f"plain {byte_order_mark(head) or 'text'}" if _is_text(head) else f"it begins with {head[:4].hex(' ')}"
        raise DataError(f"{path}: is no {compression} file: {plain}; rename it to {path.stem}, or fetch it again")
    if expected and expected in (content.compression, content.format):
        return
    if content.is_markup and not expected and (format is Format.TEXT or given):
        return  # it may be meant as text
    wanted = f"not {expected or format.value}"
    raise DataError(
        f"{path}: holds {content.name}{' inside' if within else ''}, {wanted}; "
        f"{content.remedy.format(name=path.stem if compression else path.name)}"
    )


def _is_text(head: bytes) -> bool:
    return not any(byte < 9 for byte in head)


def _check_description(
    path: Path, text: str, whole: bool, compression: str | None, size: int, read: ReadOptions
) -> None:
    """Raises _NotText for a description: one JSON object without text, or a build's list of rejected lines.

    Args:
        text: the beginning of the file.
        whole: whether `text` is all of it.
    """
    is_json = by_suffix(path)[0] is Format.JSONL and ".json" in path.suffixes[-2:]
    value, rest = _first_value(text)
    if is_json and value is None and not whole and compression is None and size <= _LARGEST_DESCRIPTION:
        value, rest = _first_value(path.read_text(read.encoding or "utf-8", "replace"))
    if not isinstance(value, dict) or _has(value, read.text_key):
        return
    if value.keys() == _REJECTED_KEYS:
        raise _NotText("*.rejected.jsonl")
    if is_json and not rest:
        raise _NotText(f"*.json without '{read.text_key}'")


def _has(value: dict[str, Any], key: str) -> bool:
    try:
        value_at(value, key)
    except RecordError:
        return False
    return True


def _first_value(text: str) -> tuple[Any, str]:
    """(JSON value with which a text begins, or None if it does not end within the text; what follows the value)."""
    text = text.removeprefix(_BOM).lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, ""
    return value, text[end:].lstrip()


def _json_format(text: str, format: Format) -> Format:
    """JSONL if a file that begins with `text` holds one object per line, else JSON."""
    text = text.lstrip()
    first, _, rest = text.partition("\n")
    if format is Format.JSON or text.startswith("["):
        return Format.JSON
    if not rest or not text.startswith("{"):
        return Format.JSONL
    try:
        end = json.JSONDecoder().raw_decode(text)[1]
    except json.JSONDecodeError:
        return Format.JSON if first.strip() == "{" else Format.JSONL
    except RecursionError:
        return Format.JSONL
    return Format.JSON if end > len(first) else Format.JSONL
