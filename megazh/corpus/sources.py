"""From the inputs that a user names (files, folders, globs) to a sorted list of source files of known format."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megazh.errors import DataError, UsageError


class Format(StrEnum):
    """File format of a source."""

    JSONL = "jsonl"
    """One JSON object per line."""
    PARQUET = "parquet"
    """One document per row."""
    ARROW = "arrow"
    """Arrow IPC file or stream (`datasets` writes streams), one document per row."""
    TEXT = "text"
    """Plain text: one document per file, or documents separated by blank lines."""


_SUFFIXES = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".json": Format.JSONL,
    ".parquet": Format.PARQUET,
    ".pq": Format.PARQUET,
    ".arrow": Format.ARROW,
    ".feather": Format.ARROW,
    ".ipc": Format.ARROW,
    ".txt": Format.TEXT,
    ".text": Format.TEXT,
    ".md": Format.TEXT,
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {"gzip": re.compile(rb"\x1f\x8b"), "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")}


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    name: str
    """Path relative to the innermost folder that holds all sources, so the same wherever that folder is."""
    format: Format
    compression: str | None
    """`gzip`, `zstd`, or None for an uncompressed file."""
    size: int
    """Size on disk in bytes."""


def find_sources(inputs: Sequence[str], format: Format | None = None) -> list[Source]:
    """Expand files, folders (searched recursively) and globs into sources, sorted by path, each file once.

    Args:
        inputs: paths of files and folders, and globs.
        format: format of all files; by default, each file's suffix decides. With it, a folder's files of any suffix
            are taken; without it, those of an unknown suffix are left out.

    Raises:
        UsageError: an input matches no file, or a file has an unknown suffix.
        DataError: a file cannot be read, or its first bytes contradict its suffix.
    """
    paths: set[str] = set()
    for given in inputs:
        matches = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        files = [file for match in matches for file in _files_at(match, format)]
        if not files:
            raise UsageError(f"--input {given}: no file matches")
        paths.update(os.path.abspath(file) for file in files)
    ordered = sorted(paths)
    if not ordered:
        raise UsageError("no input given; name files, folders or globs with --input")
    root = os.path.commonpath([os.path.dirname(path) for path in ordered])
    return [_source(Path(path), _printable(os.path.relpath(path, root)), format) for path in ordered]


def _printable(name: str) -> str:
    """`name` with bytes that are not UTF-8 (as in a GBK file name) written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _files_at(match: str, format: Format | None) -> list[str]:
    if not os.path.isdir(match):
        return [match]
    found = (os.path.join(folder, name) for folder, _, names in os.walk(match) for name in names)
    return sorted(file for file in found if format is not None or _suffixes(Path(file))[0] is not None)


def _suffixes(path: Path) -> tuple[Format | None, str | None]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    return (_SUFFIXES.get(suffixes[-1]) if suffixes else None), compression


def _source(path: Path, name: str, given: Format | None) -> Source:
    by_suffix, compression = _suffixes(path)
    format = given or by_suffix
    if format is None:
        raise UsageError(f"{path}: its suffix names no known format; give --format {'|'.join(Format)}")
    if compression and format in (Format.PARQUET, Format.ARROW):
        raise UsageError(f"{path}: a compressed {format.value} file cannot be read in parts; decompress it first")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if compression and not _MAGIC[compression].match(head):
        raise DataError(f"{path}: not a {compression} file: begins with {head[:4].hex(' ') or 'nothing'}")
    if format is Format.JSONL and not compression and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise DataError(
            f"{path}: holds one JSON array; write one object per line (jq -c '.[]' {path.name} > out.jsonl)"
        )
    return Source(path, name, format, compression, size)
