"""Prepare text for a training run in one call: stories (for the demo), tokenizer, index, manifest."""

import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml
from pydantic import ValidationError

from megazh.config import Config
from megazh.corpus.formats import Format
from megazh.corpus.listing import printable
from megazh.corpus.options import ReadOptions, TextDocuments
from megazh.corpus.pieces import cut, piece_size, piece_sources
from megazh.corpus.reader import read_piece
from megazh.corpus.sources import Listing, Source, list_inputs
from megazh.demo.stories import write_stories
from megazh.errors import DataError, MegazhError, UsageError
from megazh.files import locked, write_atomic
from megazh.index.build import Request, build_index
from megazh.index.manifest import exact, load_manifest
from megazh.index.metadata import INDEX_SUFFIXES
from megazh.index.order import select_side, stream_key
from megazh.index.pools import InlinePool
from megazh.index.reader import IndexedDataset
from megazh.tokenizer.train import train_tokenizer

_STORIES, _TOKENIZER, _CORPUS, _MANIFEST = "stories.jsonl", "tokenizer.json", "corpus", "mixture.yaml"
_PREPARED = "prepared.json"
_OWN_FILES = (_MANIFEST, *(f"{_CORPUS}{suffix}" for suffix in INDEX_SUFFIXES), _TOKENIZER, _STORIES)
_FEW_FILES = 50  # fewer plain text files than this are split at blank lines by default
_LEAST_VALIDATION, _MOST_VALIDATION, _VALIDATION_DOCUMENTS = 0.02, 0.1, 20


class _Input(Config):
    """An input file, with size and modification time for noticing changes."""

    path: str
    size: int
    mtime_ns: int


class _Plan(Config):
    """Everything that decides the prepared files."""

    vocab_size: int
    seed: int
    story_count: int | None
    """Number of stories; None if the text is the user's own."""
    text_key: str
    text_documents: str
    encoding: str | None = None
    inputs: list[_Input]


class _Prepared(Config):
    """The contents of `prepared.json`, written before the first step and again after the last one."""

    plan: _Plan
    complete: bool


def prepare(
    folder: Path,
    vocab_size: int,
    seed: int,
    inputs: Sequence[str] | None,
    text_key: str = "text",
    text_documents: TextDocuments | None = None,
    story_count: int = 20000,
    encoding: str | None = None,
    *,
    say: Callable[[str], None],
) -> Path:
    """Make a tokenizer, an index and a manifest in `folder`; returns the manifest's path, `folder/mixture.yaml`.

    A second call with the same arguments and unchanged files only checks the prepared files. After an interruption it
    continues. Files of an unfinished preparation do not block a call with other arguments: they are deleted.

    Args:
        vocab_size: number of ids of the tokenizer, control tokens included; it gets fewer if the text has too few
            distinct words.
        seed: seed of the stories and of the manifest's random orders.
        inputs: files, folders or globs; None for the project's own stories.
        text_key: key or column of the text; `a.b` is nested.
        text_documents: end of a document in plain text. None means blank lines if all input is plain text in fewer
            than 50 files, otherwise the end of the file.
        story_count: number of stories, if `inputs` is None.
        encoding: encoding of the text, as `megazh.corpus.encodings.normal_encoding` gives it; None for UTF-8.
        say: called with one line per step: its result and its seconds.

    Raises:
        UsageError: an input or a size cannot work, or the folder was prepared from other input.
        DataError: an input is damaged, holds no text, or too few documents for a validation split.
        BusyError: another process is preparing this folder.
        WorkerError: the disk is full; finished work is kept.
    """
    with locked(folder / "prepare.lock", busy=f"{folder}: another process prepares this folder"):
        listing = None if inputs is None else _files_outside(folder, inputs, ReadOptions(text_key, encoding=encoding))
        sources = None if listing is None else listing.sources
        for line in listing.notes() if listing else []:
            say(line)
        if text_documents is None:
            text_documents = _default_text_documents(sources, say)
        plan = _Plan(
            vocab_size=vocab_size,
            seed=seed,
            story_count=story_count if sources is None else None,
            text_key=text_key if sources is not None else "text",
            text_documents=text_documents.value,
            encoding=encoding,
            inputs=[] if sources is None else [_input(source) for source in sources],
        )
        manifest = folder / _MANIFEST
        before = _read_prepared(folder)
        if before is not None and before.complete:
            _check_same(folder, before.plan, plan)
            if all((folder / name).exists() for name in (_TOKENIZER, _MANIFEST, f"{_CORPUS}.idx")):
                _check_prepared(folder)
                say(f"data: prepared already, from the same text: {manifest}")
                return manifest
        elif before is None:
            _check_free(folder)
        elif before.plan != plan:
            _discard(folder)
        _write_prepared(folder, plan, complete=False)
        if listing is None:
            listing = _write_stories(folder, plan, say)
        read = ReadOptions(plan.text_key, text_documents, encoding=encoding)
        _train(folder, listing.sources, read, vocab_size, say)
        _index(folder, listing, read, say)
        _split(folder, seed, say)
        _write_prepared(folder, plan, complete=True)
        return manifest


