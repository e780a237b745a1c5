"""Take over an index that another tool wrote: check it against a tokenizer, and describe it as a build would."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megazh.errors import DataError, UsageError
from megazh.files import locked, remember_sha256, sha256_file, write_atomic
from megazh.index.merge import temporary_folder
from megazh.index.metadata import (
    CORE_SUFFIXES,
    FileInfo,
    Files,
    Metadata,
    Options,
    Rejected,
    SourceInfo,
    length_histogram,
    metadata_path,
)
from megazh.index.plan import tokenizer_info
from megazh.index.reader import IndexedDataset
from megazh.progress import Progress
from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.tokenizer.tokenizer import RankKind

_DOCUMENTS = 1 << 12  # documents per step


def adopt_index(
    prefix: str, tokenizer: Path, eod: str | None = None, front_tokens: bool = False, ranks: RankKind | None = None
) -> Metadata:
    """Write `PREFIX.json`, `PREFIX.docs` and a copy of the tokenizer beside `PREFIX.bin` and `PREFIX.idx`.

    The two files are only read. They must be what a build could have written, except that a document may have several
    sequences: all ids in the vocabulary, and the end-of-document id at the end of each document and nowhere else.
    Content hashes and the size of the text are those of the decoded documents; they equal those of a build if the
    tokenizer changes no text.

    Args:
        prefix: path of the index without suffix.
        tokenizer: the tokenizer that made the ids; `eod`, `front_tokens` and `ranks` are as for `load_tokenizer`.

    Raises:
        UsageError: there is no such index, megazh described it already, or a file is in the way.
        DataError: a file is damaged, or does not fit the tokenizer; the message says where.
        BusyError: another process writes at this prefix.
    """
    for suffix in CORE_SUFFIXES:
        if prefix.endswith(suffix):
            raise UsageError(f"{prefix}: give the prefix without {suffix}")
    if metadata_path(prefix).exists():
        raise UsageError(
            f"{prefix}: has its description already ({prefix}.json): 'megazh index verify {prefix}' checks it; delete "
            f"{prefix}.json to adopt the index with another tokenizer"
        )
    index = IndexedDataset(prefix)
    if index.sequence_modes is not None:
        raise UsageError(f"{prefix}.idx: a multimodal index (it has a mode for each sequence); only text can be used")
    if not len(index):
        raise DataError(f"{prefix}.idx: holds no documents")
    loaded = load_tokenizer(tokenizer, eod, front_tokens, ranks)
    loaded.check()
    info = tokenizer_info(loaded)
    _check_free(prefix, {info.file: info.sha256})
    folder = Path(f"{prefix}.build")
    with locked(folder / "lock", busy=f"{prefix}: another process builds this index"), temporary_folder(folder):
        before = _signature(prefix)
        digest, hashes, text_bytes = _read(prefix, index, loaded)
        idx = sha256_file(Path(f"{prefix}.idx"))
        if _signature(prefix) != before:
            raise DataError(f"{prefix}.bin: changed while it was read; run the command again when it is complete")
        docs = hashes.astype("<u8").tobytes()
        histogram = length_histogram(np.diff(index.starts))
        metadata = Metadata(
            tokenizer=info,
            dtype=index.dtype.name,
            documents=len(index),
            tokens=len(index.tokens),
            text_bytes=text_bytes,
            empty_documents=0,
            rejected=Rejected(total=0, reasons={}),
            token_length_histogram={str(edge): histogram[edge] for edge in sorted(histogram)},
            options=Options(format="MMIDIDX", text_key="", text_documents="", max_document_bytes=0),
            sources=[SourceInfo(name=f"{Path(prefix).name}.bin", bytes=index.tokens.nbytes, sha256=digest)],
            files=Files(
                bin=FileInfo(bytes=index.tokens.nbytes, sha256=digest),
                idx=FileInfo(bytes=Path(f"{prefix}.idx").stat().st_size, sha256=idx),
                docs=FileInfo(bytes=len(docs), sha256=hashlib.sha256(docs).hexdigest()),
            ),
        )
        _write(prefix, {info.file: loaded.path.read_bytes(), ".docs": docs, ".json": metadata.to_bytes()})
    for suffix, file in metadata.files.by_suffix().items():
        remember_sha256(Path(f"{prefix}{suffix}"), file.sha256)
    return metadata


def _check_free(prefix: str, files: dict[str, str]) -> None:
    """Raises UsageError if a file of another content is where one of these goes, given by suffix and SHA-256."""
    for suffix, digest in files.items():
        path = Path(f"{prefix}{suffix}")
        if path.exists() and sha256_file(path) != digest:
            raise UsageError(f"{path}: is in the way: the copy of the tokenizer goes there; move it elsewhere")


def _signature(prefix: str) -> list[tuple[int, int, int]]:
    statuses = [Path(f"{prefix}{suffix}").stat() for suffix in (".bin", ".idx")]
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in statuses]


def _read(prefix: str, index: IndexedDataset, tokenizer: Tokenizer) -> tuple[str, npt.NDArray[np.uint64], int]:
    """Check all tokens; returns the SHA-256 of the .bin, the documents' content hashes, and the size of the text."""
    digest = hashlib.sha256()
    hashes = np.empty(len(index), np.uint64)
    text_bytes = 0
    with Progress("adopting", index.tokens.nbytes) as progress:
        for at in range(0, len(index), _DOCUMENTS):
            end = min(at + _DOCUMENTS, len(index))
            starts = index.starts[at : end + 1]
            tokens = index.tokens[starts[0] : starts[-1]]
            digest.update(tokens.data)
            _check_ids(prefix, int(starts[0]), tokens, tokenizer)
            _check_ends(prefix, at, starts - starts[0], tokens, tokenizer)
            for number in range(at, end):
                text = tokenizer.decode(index[number][:-1].tolist()).encode("utf-8", "surrogatepass")
                hashes[number] = xxhash.xxh3_64_intdigest(text)
                text_bytes += len(text)
            progress.advance(tokens.nbytes, len(tokens))
    return digest.hexdigest(), hashes, text_bytes


