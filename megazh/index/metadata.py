"""`PREFIX.json`, the description of an index: its sources, options, tokenizer and contents.

Equal input gives an equal file: it holds no times, hosts or worker counts.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from megazh.config import Config, from_mapping
from megazh.errors import DataError, UsageError
from megazh.files import sha256_file
from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.tokenizer.tokenizer import rank_kind

FORMAT_VERSION = 1
CORE_SUFFIXES = (".idx", ".bin", ".docs", ".json")
"""Suffixes of the files that every index has. `.idx` comes first: once it is deleted, the rest counts as no index."""
INDEX_SUFFIXES = (*CORE_SUFFIXES, ".mask", ".tokenizer.json", ".log", ".rejected.jsonl")
"""Suffixes of all files that a build may write at a prefix and that could be taken for input or are in its way."""


class TokenizerInfo(Config):
    """The tokenizer that encoded the documents."""

    kind: str
    fingerprint: str
    vocab_size: int
    eod: str
    """End-of-document token as text, as the tokenizer writes it."""
    eod_id: int
    pad_id: int | None
    front_tokens: bool
    """Whether `<pad> <bos> <eos> <unk>` were put in front of a SentencePiece model's ids, as ids 0 to 3."""
    file: str
    """Suffix of the tokenizer's copy beside the index; its path is PREFIX + file."""
    sha256: str
    """SHA-256 of that file."""


class SourceInfo(Config):
    """One input file."""

    name: str
    """Path relative to the folder that all inputs have in common."""
    bytes: int
    sha256: str


class FileInfo(Config):
    """One file of the index."""

    bytes: int
    sha256: str


class Files(Config):
    """Sizes and hashes of the binary files, which belong together."""

    bin: FileInfo
    idx: FileInfo
    docs: FileInfo
    mask: FileInfo | None = Field(default=None, exclude_if=lambda mask: mask is None)
    """Which tokens are trained; absent if there is no `PREFIX.mask`, and all are. See `megazh.index.mask`."""

    def by_suffix(self) -> dict[str, FileInfo]:
        """The files that there are, by suffix."""
        found = {".idx": self.idx, ".bin": self.bin, ".docs": self.docs}
        return found if self.mask is None else {**found, ".mask": self.mask}


class TemplateInfo(Config):
    """The chat template that made the documents from conversations."""

    name: str
    jinja: str
    stop: str
    """Control token that ends an answer."""


class Options(Config):
    """Reading options: they decide what the documents are."""

    format: str | None
    """Format given for all inputs; null if each file's suffix decided."""
    text_key: str
    text_documents: str
    max_document_bytes: int
    encoding: str | None = None
    """Encoding of text, JSON and CSV; null for UTF-8."""
    train: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Answers of conversations that are trained; for conversations only, as are the keys below."""
    max_tokens: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """Largest number of tokens of a conversation."""
    too_long: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """What became of longer conversations."""
    noise: dict[str, float] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Noise on the turns of the user, if any: values of `megazh.finetune.noise.Noise`."""
    copies: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """Copies of each conversation, if more than one."""
    data_set: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """`megazh.conversation.registry.DataSet.fingerprint` of the set."""


class Rejected(Config):
    """Number of records that were rejected as bad, in total and by reason."""

    total: int
    reasons: dict[str, int]


class Coverage(Config):
    """How much of the text the tokens stand for; see `megazh.tokenizer.coverage`."""

    characters: int
    """Number of characters of all documents."""
    lost_characters: int
    """Number of characters that no token stands for: unknown or dropped ones, and lost line breaks."""
    unknown_tokens: int
    token_bytes: int | None
    """Number of UTF-8 bytes that the tokens stand for; null if the tokenizer keeps all bytes of a text."""

    @property
    def share(self) -> float:
        """Share of the characters that are lost."""
        return self.lost_characters / max(self.characters, 1)


class Metadata(Config):
    """The contents of `PREFIX.json`."""

    format: Literal["megazh-index"] = "megazh-index"
    format_version: Literal[1] = 1
    tokenizer: TokenizerInfo
    template: TemplateInfo | None = Field(default=None, exclude_if=lambda template: template is None)
    """Absent for an index of plain text."""
    dtype: str
    documents: int
    tokens: int
    """Number of tokens, end-of-document tokens included."""
    text_bytes: int
    """Size of all documents in UTF-8 bytes, for bits per byte."""
    coverage: Coverage | None = None
    """Null for an index from before this was counted, or whose text is not known."""
    empty_documents: int
    """Number of documents without text; they are not in the index."""
    rejected: Rejected
    token_length_histogram: dict[str, int]
    """Number of documents by length: key k, a power of two, counts those of k to 2k - 1 tokens."""
    options: Options
    sources: list[SourceInfo]
    files: Files

    def to_bytes(self) -> bytes:
        """The contents of the file."""
        return (self.model_dump_json(indent=1) + "\n").encode()


def metadata_path(prefix: Path | str) -> Path:
    """Path of the description, `PREFIX.json`."""
    return Path(f"{prefix}.json")


def read_metadata(prefix: Path | str) -> Metadata | None:
    """The description in `PREFIX.json`, or None without such a file. Raises DataError if it is damaged or foreign."""
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


def sum_coverage(parts: Iterable[Coverage | None]) -> Coverage | None:
    """The coverage of several indexes of one tokenizer together; None if it is not known for one of them."""
    known = []
    for part in parts:
        if part is None:
            return None
        known.append(part)
    sizes = [part.token_bytes for part in known]
    return Coverage(
        characters=sum(part.characters for part in known),
        lost_characters=sum(part.lost_characters for part in known),
        unknown_tokens=sum(part.unknown_tokens for part in known),
        token_bytes=None if None in sizes else sum(size or 0 for size in sizes),
    )


def length_histogram(lengths: npt.NDArray[np.integer]) -> dict[int, int]:
    """Number of documents by the largest power of two that is not above their length in tokens; 0 for empty ones."""
    found = np.bincount(np.frexp(lengths.astype(np.float64))[1])
    return {(1 << exponent) >> 1: int(count) for exponent, count in enumerate(found) if count}


def load_tokenizer_of(prefix: Path | str, metadata: Metadata) -> Tokenizer:
    """The tokenizer of an index, loaded from the copy beside it. Raises DataError if that is missing or has changed."""
    info = metadata.tokenizer
    path = Path(f"{prefix}{info.file}")
    if not path.exists():
        raise DataError(f"{path}: missing; it is the copy of the tokenizer that made {prefix}.bin")
    if sha256_file(path) != info.sha256:
        raise DataError(f"{path}: is not the tokenizer that made {prefix}.bin: its content has changed")
    return load_tokenizer(path, info.eod, info.front_tokens, rank_kind(info.kind))
