"""From text to what a training run reads, in one call: stories (for the demo), tokenizer, index, manifest."""

import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml
from pydantic import ValidationError

from megazh.config import Config
from megazh.corpus.pieces import ReadOptions, TextDocuments, cut, piece_size, piece_sources
from megazh.corpus.reader import read_piece
from megazh.corpus.sources import Format, Source, find_sources
from megazh.corpus.stories import write_stories
from megazh.errors import DataError, MegazhError, UsageError
from megazh.files import locked, write_atomic
from megazh.index.build import Request, build_index
from megazh.index.manifest import exact, load_manifest
from megazh.index.order import select_side, stream_key
from megazh.index.pools import InlinePool
from megazh.index.reader import IndexedDataset
from megazh.tokenizer.train import train_tokenizer

_STORIES, _TOKENIZER, _CORPUS, _MANIFEST = "stories.jsonl", "tokenizer.json", "corpus", "mixture.yaml"
_PREPARED = "prepared.json"
_INDEX_SUFFIXES = (".idx", ".bin", ".docs", ".json", ".tokenizer.json", ".log", ".rejected.jsonl")
_OWN_FILES = (_MANIFEST, *(f"{_CORPUS}{suffix}" for suffix in _INDEX_SUFFIXES), _TOKENIZER, _STORIES)
_FEW_FILES = 50
_TOKENIZER_BYTES = 200_000_000  # more text changes the merges little and takes minutes and gigabytes
_VALIDATION_SHARE, _MOST_VALIDATION, _VALIDATION_DOCUMENTS = 0.02, 0.1, 20


class _Input(Config):
    """A file as it was when it was read."""

    path: str
    size: int
    mtime_ns: int


class _Plan(Config):
    """All that decides what is prepared."""

    vocab_size: int
    seed: int
    story_count: int | None
    """None where the text is the user's own."""
    text_key: str
    text_documents: str
    inputs: list[_Input]


class _Prepared(Config):
    """The contents of `prepared.json`, written before the first step and after the last one."""

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
    *,
    say: Callable[[str], None],
) -> Path:
    """Make a tokenizer, an index and a manifest in `folder`; returns the manifest's path, `folder/mixture.yaml`.

    Called again with the same arguments and unchanged files it only checks what is there; after an interruption
    it goes on; what a call that failed left behind is no obstacle to a call with other arguments.

    Args:
        vocab_size: ids of the tokenizer, control tokens included; fewer where the text has no more to learn.
        seed: of the stories, and of the manifest's random orders.
        inputs: files, folders or globs; None for stories of the project's own.
        text_key: the key or column of the text; `a.b` is nested.
        text_documents: where a document ends in plain text; None takes blank lines where all input is plain text
            in fewer than 50 files, and files otherwise.
        story_count: how many stories, where `inputs` is None.
        say: gets one line a step, with its seconds and numbers.

    Raises:
        UsageError: an input or a size cannot work, or the folder was prepared from something else.
        DataError: an input is damaged, holds no text, or too little of it to be split.
        BusyError: another process prepares this folder.
        WorkerError: the disk is full; finished work is kept.
    """
    with locked(folder / "prepare.lock", busy=f"{folder}: another process prepares this folder"):
        sources = None if inputs is None else _sources_outside(folder, inputs)
        if text_documents is None:
            text_documents = _unit(sources, say)
        plan = _Plan(
            vocab_size=vocab_size,
            seed=seed,
            story_count=story_count if sources is None else None,
            text_key=text_key if sources is not None else "text",
            text_documents=text_documents.value,
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
        if sources is None:
            sources = [_tell_stories(folder, plan, say)]
        read = ReadOptions(plan.text_key, text_documents)
        _train(folder, sources, read, vocab_size, say)
        _index(folder, sources, read, say)
        _split(folder, seed, say)
        _write_prepared(folder, plan, complete=True)
        return manifest


def _sources_outside(folder: Path, inputs: Sequence[str]) -> list[Source]:
    """The input files but for those in `folder`: what is written there must not become input of the next call."""
    own = folder.resolve()
    for given in inputs:
        if Path(given).resolve().is_relative_to(own):
            raise UsageError(f"--input {given}: lies in {folder}, where the run's own files go; put it elsewhere")
    sources = [source for source in find_sources(inputs) if not source.path.resolve().is_relative_to(own)]
    if not sources:
        raise UsageError(f"--input {' '.join(inputs)}: no file but those in {folder}, which are the run's own")
    return sources


def _unit(sources: Sequence[Source] | None, say: Callable[[str], None]) -> TextDocuments:
    if sources is None or len(sources) >= _FEW_FILES or any(source.format is not Format.TEXT for source in sources):
        return TextDocuments.FILE
    say(
        f"text: {len(sources)} plain file{'s' if len(sources) > 1 else ''}: a document ends at a blank line "
        "(--text-documents file makes each file one document)"
    )
    return TextDocuments.BLANK_LINES


def _input(source: Source) -> _Input:
    status = source.path.stat()
    return _Input(path=str(source.path), size=status.st_size, mtime_ns=status.st_mtime_ns)


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
    remedy = "choose another run name (-r), or delete the folder to prepare it anew"
    for key in ("story_count", "text_key", "text_documents", "vocab_size", "seed"):
        was, found = getattr(before, key), getattr(now, key)
        if key == "story_count" and (was is None) != (found is None):
            was, found = ("own text" if count is None else "stories" for count in (was, found))
            raise UsageError(f"{folder}: was prepared from {was}, this run asks for {found}; {remedy}")
        if was != found:
            raise UsageError(f"{folder}: was prepared with {key} {was}, this run asks for {found}; {remedy}")
    old = {file.path: file for file in before.inputs}
    new = {file.path: file for file in now.inputs}
    path = next(path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path))
    what = "is new" if path not in old else "is no longer named" if path not in new else "has changed since"
    raise UsageError(f"{folder}: was prepared from other input: {path} {what}; {remedy}")


