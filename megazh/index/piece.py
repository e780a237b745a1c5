"""One piece of a build: read its documents, encode them, and write the result to a piece file.

A piece file holds tokens, int32 lengths, uint64 content hashes, a JSON footer, the footer's size (uint64) and a
magic number. It appears by rename. It is not flushed to disk: its checksum shows damage after a power failure.
"""

import contextlib
import itertools
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megazh.corpus.options import ReadOptions
from megazh.corpus.pieces import Piece
from megazh.corpus.reader import read_piece
from megazh.corpus.sources import Source
from megazh.errors import DataError
from megazh.files import NewFile
from megazh.tokenizer.coverage import Counts, CoverageTable
from megazh.tokenizer.encoders import Encoder, EncoderSource, Ids, Offsets, encode_each
from megazh.tokenizer.tokenizer import TokenizerFile
from megazh.writing import writing

_MAGIC = b"MZPIECE2"
_TAIL = struct.Struct("<Q8s")
_SAMPLE_ONE_IN = 1000  # one document in so many is checked against the reference encoder
_SAMPLE_CHARACTERS = 4096  # longest document that is checked
_FIRST_CHARACTERS = 1000  # longest document that is checked as the first of a piece


@dataclass(frozen=True)
class Setup:
    """What a worker needs besides the task; the same for the whole build."""

    options: ReadOptions
    encoders: EncoderSource
    eod_id: int
    vocab_size: int
    dtype: str
    counted: TokenizerFile | None
    """The tokenizer, to count what its ids stand for; None if it keeps all bytes of a text."""
    control_ids: frozenset[int]
    """Ids that no document may contain besides the end-of-document id that is put after it."""
    probes: tuple[str, ...]
    """Texts on which the fast encoder is tried."""
    folder: Path
    """Folder of the piece files."""


@dataclass(frozen=True)
class Task:
    """Work for a worker: encode a piece or, without one, try the fast encoder on unusual strings."""

    piece: Piece | None
    sources: Sequence[Source]
    """The files of the piece."""
    fast: bool
    """Whether to use the fast encoder instead of the reference encoder."""


@dataclass(frozen=True)
class Sample:
    """A document and its ids, to be decoded and, if they are of the fast encoder, checked against the reference."""

    text: str
    ids: list[int]


@dataclass
class Result:
    """Result of a task; the tokens of a piece are in its file."""

    key: str
    """Key of the piece."""
    weight: int = 0
    """Size of the piece in bytes, for progress."""
    tokens: int = 0
    encoder: str = ""
    """Name of the encoder."""
    samples: list[Sample] = field(default_factory=list)
    failure: str | None = None
    """Reason why the fast encoder cannot be used."""


class Worker:
    """Does tasks, one at a time. Loads each encoder when it is first needed, and keeps it."""

    def __init__(self) -> None:
        self._encoders: dict[tuple[EncoderSource, bool], Encoder | None] = {}
        self._tables: dict[TokenizerFile, CoverageTable] = {}

    def run(self, setup: Setup, task: Task) -> Result:
        """Do `task`.

        Raises:
            DataError: a source is damaged.
        """
        if task.piece is None:
            return self._try_fast(setup)
        try:
            encoder = self._encoder(setup, task.fast)
            assert encoder is not None, "the fast encoder is used only after it was tried"
        except ImportError as error:  # it was tried on one worker only, and this one runs on another host
            if not task.fast:
                raise
            return Result(task.piece.key, failure=str(error))
        try:
            return encode_piece(setup, task.piece, task.sources, encoder, self._table(setup.counted))
        except EncoderFailedError as error:
            if not task.fast:
                raise
            return Result(task.piece.key, encoder=encoder.name, failure=str(error))

    def load(self, setup: Setup, fast: bool) -> None:
        """Load what the first task needs before it comes; an encoder that cannot be loaded fails in that task."""
        self._table(setup.counted)
        with contextlib.suppress(ImportError):
            self._encoder(setup, fast)

    def _encoder(self, setup: Setup, fast: bool) -> Encoder | None:
        key = (setup.encoders, fast)
        if key not in self._encoders:
            self._encoders[key] = setup.encoders.fast() if fast else setup.encoders.reference()
        return self._encoders[key]

    def _table(self, file: TokenizerFile | None) -> CoverageTable | None:
        if file is None:
            return None
        if file not in self._tables:
            self._tables[file] = CoverageTable(file.load())
        return self._tables[file]

    def _try_fast(self, setup: Setup) -> Result:
        try:
            encoder = self._encoder(setup, fast=True)
            if encoder is None:
                return Result("trial")
            ids = encode_each(encoder, setup.probes)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a missing package, a tokenizer that it cannot read, a panic in native code
            return Result("trial", failure=_first_line(error))
        samples = [Sample(text, found) for text, found in zip(setup.probes, ids, strict=True)]
        return Result("trial", encoder=encoder.name, samples=samples)


