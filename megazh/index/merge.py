"""Merge indexes of the same tokenizer into one."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from megazh.errors import DataError, UsageError
from megazh.files import locked, write_atomic
from megazh.index.mask import unpack
from megazh.index.metadata import Metadata, Rejected, load_tokenizer_of, sum_coverage
from megazh.index.plan import PLAN
from megazh.index.reader import IndexedDataset
from megazh.index.writer import IndexWriter
from megazh.progress import Progress
from megazh.tokenizer.compare import tokenizer_difference
from megazh.tokenizer.tokenizer import dtype_for
from megazh.writing import check_room, check_writable

_DOCUMENTS = 1 << 16  # documents per copy step
_BYTES_PER_DOCUMENT = 32  # an int32 length, its copy, an int64 offset, a document number and a hash


def merge_indexes(prefixes: Sequence[str], output: Path) -> Metadata:
    """Write the documents of all `prefixes`, in that order, as the index `output`; returns its metadata.

    Sources keep their names. If two indexes have a source of the same name, both are listed.

    Raises:
        UsageError: an index is missing or has another tokenizer, there is already an index or a build at `output`, or
            its folder cannot be written.
        DataError: an index is damaged, or has no `PREFIX.json`.
        BusyError: another process is writing the same output.
        WriteError: the output cannot be written, or its disk has too little room.
    """
    if Path(f"{output}.idx").exists():
        raise UsageError(f"--output {output}: an index is there already; choose another name")
    check_writable(output.parent, "choose another --output", f"--output {output}")
    indexes = [IndexedDataset(prefix) for prefix in prefixes]
    inputs = [_metadata(prefix, index) for prefix, index in zip(prefixes, indexes, strict=True)]
    for prefix, data in zip(prefixes[1:], inputs[1:], strict=True):
        _check_tokenizer(prefixes[0], inputs[0], prefix, data)
        _check_masks(prefixes[0], inputs[0], prefix, data)
    dtypes = {index.dtype for index in indexes}
    dtype = dtypes.pop() if len(dtypes) == 1 else dtype_for(inputs[0].tokenizer.vocab_size)
    folder = Path(f"{output}.build")
    with locked(folder / "lock", busy=f"{output}: another process builds this index"), temporary_folder(folder):
        size = sum(len(index.tokens) * dtype.itemsize + len(index) * _BYTES_PER_DOCUMENT for index in indexes)
        check_room(output, size)
        writer = IndexWriter(folder, dtype, masked=inputs[0].files.mask is not None)
        with Progress("merging", sum(index.tokens.nbytes for index in indexes)) as progress:
            for index in indexes:
                hashes = index.document_hashes()
                for at in range(0, len(index), _DOCUMENTS):
                    end = min(at + _DOCUMENTS, len(index))
                    begin, stop = int(index.starts[at]), int(index.starts[end])
                    tokens = index.tokens[begin:stop].astype(dtype, copy=False)
                    lengths = index.starts[at + 1 : end + 1] - index.starts[at:end]
                    trained = unpack(index.mask, begin, stop) if len(index.mask) else None
                    writer.append(tokens, lengths, hashes[at:end], trained)
                    progress.advance(tokens.nbytes)
        files = writer.finish()
        first = inputs[0]
        reasons: dict[str, int] = {}
        for each in inputs:
            for reason, number in each.rejected.reasons.items():
                reasons[reason] = reasons.get(reason, 0) + number
        metadata = Metadata(
            tokenizer=first.tokenizer,
            template=first.template,
            dtype=dtype.name,
            documents=writer.documents,
            tokens=writer.tokens,
            text_bytes=sum(each.text_bytes for each in inputs),
            coverage=sum_coverage(each.coverage for each in inputs),
            empty_documents=sum(each.empty_documents for each in inputs),
            rejected=Rejected(total=sum(each.rejected.total for each in inputs), reasons=dict(sorted(reasons.items()))),
            token_length_histogram={str(edge): writer.histogram[edge] for edge in sorted(writer.histogram)},
            options=first.options,
            sources=[source for each in inputs for source in each.sources],
            files=files,
        )
        write_atomic(folder / "index.json", metadata.to_bytes(), durable=False)
        tokenizer = Path(f"{prefixes[0]}{first.tokenizer.file}").read_bytes()
        write_atomic(folder / "tokenizer", tokenizer, durable=False)
        writer.commit(output, files, {".json": folder / "index.json", first.tokenizer.file: folder / "tokenizer"})
    return metadata


def _metadata(prefix: str, index: IndexedDataset) -> Metadata:
    if index.metadata is None:
        raise DataError(
            f"{prefix}.json: missing; for an index of Megatron-LM, make it with 'megazh index adopt {prefix} "
            "--tokenizer TOK'"
        )
    return index.metadata


def _check_tokenizer(first: str, expected: Metadata, prefix: str, found: Metadata) -> None:
    """Raises UsageError if the tokenizers give other ids; copies of one tokenizer may differ in form."""
    if found.tokenizer.fingerprint == expected.tokenizer.fingerprint:
        return
    different = tokenizer_difference(load_tokenizer_of(first, expected), load_tokenizer_of(prefix, found))
    if different:
        raise UsageError(
            f"{prefix}: its tokenizer differs from that of {first}: {different}; index both with the same tokenizer"
        )


def _check_masks(first: str, expected: Metadata, prefix: str, found: Metadata) -> None:
    """Raises UsageError if only one of the indexes has a mask, or their chat templates differ."""
    if (found.files.mask is None) != (expected.files.mask is None):
        with_mask, without = (prefix, first) if expected.files.mask is None else (first, prefix)
        raise UsageError(
            f"{with_mask}: has a mask of trained tokens, {without} has none; mix them by a manifest instead, each with "
            "its weight"
        )
    if found.template != expected.template:
        names = [data.template.name if data.template else "none" for data in (found, expected)]
        raise UsageError(
            f"{prefix}: its chat template ({names[0]}) differs from that of {first} ({names[1]}); convert both with "
            "the same --template"
        )


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[None]:
    """Delete `folder` at the end, also after an error. Raises UsageError if it contains an interrupted build."""
    if (folder / PLAN).exists():
        raise UsageError(f"{folder}: an interrupted build is there; finish it, or choose another --output")
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
