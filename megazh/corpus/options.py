"""Options that say where the documents in a source are; imports nothing heavy, for the command line."""

from dataclasses import dataclass
from enum import StrEnum

from megazh.corpus.formats import COLUMNAR, Format

_SLACK = 1 << 20
"""Bytes that a record may be longer than its text."""


class TextDocuments(StrEnum):
    """Where a document ends in a plain-text file."""

    FILE = "file"
    """At the end of the file: one document per file."""
    BLANK_LINES = "blank-lines"
    """At a blank line: one that is empty or holds only white space, as Unicode defines it (U+3000, no-break space)."""


@dataclass(frozen=True)
class ReadOptions:
    """How the documents in a source are found."""

    text_key: str = "text"
    """Key (JSON) or column (CSV, Parquet, Arrow) of the text; `a.b` reaches into nested objects and structs."""
    text_documents: TextDocuments = TextDocuments.FILE
    """Where a document ends in a plain-text file."""
    max_document_bytes: int = 64_000_000
    """Longest document in bytes of UTF-8; a longer one is rejected."""
    encoding: str | None = None
    """Encoding of text, JSON and CSV, as `megazh.corpus.encodings.normal_encoding` gives it; None for UTF-8."""

    def max_raw_bytes(self, format: Format) -> int:
        """Longest record in bytes that is held in memory whole; JSON takes up to six bytes for a byte of text."""
        is_json = format not in (Format.TEXT, *COLUMNAR)  # rows of CSV become JSON, too
        return (6 if is_json else 1) * self.max_document_bytes + _SLACK