def encode_piece(
    setup: Setup, piece: Piece, sources: Sequence[Source], encoder: Encoder, table: CoverageTable | None
) -> Result:
    """Encode the documents of `piece` into its piece file, with the end-of-document id after each.

    Args:
        table: counts what the ids stand for; None if the tokenizer keeps all bytes of a text.

    Raises:
        DataError: a source is damaged.
        EncoderFailedError: the encoder failed.
        WriteError: the disk is full or gone; nothing of the piece is left.
    """
    dtype = np.dtype(setup.dtype)
    result = Result(piece.key, weight=piece.weight, encoder=encoder.name)
    lengths: list[npt.NDArray[np.int32]] = []
    hashes: list[int] = []
    rejected: list[tuple[int, str, str]] = []
    empty = lines = text_bytes = 0
    counts = Counts(token_bytes=None if table is None else 0)
    digest = xxhash.xxh3_64()
    final = piece_path(setup.folder, piece.key, encoder.name)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    file = NewFile(temporary, named=final)
    try:
        for batch in read_piece(sources, piece, setup.options):
            rejected += [(lines + bad.line, bad.reason.value, bad.detail) for bad in batch.rejected]
            lines += batch.lines
            empty += batch.empty
            for texts in _calls(batch.texts):
                ids, offsets = _encode(encoder, texts, setup)
                counts.characters += sum(map(len, texts))
                if table is not None:
                    table.count(texts, ids, offsets, counts)
                raw = [text.encode() for text in texts]  # cheap: the encoder made each str cache its UTF-8
                new_hashes = [xxhash.xxh3_64_intdigest(text) for text in raw]
                text_bytes += sum(map(len, raw))
                del raw
                tokens = _with_ends(ids, offsets, setup, dtype)
                file.write(tokens.data)
                digest.update(tokens.data)
                lengths.append((np.diff(offsets) + 1).astype(np.int32))
                result.samples += _samples(texts, new_hashes, ids, offsets, first=not hashes)
                hashes += new_hashes
                result.tokens += len(tokens)
        all_lengths = np.concatenate(lengths) if lengths else np.empty(0, np.int32)
        for array in (all_lengths, np.array(hashes, np.uint64)):
            file.write(array.tobytes())
            digest.update(array.tobytes())
        footer = {
            "documents": len(hashes),
            "tokens": result.tokens,
            "text_bytes": text_bytes,
            "coverage": asdict(counts),
            "empty": empty,
            "lines": lines,
            "rejected": rejected,
            "encoder": encoder.name,
            "checksum": digest.hexdigest(),
        }
        packed = json.dumps(footer, ensure_ascii=False).encode("utf-8", "backslashreplace")
        file.write(packed + _TAIL.pack(len(packed), _MAGIC))
        file.close(durable=False)
        with writing(final):
            os.rename(temporary, final)
    except BaseException:
        file.discard()
        raise
    return result


def remove_unfinished_pieces(folder: Path) -> None:
    """Remove what workers that were killed have left of unfinished piece files."""
    for path in folder.glob(".*.piece.*"):
        with contextlib.suppress(OSError):
            path.unlink()


class EncoderFailedError(DataError):
    """An encoder raised, or returned an id that is not in the vocabulary, or that only control tokens may have."""