def _files_outside(folder: Path, inputs: Sequence[str], read: ReadOptions) -> Listing:
    """The input files outside `folder`: files that a run writes there must not become input of the next call."""
    own = folder.resolve()
    for given in inputs:
        if Path(given).resolve().is_relative_to(own):
            raise UsageError(f"--input {given}: lies in {folder}, where the run's own files go; put it elsewhere")
    listing = list_inputs(inputs, read=read, ignored=folder)
    listing.sources = [source for source in listing.sources if not source.path.resolve().is_relative_to(own)]
    if not listing.sources:
        raise UsageError(f"--input {' '.join(inputs)}: only files in {folder}, which belong to the run; give others")
    return listing


def _default_text_documents(sources: Sequence[Source] | None, say: Callable[[str], None]) -> TextDocuments:
    if sources is None or len(sources) >= _FEW_FILES or any(source.format is not Format.TEXT for source in sources):
        return TextDocuments.FILE
    say(
        f"text: {len(sources)} plain file{'s' if len(sources) > 1 else ''}: a document ends at a blank line "
        "(--text-documents file makes each file one document)"
    )
    return TextDocuments.BLANK_LINES


def _input(source: Source) -> _Input:
    status = source.path.stat()
    return _Input(path=printable(str(source.path)), size=status.st_size, mtime_ns=status.st_mtime_ns)


def _read_prepared(folder: Path) -> _Prepared | None:
    try:
        return _Prepared.model_validate_json((folder / _PREPARED).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _write_prepared(folder: Path, plan: _Plan, complete: bool) -> None:
    data = _Prepared(plan=plan, complete=complete).model_dump_json(indent=1) + "\n"
    write_atomic(folder / _PREPARED, data.encode())


def _check_same(folder: Path, before: _Plan, now: _Plan) -> None:
    if before == now:
        return
    remedy = "choose another run name (-r), or give the same again"
    for key in ("story_count", "text_key", "text_documents", "encoding", "vocab_size", "seed"):
        was, found = getattr(before, key), getattr(now, key)
        if key == "story_count" and (was is None) != (found is None):
            was, found = ("own text" if count is None else "stories" for count in (was, found))
            raise UsageError(f"{folder}: was prepared from {was}, this run asks for {found}; {remedy}")
        if was != found:
            raise UsageError(f"{folder}: was prepared with {key} {was}, this run asks for {found}; {remedy}")
    old = {file.path: file for file in before.inputs}
    new = {file.path: file for file in now.inputs}
    path = next(path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path))
    change = "is new" if path not in old else "is no longer given" if path not in new else "has changed since"
    raise UsageError(f"{folder}: was prepared from other input: {path} {change}; {remedy}")


def _check_prepared(folder: Path) -> None:
    load_manifest(folder / _MANIFEST)
    try:
        IndexedDataset(folder / _CORPUS).document_hashes()
    except MegazhError as error:
        raise type(error)(
            f"{error}; choose another run name (-r), or delete {folder / _CORPUS}.idx, which a preparation made, to "
            "index the text again"
        ) from None


def _check_free(folder: Path) -> None:
    """Raises UsageError if there is a file in the way that no preparation wrote."""
    for name in _OWN_FILES:
        if (folder / name).exists():
            raise UsageError(
                f"{folder / name}: is in the way and was not made by a preparation; choose another run name (-r)"
            )


