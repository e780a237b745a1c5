"""`PREFIX.json`: what an index was made from and what is in it; the same bytes for the same input."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from megazh.config import Config, from_mapping
from megazh.errors import DataError, UsageError
from megazh.files import sha256_file
from megazh.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1


class TokenizerInfo(Config):
    """The tokenizer that made the tokens."""

    kind: str
    fingerprint: str
    vocab_size: int
    eod: str
    """The token that ends each document, as the tokenizer writes it."""
    eod_id: int
    pad_id: int | None
    front_tokens: bool
    file: str
    """Suffix of the copy of the tokenizer's file beside the index: PREFIX + file."""
    sha256: str
    """SHA-256 of that file."""


class SourceInfo(Config):
    """One input file."""

    name: str
    """Path below the folder that all inputs share."""
    bytes: int
    sha256: str


class FileInfo(Config):
    """One file of the index."""

    bytes: int
    sha256: str


class Files(Config):
    """The files that belong together."""

    bin: FileInfo
    idx: FileInfo
    docs: FileInfo


class Options(Config):
    """The options that decide what the documents are."""

    format: str | None
    """The format given for all inputs, or null where each file's suffix told."""
    text_key: str
    text_documents: str
    max_document_bytes: int


class Rejected(Config):
    """Lines that gave no document."""

    total: int
    reasons: dict[str, int]


class Metadata(Config):
    """The contents of `PREFIX.json`."""

    format: Literal["megazh-index"] = "megazh-index"
    format_version: Literal[1] = 1
    tokenizer: TokenizerInfo
    dtype: str
    documents: int
    tokens: int
    """End-of-document tokens included."""
    text_bytes: int
    """UTF-8 bytes of the documents, for bits per byte."""
    empty_documents: int
    rejected: Rejected
    token_length_histogram: dict[str, int]
    """Documents by tokens: under key k (a power of two), those of k to 2k - 1 tokens."""
    options: Options
    sources: list[SourceInfo]
    files: Files

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return (self.model_dump_json(indent=1) + "\n").encode()


def metadata_path(prefix: Path | str) -> Path:
    """`PREFIX.json`."""
    return Path(f"{prefix}.json")


def read_metadata(prefix: Path | str) -> Metadata | None:
    """What `PREFIX.json` says, or None where there is none. Raises DataError where it is damaged or foreign."""
    path = metadata_path(prefix)
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: truncated or damaged: {error}") from None
    if not isinstance(values, dict) or values.get("format") != "megazh-index":
        raise DataError(f"{path}: not the description of a megazh index")
    try:
        return from_mapping(values, Metadata, str(path))
    except UsageError as error:
        raise DataError(str(error)) from None


def length_histogram(lengths: npt.NDArray[np.integer]) -> dict[int, int]:
    """Number of documents by the power of two at or below their length in tokens; empty ones are under 0."""
    found = np.bincount(np.frexp(lengths.astype(np.float64))[1])
    return {(1 << exponent) >> 1: int(count) for exponent, count in enumerate(found) if count}


def load_tokenizer_of(prefix: Path | str, metadata: Metadata) -> Tokenizer:
    """The tokenizer whose copy lies beside an index. Raises DataError where it is missing or another one."""
    info = metadata.tokenizer
    path = Path(f"{prefix}{info.file}")
    if not path.exists():
        raise DataError(f"{path}: missing; it is the copy of the tokenizer that made {prefix}.bin")
    if sha256_file(path) != info.sha256:
        raise DataError(f"{path}: is not the tokenizer that made {prefix}.bin: its content has changed")
    return load_tokenizer(path, info.eod, info.front_tokens)