def _encode(encoder: Encoder, texts: list[str], setup: Setup) -> tuple[Ids, Offsets]:
    try:
        ids, offsets = encoder.encode_batch(texts)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in native code is not an Exception
        raise EncoderFailedError(f"{encoder.name} failed ({_first_line(error)}) on {texts[0][:40]!r}") from None
    if len(ids) and int(ids.max()) >= setup.vocab_size:
        raise EncoderFailedError(
            f"{encoder.name} gave id {int(ids.max())}, but the vocabulary has {setup.vocab_size} ids"
        )
    is_control = np.zeros(setup.vocab_size, np.bool_)
    is_control[list(setup.control_ids)] = True
    wrong = np.flatnonzero(is_control[ids])
    if len(wrong):
        text = texts[int(np.searchsorted(offsets, wrong[0], "right")) - 1]
        raise EncoderFailedError(
            f"{encoder.name} gave the id {ids[wrong[0]]} of a control token for ordinary text: {text[:40]!r}"
        )
    return ids, offsets


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _calls(texts: list[str]) -> Iterator[list[str]]:
    """Lists of documents, one per encoder call: many short documents together, a very long one alone."""
    start = size = 0
    for at, text in enumerate(texts):
        size += len(text)
        if size > 1 << 20 and at > start:
            yield texts[start:at]
            start, size = at, len(text)
    if start < len(texts):
        yield texts[start:]


def _with_ends(ids: npt.NDArray, offsets: npt.NDArray, setup: Setup, dtype: np.dtype) -> npt.NDArray:
    """(tokens,) ids with the end-of-document id after each document, in the dtype of the index."""
    documents = len(offsets) - 1
    tokens = np.empty(len(ids) + documents, dtype)
    ends = offsets[1:] + np.arange(documents)
    is_text = np.ones(len(tokens), np.bool_)
    is_text[ends] = False
    tokens[is_text] = ids
    tokens[ends] = setup.eod_id
    return tokens


def _samples(
    texts: list[str], hashes: list[int], ids: npt.NDArray, offsets: npt.NDArray, first: bool
) -> Iterator[Sample]:
    """About one document in a thousand, chosen by its hash. With `first`, also the first short document."""
    chosen = set(np.flatnonzero(np.array(hashes, np.uint64) % np.uint64(_SAMPLE_ONE_IN) == 0).tolist())
    if first:
        short = (at for at, text in enumerate(texts) if len(text) <= _FIRST_CHARACTERS)
        chosen.update(itertools.islice(short, 1))
    for at in chosen:
        if len(texts[at]) <= _SAMPLE_CHARACTERS:
            yield Sample(texts[at], ids[offsets[at] : offsets[at + 1]].tolist())


def piece_path(folder: Path, key: str, encoder: str) -> Path:
    """Path of the file of piece `key` made by `encoder`."""
    return folder / f"{key}.{encoder}.piece"


@dataclass(frozen=True)
class FinishedPiece:
    """Contents of a piece file; the arrays are views of it."""

    tokens: npt.NDArray
    lengths: npt.NDArray[np.int32]
    hashes: npt.NDArray[np.uint64]
    footer: dict[str, Any]


def read_piece_file(path: Path, dtype: np.dtype, check: bool) -> FinishedPiece | None:
    """Read a piece file; returns None if it is missing or incomplete.

    Args:
        check: also compare the checksum; needed for the file of an interrupted build.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (FileNotFoundError, ValueError):
        return None
    try:
        size, magic = _TAIL.unpack(data[-_TAIL.size :].tobytes())
        if magic != _MAGIC:
            return None
        payload = data[: len(data) - _TAIL.size - size]
        footer = json.loads(data[len(payload) : len(data) - _TAIL.size].tobytes())
        documents, tokens = footer["documents"], footer["tokens"]
        expected = tokens * dtype.itemsize + documents * 12
    except (struct.error, ValueError, KeyError, TypeError):
        return None
    if len(payload) != expected or (check and xxhash.xxh3_64_hexdigest(payload.data) != footer["checksum"]):
        return None
    split = tokens * dtype.itemsize
    return FinishedPiece(
        tokens=np.frombuffer(payload, dtype, tokens),
        lengths=np.frombuffer(payload, np.int32, documents, split),
        hashes=np.frombuffer(payload, np.uint64, documents, split + 4 * documents),
        footer=footer,
    )
