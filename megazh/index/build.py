"""Build an index from text: hand pieces to workers, check their work, and put it together in order."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megazh.corpus.pieces import Piece, ReadOptions, TextDocuments, cut, piece_size, piece_sources
from megazh.corpus.sources import Format, Source, find_sources
from megazh.errors import DataError, UsageError, WorkerError
from megazh.files import known_sha256, locked, sha256_file, write_atomic
from megazh.index.metadata import FORMAT_VERSION, Metadata, Options, Rejected, SourceInfo, TokenizerInfo, read_metadata
from megazh.index.piece import FinishedPiece, Result, Sample, Setup, Task, piece_path, read_piece_file
from megazh.index.pools import Pool
from megazh.index.writer import IndexWriter
from megazh.progress import Progress, duration
from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.tokenizer.encoders import Encoder, EncoderSource, encode_each
from megazh.tokenizer.tokenizer import dtype_for

_EARLY_RECORDS = 1000
_PLAN = "plan.json"
_CUT_VERSION = 1  # another one cuts the input otherwise: pieces of an older version cannot be used
_OWN_SUFFIXES = (".bin", ".idx", ".docs", ".json")


@dataclass(frozen=True)
class Request:
    """What to index, how, and where to."""

    inputs: Sequence[str]
    output: Path
    """The prefix: OUTPUT.bin, OUTPUT.idx and so on."""
    tokenizer: Path
    eod: str | None = None
    front_tokens: bool = False
    format: Format | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    max_bad: float = 0.001
    """The largest share of records that may be rejected."""
    restart: bool = False
    """Throw away the finished pieces of an interrupted build, and replace an index that is complete."""

    @property
    def folder(self) -> Path:
        """Where the unfinished build lies."""
        return Path(f"{self.output}.build")


@dataclass
class Summary:
    """What a build did, for the person at the terminal; `metadata` says what is in the index."""

    metadata: Metadata
    seconds: float
    encoder: str = ""
    pieces: int = 0
    pieces_kept: int = 0
    """Taken over from an interrupted run."""
    samples_checked: int = 0
    already_complete: bool = False


def build_index(request: Request, pool: Pool, say: Callable[[str], None]) -> Summary:
    """Build the index of `request`.

    Args:
        pool: who encodes.
        say: gets notices and warnings, one line each.

    Raises:
        UsageError: the request cannot work, or does not fit the interrupted build or the index that is there.
        DataError: an input is damaged, or too much of it is bad.
        BusyError: another process builds the same prefix.
        WorkerError: a worker died, or the disk is full; finished pieces are kept.
    """
    tokenizer, sources = check_request(request)
    folder = request.folder
    try:
        with locked(folder / "lock", busy=f"{request.output}: another process builds this index"):
            try:
                return _Build(request, tokenizer, sources, pool, say).run()
            finally:
                if not (folder / _PLAN).exists():
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise WorkerError(
                f"{error.filename or folder}: {os.strerror(error.errno)}; finished pieces are kept in {folder}: "
                "make room and run the command again"
            ) from None
        raise


def check_request(request: Request) -> tuple[Tokenizer, list[Source]]:
    """What can be known to be wrong before any work is done; returns the tokenizer and the sources.

    Raises:
        UsageError, DataError: as `build_index`.
    """
    output = request.output
    if output.suffix in _OWN_SUFFIXES:
        raise UsageError(f"--output {output}: give the prefix without {output.suffix}")
    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder; give a prefix, such as {output}/NAME")
    tokenizer = load_tokenizer(request.tokenizer, request.eod, request.front_tokens)
    sources = find_sources(request.inputs, request.format)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output}: its folder cannot be made: {error.strerror}") from None
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"--output {output}: its folder cannot be written to")
    return tokenizer, sources


class _EncoderDiffers(Exception):
    """The fast encoder gave other ids than the reference."""


class _Build:
    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        sources: Sequence[Source],
        pool: Pool,
        say: Callable[[str], None],
    ) -> None:
        self._request, self._tokenizer, self._sources = request, tokenizer, sources
        self._pool, self._say = pool, say
        self._folder = request.folder
        self._begin = time.monotonic()

    def run(self) -> Summary:
        request = self._request
        self._signatures = [_signature(source) for source in self._sources]
        self._hashes = self._hash_sources()
        dtype = dtype_for(self._tokenizer.vocab_size)
        identity = self._identity(dtype)
        complete = self._complete(identity)
        if complete is not None:
            return Summary(complete, time.monotonic() - self._begin, already_complete=True)
        self._prepare_folder(identity)
        suffix = f".tokenizer{self._tokenizer.path.suffix}"
        copied = self._folder / f"tokenizer{self._tokenizer.path.suffix}"
        write_atomic(copied, self._tokenizer.path.read_bytes())
        source = self._tokenizer.encoders
        self._setup = Setup(
            options=request.read,
            encoders=EncoderSource(source.kind, copied, source.shift),
            eod_id=self._tokenizer.eod_id,
            vocab_size=self._tokenizer.vocab_size,
            dtype=dtype.name,
            folder=self._folder,
        )
        summary = self._encode(dtype)
        self._check_unchanged()
        self._check_bad(final=True)
        metadata = self._finish(identity, suffix, copied)
        summary.metadata, summary.seconds = metadata, time.monotonic() - self._begin
        self._log(summary)
        done = self._folder.with_name(f"{self._folder.name}.done")
        os.rename(self._folder, done)  # ranks that still note in it that they live find it gone
        shutil.rmtree(done, ignore_errors=True)
        return summary

    def _hash_sources(self) -> list[str]:
        total = sum(source.size for source in self._sources)
        with Progress("hashing the input", total) as progress, ThreadPoolExecutor(_cpus()) as threads:
            paths = [source.path for source in self._sources]
            return list(threads.map(lambda path: known_sha256(path, progress.advance), paths))

    def _identity(self, dtype: np.dtype) -> dict[str, Any]:
        """Everything that decides the bytes of the index."""
        request, tokenizer = self._request, self._tokenizer
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer": TokenizerInfo(
                kind=tokenizer.kind.value,
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eod=tokenizer.eod,
                eod_id=tokenizer.eod_id,
                pad_id=tokenizer.pad_id,
                front_tokens=tokenizer.front_tokens,
                file=f".tokenizer{tokenizer.path.suffix}",
                sha256=sha256_file(tokenizer.path),
            ).model_dump(),
            "dtype": dtype.name,
            "options": Options(
                format=request.format.value if request.format else None,
                text_key=request.read.text_key,
                text_documents=request.read.text_documents.value,
                max_document_bytes=request.read.max_document_bytes,
            ).model_dump(),
            "sources": [
                SourceInfo(name=source.name, bytes=source.size, sha256=digest).model_dump()
                for source, digest in zip(self._sources, self._hashes, strict=True)
            ],
        }

    def _complete(self, identity: dict[str, Any]) -> Metadata | None:
        """The index that is already there, if it is the one asked for."""
        output = self._request.output
        if self._request.restart or not Path(f"{output}.idx").exists():
            return None
        metadata = read_metadata(output)
        if metadata is None:
            raise UsageError(f"{output}.idx: an index that megazh did not build is in the way; choose another --output")
        difference = _difference(metadata.model_dump(), identity)
        if difference:
            raise UsageError(
                f"{output}: an index with {difference} is there; --restart replaces it (it stays until the new one is "
                "complete), or choose another --output"
            )
        return metadata

    def _prepare_folder(self, identity: dict[str, Any]) -> None:
        plan_path = self._folder / _PLAN
        if self._request.restart:
            plan_path.unlink(missing_ok=True)
            for piece in self._folder.glob("*.piece"):
                piece.unlink()
        plan: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            plan = json.loads(plan_path.read_bytes())
        if plan.get("cut_version") != _CUT_VERSION:
            for piece in self._folder.glob("*.piece"):
                piece.unlink()
            plan = {"cut_version": _CUT_VERSION, **identity}
            write_atomic(plan_path, json.dumps(plan, ensure_ascii=False, indent=1).encode())
            return
        difference = _difference(plan, identity)
        if difference:
            raise UsageError(f"{self._folder}: an interrupted build with {difference} is there; --restart discards it")

    def _encode(self, dtype: np.dtype) -> Summary:
        fast, encoder = self._choose_encoder()
        while True:
            self._start_assembly(dtype)
            try:
                return self._encode_all(fast, encoder, dtype)
            except _EncoderDiffers as error:
                self._say(f"warning: {error}; encoding everything anew with {self._reference.name}")
                for piece in self._folder.glob("*.piece"):
                    piece.unlink()
                fast, encoder = False, self._reference.name

    def _choose_encoder(self) -> tuple[bool, str]:
        trial = next(self._pool.run(self._setup, iter([Task(None, (), fast=True)])))
        self._reference: Encoder = self._tokenizer.encoders.reference()
        name = self._reference.name
        if trial.failure is not None:
            self._say(f"warning: the fast encoder cannot be used ({trial.failure}); using {name}, which is slower")
        elif trial.encoder:
            try:
                self._check_samples(trial)
            except _EncoderDiffers as error:
                self._say(f"warning: {error}; using {name}, which is slower")
                for path in self._folder.glob("*.piece"):
                    path.unlink()
                return False, name
            return True, trial.encoder
        return False, name

    def _check_samples(self, result: Result) -> None:
        samples: list[Sample] = result.samples
        for sample, ids in zip(samples, encode_each(self._reference, [s.text for s in samples]), strict=True):
            if sample.ids != ids:
                raise _EncoderDiffers(f"{result.encoder} differs from {self._reference.name} on {sample.text[:40]!r}")

    def _start_assembly(self, dtype: np.dtype) -> None:
        self._writer = IndexWriter(self._folder, dtype)
        self._order: deque[Piece] = deque()
        self._line_of: dict[int, int] = {}
        self._records = self._bad = self._empty = self._text_bytes = 0
        self._reasons: dict[str, int] = {}
        self._rejects = open(self._folder / "rejected.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def _encode_all(self, fast: bool, encoder: str, dtype: np.dtype) -> Summary:
        done: dict[str, FinishedPiece | None] = {}
        summary = Summary(None, 0.0, encoder=encoder)  # type: ignore[arg-type]  # filled in by `run`
        total = sum(source.size for source in self._sources)

        def tasks() -> Iterator[Task]:
            for piece in cut(self._sources, self._request.read, piece_size(self._sources)):
                self._order.append(dataclasses.replace(piece, data=None))
                summary.pieces += 1
                kept = read_piece_file(piece_path(self._folder, piece.key), dtype, check=True)
                if kept is not None:
                    done[piece.key] = kept
                    summary.pieces_kept += 1
                    progress.advance(piece.weight)
                    continue
                yield Task(piece, piece_sources(self._sources, piece, self._request.read), fast)

        with self._rejects, Progress("indexing", total) as progress:
            try:
                for result in self._pool.run(self._setup, tasks()):
                    self._check_samples(result)
                    summary.samples_checked += len(result.samples)
                    progress.advance(result.weight, result.tokens)
                    done[result.key] = None
                    self._assemble(done, dtype)
                self._assemble(done, dtype)
            except BaseException:
                self._writer.abandon()
                raise
        assert not self._order, "every piece is done or an error was raised"
        return summary

    def _assemble(self, done: dict[str, FinishedPiece | None], dtype: np.dtype) -> None:
        """Put the pieces that are next in order behind those before them."""
        while self._order and self._order[0].key in done:
            piece = self._order.popleft()
            path = piece_path(self._folder, piece.key)
            finished = done.pop(piece.key) or read_piece_file(path, dtype, check=False)
            if finished is None:
                raise WorkerError(f"{path}: the file of a finished piece is gone or damaged; run the command again")
            self._writer.append(finished.tokens, finished.lengths, finished.hashes)
            footer = finished.footer
            self._note_rejected(piece, footer)
            self._records += footer["documents"] + footer["empty"] + len(footer["rejected"])
            self._empty += footer["empty"]
            self._text_bytes += footer["text_bytes"]
            self._check_bad(final=False)

    def _note_rejected(self, piece: Piece, footer: dict[str, Any]) -> None:
        before = self._line_of.get(piece.source, 0)
        self._line_of[piece.source] = before + footer["lines"]
        whole_files = (
            self._sources[piece.source].format is Format.TEXT
            and self._request.read.text_documents is TextDocuments.FILE
        )
        for line, reason, detail in footer["rejected"]:
            file = self._sources[piece.start + line - 1] if whole_files else self._sources[piece.source]
            entry = {"file": file.name, "line": 1 if whole_files else before + line, "reason": reason, "detail": detail}
            self._rejects.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._bad += 1
            self._reasons[reason] = self._reasons.get(reason, 0) + 1

    def _check_bad(self, final: bool) -> None:
        """Too many bad records end the build: at the end, or as soon as most of the first ones are bad."""
        if final:
            too_many = self._bad > self._request.max_bad * self._records
        else:
            limit = max(0.5, self._request.max_bad)
            too_many = self._records >= _EARLY_RECORDS and self._bad > limit * self._records
        if not too_many:
            return
        if not self._rejects.closed:
            self._rejects.flush()
        with open(self._folder / "rejected.jsonl", encoding="utf-8") as file:
            first = json.loads(file.readline())
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self._reasons.items()))
        raise DataError(
            f"{self._bad} of {self._records} records are bad ({self._bad / self._records:.3%}, more than --max-bad "
            f"{self._request.max_bad:.3%}): {reasons}; first: {first['file']} line {first['line']}: {first['detail']}; "
            f"all in {self._folder / 'rejected.jsonl'}"
        )

    def _check_unchanged(self) -> None:
        for source, before in zip(self._sources, self._signatures, strict=True):
            if _signature(source) != before:
                self._writer.abandon()
                raise DataError(f"{source.path}: changed while it was read; run again with --restart")

    def _finish(self, identity: dict[str, Any], suffix: str, tokenizer_copy: Path) -> Metadata:
        files = self._writer.finish()
        metadata = Metadata(
            tokenizer=TokenizerInfo(**identity["tokenizer"]),
            dtype=identity["dtype"],
            documents=self._writer.documents,
            tokens=self._writer.tokens,
            text_bytes=self._text_bytes,
            empty_documents=self._empty,
            rejected=Rejected(total=self._bad, reasons=dict(sorted(self._reasons.items()))),
            token_length_histogram={str(edge): self._writer.histogram[edge] for edge in sorted(self._writer.histogram)},
            options=Options(**identity["options"]),
            sources=[SourceInfo(**source) for source in identity["sources"]],
            files=files,
        )
        write_atomic(self._folder / "index.json", metadata.to_bytes())
        beside = {".json": self._folder / "index.json", suffix: tokenizer_copy}
        rejected = Path(f"{self._request.output}.rejected.jsonl")
        if self._bad:
            beside[".rejected.jsonl"] = self._folder / "rejected.jsonl"
        else:
            rejected.unlink(missing_ok=True)
        self._writer.commit(self._request.output, files, beside)
        return metadata

    def _log(self, summary: Summary) -> None:
        """What is not the same for the same input: times, host, workers."""
        size = sum(source.size for source in self._sources)
        with open(f"{self._request.output}.log", "a", encoding="utf-8") as file:
            file.write(
                f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {socket.gethostname()}: built with {self._pool.workers} "
                f"workers and {summary.encoder} in {duration(summary.seconds)}: {size} bytes of input, "
                f"{summary.metadata.tokens} tokens, {summary.pieces} pieces ({summary.pieces_kept} kept from before), "
                f"{summary.samples_checked} documents checked against {self._reference.name}\n"
            )


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _signature(source: Source) -> tuple[int, int, int]:
    try:
        status = source.path.stat()
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read: {error.strerror}") from None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In words, how the build that is there differs from the one asked for; empty where it does not."""
    if old.get("format_version") != new["format_version"]:
        return "another format version"
    if old["tokenizer"] != new["tokenizer"]:
        names = [key for key in new["tokenizer"] if old["tokenizer"].get(key) != new["tokenizer"][key]]
        return f"another tokenizer ({', '.join(names)})"
    for key, value in new["options"].items():
        if old["options"].get(key) != value:
            return f"another option: {key} was {old['options'].get(key)!r}, is {value!r}"
    before = {source["name"]: source for source in old["sources"]}
    now = {source["name"]: source for source in new["sources"]}
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            return f"another input: {name} was there, is not now"
        if name not in before:
            return f"another input: {name} was not there, is now"
        if before[name] != now[name]:
            return f"another input: {name} has changed"
    return "" if old["dtype"] == new["dtype"] else "another dtype"