def _check_ids(prefix: str, start: int, tokens: npt.NDArray[Any], tokenizer: Tokenizer) -> None:
    wrong = np.flatnonzero((tokens < 0) | (tokens >= tokenizer.vocab_size))
    if len(wrong):
        raise DataError(
            f"{prefix}.bin: token {start + int(wrong[0]):,} is id {int(tokens[wrong[0]]):,}, but {tokenizer.path} has "
            f"{tokenizer.vocab_size:,} ids: the index was made with another tokenizer; give that one with --tokenizer"
        )


def _check_ends(
    prefix: str, first: int, starts: npt.NDArray[np.int64], tokens: npt.NDArray[Any], tokenizer: Tokenizer
) -> None:
    """Check documents `first` and following: the end-of-document id is at the end of each, and nowhere else."""
    eod = f"the end-of-document token {tokenizer.eod_id} {tokenizer.eod!r} of {tokenizer.path}"
    lengths = np.diff(starts)
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise DataError(f"{prefix}.idx: document {first + int(empty[0]):,} is empty: expected at least {eod}")
    lasts = tokens[starts[1:] - 1]
    wrong = np.flatnonzero(lasts != tokenizer.eod_id)
    if len(wrong):
        found = int(lasts[wrong[0]])
        raise DataError(
            f"{prefix}.bin: document {first + int(wrong[0]):,} ends with {found} {tokenizer.piece(found)!r}, not with "
            f"{eod} ({len(wrong):,} of {len(lasts):,} documents do not); if it is the index's end token, give it with "
            "--eod; an index without end tokens has to be made again with them (Megatron-LM: --append-eod)"
        )
    inside = np.flatnonzero(tokens == tokenizer.eod_id)
    if len(inside) != len(lengths):
        place = int(np.setdiff1d(inside, starts[1:] - 1)[0])
        document = int(np.searchsorted(starts, place, "right")) - 1
        raise DataError(
            f"{prefix}.bin: document {first + document:,} has {eod} also inside, as its token "
            f"{place - starts[document]:,}: its text gave the control token; make the "
            "index again with a tokenizer that encodes it as text"
        )


def _write(prefix: str, files: dict[str, bytes]) -> None:
    """Write files, the last of which makes the others count; after an error, none of them is left."""
    new = [path for suffix in files if not (path := Path(f"{prefix}{suffix}")).exists()]
    try:
        for suffix, data in files.items():
            write_atomic(Path(f"{prefix}{suffix}"), data)
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise
