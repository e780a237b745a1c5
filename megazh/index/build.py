"""Build an index from text: hand pieces to workers, check samples of their ids, and join the pieces in order."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megazh.config import from_mapping
from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions
from megazh.corpus.pieces import cut, piece_size, piece_sources
from megazh.corpus.sources import Listing, Source, list_inputs
from megazh.errors import DataError, MegazhError, UsageError, WriteError
from megazh.files import locked, write_atomic
from megazh.index.assemble import Assembly
from megazh.index.metadata import CORE_SUFFIXES, INDEX_SUFFIXES, Metadata, Rejected, read_metadata
from megazh.index.parts import Part, sources_of
from megazh.index.piece import Result, Setup, Task, piece_path, read_piece_file, remove_unfinished_pieces
from megazh.index.plan import CUT_VERSION, PLAN, Plan, difference, make_plan, signature
from megazh.index.pools import Pool
from megazh.index.reader import IndexedDataset
from megazh.progress import Progress, duration
from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.tokenizer.encoders import PROBES, Encoder, encode_each
from megazh.tokenizer.round_trip import RoundTrip
from megazh.tokenizer.tokenizer import RankKind, TokenizerFile
from megazh.writing import check_writable, warn_once, writing

_DISTRUST = "fast-encoder-differs"  # empty file in the build folder, present once the fast encoder was found wrong


@dataclass(frozen=True)
class Request:
    """What to index, with which options, and where to write it."""

    inputs: Sequence[str]
    """Files, folders or globs."""
    output: Path
    """Prefix of the index: the files are OUTPUT.bin, OUTPUT.idx and so on."""
    tokenizer: Path
    eod: str | None = None
    front_tokens: bool = False
    format: Format | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    max_bad: float = 0.001
    """Largest share of records that may be rejected."""
    max_lost: float = 0.01
    """Largest share of characters that no token may stand for."""
    ranks: RankKind | None = None
    """What a rank file that is not Qwen's own belongs to."""
    restart: bool = False
    """Whether to discard the finished pieces of an interrupted build and to replace a complete index."""
    listing: Listing | None = None
    """The files of the inputs, if they were listed already."""
    part: Part | None = None
    """The part of the files to index; `output` is the prefix of its index."""

    @property
    def folder(self) -> Path:
        """Folder of the unfinished build."""
        return Path(f"{self.output}.build")


@dataclass
class Summary:
    """Result of a build, for the person at the terminal; `metadata` describes the index."""

    metadata: Metadata
    seconds: float
    encoder: str = ""
    pieces: int = 0
    pieces_kept: int = 0
    """Number of pieces that an interrupted build had finished."""
    samples_checked: int = 0
    """Number of documents whose ids were compared with those of the reference encoder."""
    round_trip: RoundTrip = field(default_factory=RoundTrip)
    """How the sampled documents compare with the text that their ids decode to."""
    lost_example: str = ""
    """Beginning of a document with a character that no token stands for, and what became of it."""
    already_complete: bool = False
    workers: int = 1


def build_index(request: Request, pool: Pool, say: Callable[[str], None]) -> Summary:
    """Build the index of `request`.

    Args:
        pool: the workers that encode.
        say: called with each notice or warning, one line.

    Raises:
        UsageError: the request cannot work, or does not match an interrupted build or an index at the same prefix.
        DataError: an input is damaged, or too many records are bad.
        BusyError: another process is building the same prefix.
        WorkerError: a worker died; finished pieces are kept.
        WriteError: the disk is full or gone; finished pieces are kept.
    """
    tokenizer, listing = check_request(request)
    if request.listing is None:
        for line in listing.notes():
            say(line)
    folder = request.folder
    with locked(folder / "lock", busy=f"{request.output}: another process builds this index"):
        try:
            return _Build(request, tokenizer, listing, pool, say).run()
        except WriteError as error:
            kept = f" (finished pieces are kept in {folder})" if any(folder.glob("*.piece")) else ""
            raise WriteError(f"{error}{kept}") from error
        finally:
            if not ((folder / PLAN).exists() and any(folder.glob("*.piece"))):
                shutil.rmtree(folder, ignore_errors=True)