def _discard(folder: Path) -> None:
    """Delete the files of an unfinished preparation with another plan."""
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in (f"{_CORPUS}.build", f"{_CORPUS}.build.done"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _write_stories(folder: Path, plan: _Plan, say: Callable[[str], None]) -> Listing:
    path = folder / _STORIES
    if not path.exists():
        assert plan.story_count is not None
        begin = time.monotonic()
        write_stories(path, plan.story_count, plan.seed)
        size = path.stat().st_size / 1e6
        say(f"stories: {plan.story_count:,}, {size:.1f} MB, in {_seconds(begin)}: {path}")
    return list_inputs([str(path)])


def _train(folder: Path, sources: Sequence[Source], read: ReadOptions, size: int, say: Callable[[str], None]) -> None:
    path = folder / _TOKENIZER
    if path.exists():
        return
    begin = time.monotonic()
    _check_text(sources, read)
    trained = train_tokenizer(sources, read, path, size)
    short = f" (fewer than {size:,}: the text has too few distinct words)" if trained.ids < size else ""
    part = "" if trained.sample.everything else f" from a sample of {trained.sample.text_bytes / 1e6:.1f} MB"
    say(f"tokenizer: {trained.ids:,} ids{short}{part}, in {_seconds(begin)}: {path}")


def _check_text(sources: Sequence[Source], read: ReadOptions) -> None:
    """Raises DataError if no source holds a document, with the first reason."""
    reason = ""
    for piece in cut(sources, read, piece_size(sources)):
        files, lines = piece_sources(sources, piece, read), 0
        for batch in read_piece(files, piece, read):
            if batch.texts:
                return
            if batch.rejected and not reason:
                first = batch.rejected[0]
                file = files[lines + first.line - 1] if len(files) > 1 else files[0]
                reason = f"{file.path}: {first.reason.value}: {first.detail}"
            lines += batch.lines
    if reason:
        raise DataError(
            f"no input holds a document; the first fault: {reason} (--text-key sets the key, --encoding the encoding)"
        )
    raise DataError(f"the input holds no text: {sources[0].path}{' and others' if len(sources) > 1 else ''}")


def _index(folder: Path, listing: Listing, read: ReadOptions, say: Callable[[str], None]) -> None:
    begin = time.monotonic()
    request = Request([], folder / _CORPUS, folder / _TOKENIZER, read=read, listing=listing)
    summary = build_index(request, InlinePool(), say)
    if summary.already_complete:
        return
    data = summary.metadata
    size = data.text_bytes / max(data.tokens - data.documents, 1)
    rejected = f", {data.rejected.total:,} rejected ({folder / _CORPUS}.rejected.jsonl)" if data.rejected.total else ""
    say(
        f"index: {data.documents:,} documents, {data.tokens:,} tokens, {size:.2f} bytes per token{rejected}, "
        f"in {_seconds(begin)}: {folder / _CORPUS}.bin"
    )


def _split(folder: Path, seed: int, say: Callable[[str], None]) -> None:
    """Write the manifest, with a validation fraction and a salt that leave documents on both sides.

    The fraction is for about 20 validation documents, within 2 to 10 %.
    """
    index = IndexedDataset(folder / _CORPUS)
    hashes, lengths = index.document_hashes(), np.diff(index.starts)
    different = len(np.unique(hashes))
    if different < 2:
        raise DataError(
            f"the text has {len(hashes):,} document{'s' if len(hashes) != 1 else ''}, {different} of them distinct: "
            "training and validation need at least 2; give more files, or, for plain text with blank lines "
            "between documents, --text-documents blank-lines"
        )
    fraction = round(max(_LEAST_VALIDATION, min(_MOST_VALIDATION, _VALIDATION_DOCUMENTS / different)), 4)
    limit = np.uint64(int(exact(fraction) * 2**64))
    for number in itertools.count(1):
        salt = f"v{number}"
        kept = select_side(hashes, stream_key("validation", salt), limit, True)
        if 0 < 2 * lengths[kept].sum() <= lengths.sum():
            break
    values = {
        "seed": seed,
        "validation": {"fraction": fraction, "salt": salt},
        "corpora": [{"name": _CORPUS, "prefix": _CORPUS, "weight": 1}],
    }
    write_atomic(folder / _MANIFEST, yaml.safe_dump(values, sort_keys=False).encode())
    tokens = int(lengths[kept].sum())
    say(
        f"manifest: {len(hashes) - len(kept):,} documents ({int(lengths.sum()) - tokens:,} tokens) to train on, "
        f"{len(kept):,} ({tokens:,} tokens) for validation: {folder / _MANIFEST}"
    )


def _seconds(begin: float) -> str:
    return f"{time.monotonic() - begin:.1f} s"
