"""File formats: which suffixes name which format, and what the first bytes of a file say that it is."""

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath


class Format(StrEnum):
    """File format of a source."""

    JSONL = "jsonl"
    """One JSON object per line."""
    JSON = "json"
    """One JSON array of objects, or objects that go over several lines."""
    CSV = "csv"
    """Rows of comma-separated fields below a header that names the columns; quoted fields may hold line breaks."""
    TSV = "tsv"
    """As CSV, separated by tabs."""
    PARQUET = "parquet"
    """One document per row."""
    ARROW = "arrow"
    """Arrow IPC file or stream (`datasets` writes streams), one document per row."""
    TEXT = "text"
    """Plain text: one document per file, or documents separated by blank lines."""


COLUMNAR = (Format.PARQUET, Format.ARROW)
"""Binary formats, which are read in parts as they are. All others are text in some encoding."""
CONVERTED = (Format.JSON, Format.CSV, Format.TSV)
"""Formats whose records are rewritten, one per line, before they are handed to workers."""

_SUFFIXES = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".json": Format.JSONL,
    ".csv": Format.CSV,
    ".tsv": Format.TSV,
    ".parquet": Format.PARQUET,
    ".pq": Format.PARQUET,
    ".arrow": Format.ARROW,
    ".feather": Format.ARROW,
    ".ipc": Format.ARROW,
    ".txt": Format.TEXT,
    ".text": Format.TEXT,
    ".md": Format.TEXT,
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_COMPRESSED_SUFFIX = {compression: suffix for suffix, compression in _COMPRESSIONS.items()}

_REMEDIES = {
    "save as .txt": ".doc .docx .pdf .htm .html .mhtml .xml .rtf .odt .wps .epub .mobi .azw3 .ppt .pptx .caj .chm",
    "save as .csv": ".xls .xlsx .ods .db .sqlite",
    "unpack": ".zip .tar .tgz .tbz .tbz2 .txz .tzst .7z .rar .tar.gz .tar.bz2 .tar.xz .tar.zst .warc.gz",
    "compress with gzip, bzip2, xz or zstd instead": ".lz4 .br .z .lzma .lzo .sz .snappy",
}
_REMEDY = {suffix: remedy for remedy, suffixes in _REMEDIES.items() for suffix in suffixes.split()}


def _suffixes(path: str | PurePath) -> list[str]:
    """As `PurePath.suffixes`, in lower case; paths are made of many names, and a `PurePath` of each takes long."""
    name = os.path.basename(path).lower().lstrip(".")
    return [] if name.endswith(".") else [f".{part}" for part in name.split(".")[1:]]


def by_suffix(path: str | PurePath) -> tuple[Format | None, str | None]:
    """Format and compression that the suffixes of a file name; None for those that they do not name."""
    suffixes = _suffixes(path)
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    return (_SUFFIXES.get(suffixes[-1]) if suffixes else None), compression


def unknown_suffix(path: str | PurePath) -> str:
    """The suffix that makes a file unreadable, such as `.pdf` or `.tar.gz`; "" without one."""
    suffixes = _suffixes(path)[-2:]
    if suffixes and (suffixes[-1] in _COMPRESSIONS or "".join(suffixes) in _REMEDY):
        return "".join(suffixes)
    return suffixes[-1] if suffixes else ""


def remedy_for(suffix: str) -> str:
    """What to do with files of a suffix that cannot be read, such as `save as .txt`; "" if nothing is known."""
    return _REMEDY.get(suffix, "")


@dataclass(frozen=True)
class Content:
    """What the first bytes of a file show it to be."""

    name: str
    """Name of the content in messages, such as `gzip data`."""
    remedy: str
    """What to do; `{name}` is the name of the file."""
    compression: str | None = None
    format: Format | None = None
    """Format of a binary table."""
    is_markup: bool = False
    """Whether it is HTML or XML, which may be meant as text."""


def _packed(compression: str) -> Content:
    return Content(f"{compression} data", f"rename it to {{name}}{_COMPRESSED_SUFFIX[compression]}", compression)


_LFS = Content("a Git LFS pointer in place of the file", "fetch the file: git lfs pull")
_ANNEX = Content("a git-annex pointer in place of the file", "fetch the file: git annex get {name}")
_FEATHER_1 = Content(
    "a table in the old format Feather V1",
    'write it again as Parquet: python -c "import pyarrow.feather as f, pyarrow.parquet as p; '
    "p.write_table(f.read_table('{name}'), '{name}.parquet')\"",
)
_HTML = Content("an HTML or XML page", "it may be the error page of a failed download: fetch it again", is_markup=True)
_SIGNATURES = [
    (rb"\x1f\x8b", _packed("gzip")),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _packed("zstd")),
    (rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)", _packed("bz2")),
    (rb"\xfd7zXZ\x00", _packed("xz")),
    (rb"PAR[1E][\x00-\x1f]", Content("a Parquet table", "rename it to {name}.parquet", format=Format.PARQUET)),
    (rb"ARROW1\x00", Content("an Arrow table", "rename it to {name}.arrow", format=Format.ARROW)),
    (rb"FEA1[\x00-\x1f]", _FEATHER_1),
    (rb"version https://(?:git-lfs\.github\.com|hawser\.github\.com)/spec/", _LFS),
    (rb"/annex/objects/", _ANNEX),
    (rb"PK(?:\x03\x04|\x05\x06)", Content("a ZIP archive, or a .docx or .xlsx file", "unpack it, or save it as .txt")),
    (rb"\xd0\xcf\x11\xe0", Content("an old Office file (.doc, .xls)", "save it as .txt or .csv")),
    (rb"%PDF-", Content("a PDF file", "save it as .txt (pdftotext)")),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", Content("an archive (7z or RAR)", "unpack it")),
    (rb"[\s\S]{257}ustar", Content("a tar archive", "unpack it (tar -xf)")),
    (rb"SQLite format 3\x00", Content("an SQLite database", "write its text out as .jsonl or .csv")),
    (rb"MMIDIDX\x00\x00", Content("an index of tokens", "give the text that it was made from")),
    (rb"\x89PNG\r|\xff\xd8\xff|\x7fELF|\x93NUMPY", Content("binary data", "leave it out")),
    (rb"(?:\xef\xbb\xbf)?\s*(?i:<!doctype\s+html|<html[\s>]|<\?xml\s|<head[\s>]|<body[\s>])", _HTML),
]
_COMPILED = [(re.compile(pattern), content) for pattern, content in _SIGNATURES]
HEAD_BYTES = 512
"""Number of bytes from the start of a file that `content_of` needs."""


def content_of(head: bytes) -> Content | None:
    """What the first bytes of a file show it to be; None for text, an empty file, and all that is not known."""
    return next((content for pattern, content in _COMPILED if pattern.match(head)), None)