def check_request(request: Request) -> tuple[Tokenizer, Listing]:
    """Check what can be checked before any work is done; returns the tokenizer and the files of the inputs.

    Raises:
        UsageError, DataError: as in `build_index`.
    """
    output = request.output
    if output.suffix in CORE_SUFFIXES:
        raise UsageError(f"--output {output}: give the prefix without {output.suffix}")
    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder; give a prefix, such as {output}/NAME")
    tokenizer = load_tokenizer(request.tokenizer, request.eod, request.front_tokens, request.ranks)
    tokenizer.check()
    listing = request.listing or list_inputs(request.inputs, request.format, request.read)
    listing.sources = _without_own_files(listing.sources, output)
    if request.part is not None:
        listing.sources = sources_of(request.part, listing.sources)
    check_writable(output.parent, "choose another --output", f"--output {output}")
    with writing(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
    return tokenizer, listing


def _without_own_files(sources: list[Source], output: Path) -> list[Source]:
    """The sources without the files that an earlier build of this index wrote among its own input."""
    prefix = os.path.abspath(output)
    own = {f"{prefix}{suffix}" for suffix in INDEX_SUFFIXES}
    folders = (f"{prefix}.build/", f"{prefix}.build.done/")
    kept = [source for source in sources if not str(source.path).startswith(folders)]
    if Path(f"{prefix}.idx").exists():
        kept = [source for source in kept if str(source.path) not in own]
    overwritten = next((source.path for source in kept if str(source.path) in own), None)
    if overwritten is not None:
        raise UsageError(f"--output {output}: would overwrite the input {overwritten}; choose another prefix")
    if not kept:
        raise UsageError("no input but the files of the index itself")
    return kept


class _EncoderDiffers(Exception):
    """The fast encoder failed, or gave other ids than the reference encoder."""


@dataclass
class _Run:
    """Counts of a run over all pieces; see `Summary`."""

    encoder: str
    pieces: int = 0
    pieces_kept: int = 0
    samples_checked: int = 0
    round_trip: RoundTrip = field(default_factory=RoundTrip)


class _Build:
    """One build, with its folder locked."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        listing: Listing,
        pool: Pool,
        notify: Callable[[str], None],
    ) -> None:
        self._request, self._tokenizer = request, tokenizer
        self._sources, self._left_out = listing.sources, listing.left_out
        self._pool, self._notify = pool, notify
        self._folder = request.folder
        self._begin = time.monotonic()
        self._reference: Encoder

    def run(self) -> Summary:
        signatures = [signature(source) for source in self._sources]
        plan = make_plan(self._tokenizer, self._sources, self._request.format, self._request.read)
        complete = self._complete(plan)
        if complete is not None:
            self._remove_folder()
            return Summary(complete, time.monotonic() - self._begin, already_complete=True)
        self._pool.begin(self._sources)
        self._prepare_folder(plan)
        copy = self._folder / f"tokenizer{self._tokenizer.path.suffix}"
        write_atomic(copy, self._tokenizer.path.read_bytes(), durable=False)  # flushed to disk at the end
        for notice in self._tokenizer.notices:
            self._notify(notice)
        self._setup = self._make_setup(copy, plan.dtype)
        assembly, run = self._encode(np.dtype(plan.dtype))
        for each, before in zip(self._sources, signatures, strict=True):
            if signature(each) != before:
                assembly.abandon()
                raise DataError(f"{each.path}: changed while it was read; run again with --restart")
        metadata = self._finish(assembly, plan, copy)
        summary = Summary(
            metadata,
            time.monotonic() - self._begin,
            run.encoder,
            run.pieces,
            run.pieces_kept,
            run.samples_checked,
            run.round_trip,
            assembly.lost_example,
            workers=self._pool.workers,
        )
        self._warn(summary)
        self._append_log(summary)
        self._remove_folder()
        return summary

    def _make_setup(self, copy: Path, dtype: str) -> Setup:
        """What workers need; `copy` is the copy of the tokenizer in the folder of the build."""
        tokenizer = self._tokenizer
        file = TokenizerFile(copy, tokenizer.eod, tokenizer.front_tokens, tokenizer.kind)
        return Setup(
            options=self._request.read,
            encoders=dataclasses.replace(tokenizer.encoders, path=copy),
            eod_id=tokenizer.eod_id,
            vocab_size=tokenizer.vocab_size,
            dtype=dtype,
            counted=None if tokenizer.keeps_bytes else file,
            control_ids=tokenizer.control_ids,
            probes=(*PROBES, *tokenizer.probes()),
            folder=self._folder,
        )

    def _warn(self, summary: Summary) -> None:
        """Say what the text lost."""
        found = summary.metadata.coverage
        if found is not None and found.lost_characters:
            self._notify(
                f"warning: no token stands for {found.lost_characters:,} of {found.characters:,} characters "
                f"({found.share:.3%}; {found.unknown_tokens:,} unknown tokens): {summary.lost_example}"
            )
        if summary.round_trip.differ:
            self._notify(f"warning: {summary.round_trip.describe()}")

    def _complete(self, plan: Plan) -> Metadata | None:
        """Metadata of an existing index, if it is the requested one."""
        output = self._request.output
        if self._request.restart or not Path(f"{output}.idx").exists():
            return None
        metadata = read_metadata(output)
        if metadata is None:
            raise UsageError(
                f"{output}.idx: an index that megazh did not build is in the way; choose another --output, or make it "
                f"usable with 'megazh index adopt {output} --tokenizer TOK'"
            )
        different = difference(metadata, plan)
        if different:
            before = self._interrupted()
            if before is not None and not difference(before, plan):
                return None  # an interrupted build of the same plan was about to replace the index
            raise UsageError(
                f"{output}: an index with {different} is there; --restart replaces it (it stays until the new one is "
                "complete), or choose another --output"
            )
        try:
            IndexedDataset(output).document_hashes()
        except MegazhError as error:
            raise type(error)(f"{error}; --restart builds the index again") from None
        return metadata

    def _interrupted(self) -> Plan | None:
        """The plan of an interrupted build in the folder, if it has finished at least one piece."""
        path = self._folder / PLAN
        with contextlib.suppress(FileNotFoundError, ValueError, UsageError):
            plan = from_mapping(json.loads(path.read_bytes()), Plan, str(path))
            if plan.cut_version == CUT_VERSION and any(self._folder.glob("*.piece")):
                return plan
        return None

    def _prepare_folder(self, plan: Plan) -> None:
        """Keep the pieces of an interrupted build only if its plan is the same. Raises UsageError if it is another."""
        path = self._folder / PLAN
        before = None if self._request.restart else self._interrupted()
        if before is None:
            path.unlink(missing_ok=True)
            (self._folder / _DISTRUST).unlink(missing_ok=True)
            self._discard_pieces()
            remove_unfinished_pieces(self._folder)
            write_atomic(path, plan.model_dump_json(indent=1).encode(), durable=False)
            return
        different = difference(before, plan)
        remove_unfinished_pieces(self._folder)
        if different:
            raise UsageError(f"{self._folder}: an interrupted build with {different} is there; --restart discards it")

    def _discard_pieces(self) -> None:
        for piece in self._folder.glob("*.piece"):
            piece.unlink()

    def _distrust_fast_encoder(self) -> None:
        """Discard what the fast encoder made; a resumed build does not use it either."""
        (self._folder / _DISTRUST).touch()
        self._discard_pieces()

    def _encode(self, dtype: np.dtype) -> tuple[Assembly, _Run]:
        fast, encoder = self._choose_encoder()
        while True:
            assembly = Assembly(
                self._folder,
                dtype,
                self._sources,
                self._request.read,
                self._request.max_bad,
                self._request.max_lost,
                self._tokenizer.eod_id,
            )
            try:
                return assembly, self._encode_all(assembly, fast, encoder, dtype)
            except _EncoderDiffers as error:
                assembly.abandon()
                encoder = self._reference.name
                self._notify(f"warning: {error}; encoding everything again with {encoder}, which is slower")
                self._distrust_fast_encoder()
                fast = False
            except BaseException:
                assembly.abandon()
                raise

    def _choose_encoder(self) -> tuple[bool, str]:
        """Whether the fast encoder can be used, and the name of the encoder that is used."""
        self._reference = self._setup.encoders.reference()
        name = self._reference.name
        if (self._folder / _DISTRUST).exists():
            return False, name
        trial = next(self._pool.run(self._setup, iter([Task(None, (), fast=True)])))
        if trial.failure is not None:
            self._notify(f"warning: the fast encoder cannot be used ({trial.failure}); using {name}, which is slower")
            return False, name
        if not trial.encoder:
            return False, name
        try:
            self._check_samples(trial)
        except _EncoderDiffers as error:
            self._notify(f"warning: {error}; using {name}, which is slower")
            self._distrust_fast_encoder()
            return False, name
        return True, trial.encoder

    def _check_samples(self, result: Result) -> None:
        """Raises _EncoderDiffers if the fast encoder failed or a sample's ids differ from the reference."""
        if result.failure is not None:
            raise _EncoderDiffers(result.failure)
        expected = encode_each(self._reference, [sample.text for sample in result.samples])
        for sample, ids in zip(result.samples, expected, strict=True):
            if sample.ids != ids:
                raise _EncoderDiffers(f"{result.encoder} differs from {self._reference.name} on {sample.text[:40]!r}")

    def _encode_all(self, assembly: Assembly, fast: bool, encoder: str, dtype: np.dtype) -> _Run:
        run = _Run(encoder)

        def tasks() -> Iterator[Task]:
            for piece in cut(self._sources, self._request.read, piece_size(self._sources)):
                assembly.expect(dataclasses.replace(piece, data=None))
                run.pieces += 1
                for name in dict.fromkeys((encoder, self._reference.name)):
                    kept = read_piece_file(piece_path(self._folder, piece.key, name), dtype, check=True)
                    if kept is not None:
                        run.pieces_kept += 1
                        progress.advance(piece.weight)
                        assembly.add(piece.key, name, kept)
                        break
                else:
                    yield Task(piece, piece_sources(self._sources, piece, self._request.read), fast)

        with Progress("indexing", sum(source.size for source in self._sources)) as progress:
            for result in self._pool.run(self._setup, tasks()):
                if result.failure is not None or result.encoder != self._reference.name:
                    self._check_samples(result)
                    run.samples_checked += len(result.samples)
                for sample in result.samples:
                    run.round_trip.add(sample.text, sample.ids, self._tokenizer)
                progress.advance(result.weight, result.tokens)
                assembly.add(result.key, result.encoder)
        return run

    def _finish(self, assembly: Assembly, plan: Plan, tokenizer_copy: Path) -> Metadata:
        files = assembly.finish()
        writer = assembly.writer
        metadata = Metadata(
            tokenizer=plan.tokenizer,
            dtype=plan.dtype,
            documents=writer.documents,
            tokens=writer.tokens,
            text_bytes=assembly.text_bytes,
            coverage=assembly.coverage,
            empty_documents=assembly.empty,
            rejected=Rejected(total=assembly.rejected, reasons=dict(sorted(assembly.reasons.items()))),
            token_length_histogram={str(edge): writer.histogram[edge] for edge in sorted(writer.histogram)},
            options=plan.options,
            sources=plan.sources,
            files=files,
        )
        write_atomic(self._folder / "index.json", metadata.to_bytes(), durable=False)
        beside = {".json": self._folder / "index.json", plan.tokenizer.file: tokenizer_copy}
        if assembly.rejected:
            beside[".rejected.jsonl"] = assembly.rejected_path
        writer.commit(self._request.output, files, beside, absent=[] if assembly.rejected else [".rejected.jsonl"])
        return metadata

    def _append_log(self, summary: Summary) -> None:
        """Append to OUTPUT.log what varies between builds of the same input: time, host, workers, files left out."""
        size = sum(source.size for source in self._sources)
        left_out = f"; left out: {self._left_out.describe(None)}" if self._left_out else ""
        line = (
            f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {socket.gethostname()}: built with {self._pool.workers} "
            f"workers and {summary.encoder} in {duration(summary.seconds)}: {size} bytes of input, "
            f"{summary.metadata.tokens} tokens, {summary.pieces} pieces ({summary.pieces_kept} kept from before), "
            f"{summary.samples_checked} documents checked against {self._reference.name}{left_out}\n"
        )
        path = f"{self._request.output}.log"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            warn_once(path, error, "the index is complete, and only this line of its history is lost")

    def _remove_folder(self) -> None:
        """Delete the folder of the build, renamed first: MPI ranks may still touch their heartbeat files in it."""
        done = self._folder.with_name(f"{self._folder.name}.done")
        shutil.rmtree(done, ignore_errors=True)
        os.rename(self._folder, done)
        shutil.rmtree(done, ignore_errors=True)
