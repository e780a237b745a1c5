"""The plan of a build: everything that decides the bytes of an index. Also how two plans differ."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megazh.config import Config
from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import Source
from megazh.errors import DataError
from megazh.files import known_sha256, sha256_file
from megazh.index.metadata import FORMAT_VERSION, Metadata, Options, SourceInfo, TokenizerInfo
from megazh.progress import Progress
from megazh.tokenizer import Tokenizer
from megazh.tokenizer.tokenizer import dtype_for

PLAN = "plan.json"
"""File name of the plan in the folder of a build."""
CUT_VERSION = 2
"""Version of the cutting of the input; pieces of another version cannot be reused."""


class Plan(Config):
    """Everything that decides the bytes of an index. Only a build with an equal plan can resume an unfinished one."""

    cut_version: int = CUT_VERSION
    format_version: int = FORMAT_VERSION
    tokenizer: TokenizerInfo
    dtype: str
    options: Options
    sources: list[SourceInfo]


def make_plan(tokenizer: Tokenizer, sources: Sequence[Source], format: Format | None, read: ReadOptions) -> Plan:
    """The plan of a build. Hashes the sources in parallel, except those unchanged since they were last hashed."""
    hashes = _hash(sources)
    return Plan(
        tokenizer=tokenizer_info(tokenizer),
        dtype=dtype_for(tokenizer.vocab_size).name,
        options=Options(
            format=format.value if format else None,
            text_key=read.text_key,
            text_documents=read.text_documents.value,
            max_document_bytes=read.max_document_bytes,
            encoding=read.encoding,
        ),
        sources=[
            SourceInfo(name=source.name, bytes=source.size, sha256=digest)
            for source, digest in zip(sources, hashes, strict=True)
        ],
    )


def tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    """The description of a tokenizer in an index."""
    return TokenizerInfo(
        kind=tokenizer.kind.value,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        eod_id=tokenizer.eod_id,
        pad_id=tokenizer.pad_id,
        front_tokens=tokenizer.front_tokens,
        file=f".tokenizer{tokenizer.path.suffix}",
        sha256=sha256_file(tokenizer.path),
    )


def _hash(sources: Sequence[Source]) -> list[str]:
    stop = threading.Event()
    with (
        Progress("hashing the input", sum(source.size for source in sources)) as progress,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
    ):

        def on_bytes(size: int) -> None:
            if stop.is_set():
                raise InterruptedError
            progress.advance(size)

        try:
            return list(threads.map(lambda source: known_sha256(source.path, on_bytes), sources))
        except BaseException:  # Ctrl-C: do not wait until the threads have read their files
            stop.set()
            raise


def difference(old: Plan | Metadata, new: Plan) -> str:
    """Text that says how an existing build `old` differs from the requested build `new`; empty if it does not."""
    if old.format_version != new.format_version:
        return "another format version"
    changed = _changed_keys(old.tokenizer, new.tokenizer)
    if changed:
        return f"another tokenizer ({', '.join(changed)})"
    for key in _changed_keys(old.options, new.options):
        return f"another option: {key} was {getattr(old.options, key)!r}, is {getattr(new.options, key)!r}"
    before = {source.name: source for source in old.sources}
    now = {source.name: source for source in new.sources}
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            return f"another input: {name} was there, is not now"
        if name not in before:
            return f"another input: {name} was not there, is now"
        if before[name] != now[name]:
            return f"another input: {name} has changed"
    return ""


def _changed_keys(old: Config, new: Config) -> list[str]:
    return [key for key in type(new).model_fields if getattr(old, key) != getattr(new, key)]


Signature = tuple[int, int, int]


def signature(source: Source) -> Signature:
    """Inode, size and modification time in ns; if they differ after reading, the file was changed meanwhile.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        status: Any = source.path.stat()
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read: {error.strerror}") from None
    return status.st_ino, status.st_size, status.st_mtime_ns