def _check_prepared(folder: Path) -> None:
    try:
        load_manifest(folder / _MANIFEST)
        IndexedDataset(folder / _CORPUS).document_hashes()
    except MegazhError as error:
        raise type(error)(f"{error}; delete {folder} to prepare it anew") from None


def _check_free(folder: Path) -> None:
    """Nothing that another hand put here is overwritten."""
    for name in _OWN_FILES:
        if (folder / name).exists():
            raise UsageError(
                f"{folder / name}: is in the way, and no preparation made it; choose another run name (-r)"
            )


def _discard(folder: Path) -> None:
    """Remove what an unfinished preparation with another plan left."""
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in (f"{_CORPUS}.build", f"{_CORPUS}.build.done"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _tell_stories(folder: Path, plan: _Plan, say: Callable[[str], None]) -> Source:
    path = folder / _STORIES
    if not path.exists():
        assert plan.story_count is not None
        begin = time.monotonic()
        write_stories(path, plan.story_count, plan.seed)
        size = path.stat().st_size / 1e6
        say(f"stories: {plan.story_count:,}, {size:.1f} MB, in {_seconds(begin)}: {path}")
    return find_sources([str(path)])[0]


def _train(folder: Path, sources: Sequence[Source], read: ReadOptions, size: int, say: Callable[[str], None]) -> None:
    path = folder / _TOKENIZER
    if path.exists():
        return
    begin = time.monotonic()
    _check_text(sources, read)
    found = train_tokenizer(sources, read, path, size, max_bytes=_TOKENIZER_BYTES)
    short = f" (fewer than {size:,}: the text has no more to learn)" if found < size else ""
    say(f"tokenizer: {found:,} ids{short}, in {_seconds(begin)}: {path}")


def _check_text(sources: Sequence[Source], read: ReadOptions) -> None:
    """Raises DataError with the first reason why, where no source gives a document."""
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
        raise DataError(f"no input gives a document; the first that does not: {reason} (--text-key names the key)")
    raise DataError(f"the input holds no text: {sources[0].path}{' and others' if len(sources) > 1 else ''}")


def _index(folder: Path, sources: Sequence[Source], read: ReadOptions, say: Callable[[str], None]) -> None:
    begin = time.monotonic()
    request = Request([str(source.path) for source in sources], folder / _CORPUS, folder / _TOKENIZER, read=read)
    summary = build_index(request, InlinePool(), say)
    if summary.already_complete:
        return
    data = summary.metadata
    size = data.text_bytes / max(data.tokens - data.documents, 1)
    rejected = f", {data.rejected.total:,} rejected ({folder / _CORPUS}.rejected.jsonl)" if data.rejected.total else ""
    say(
        f"index: {data.documents:,} documents, {data.tokens:,} tokens, {size:.2f} bytes a token{rejected}, "
        f"in {_seconds(begin)}: {folder / _CORPUS}.bin"
    )


def _split(folder: Path, seed: int, say: Callable[[str], None]) -> None:
    """Write the manifest, with a share for validation and a salt that leave documents on both sides."""
    index = IndexedDataset(folder / _CORPUS)
    hashes, lengths = index.document_hashes(), np.diff(index.starts)
    different = len(np.unique(hashes))
    if different < 2:
        raise DataError(
            f"the text is {len(hashes):,} document{'s' if len(hashes) != 1 else ''}, {different} different: training "
            "and validation need at least 2; give more files, or, for plain text with blank lines between documents, "
            "--text-documents blank-lines"
        )
    share = max(_VALIDATION_SHARE, min(_MOST_VALIDATION, _VALIDATION_DOCUMENTS / different))
    fraction = round(share, 4)
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
