"""Merge indexes of the same tokenizer into one."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from megazh.errors import DataError, UsageError
from megazh.files import locked, write_atomic
from megazh.index.metadata import Metadata, Rejected
from megazh.index.plan import PLAN
from megazh.index.reader import IndexedDataset
from megazh.index.writer import IndexWriter
from megazh.progress import Progress

_DOCUMENTS = 1 << 16  # documents per copy step


def merge_indexes(prefixes: Sequence[str], output: Path) -> Metadata:
    """Write the documents of all `prefixes`, in that order, as the index `output`; returns its metadata.

    Sources keep their names. If two indexes have a source of the same name, both are listed.

    Raises:
        UsageError: an index is missing or has another tokenizer, or there is already an index or a build at `output`.
        DataError: an index is damaged, or has no `PREFIX.json`.
        BusyError: another process is writing the same output.
    """
    if Path(f"{output}.idx").exists():
        raise UsageError(f"--output {output}: an index is there already; choose another name, or delete {output}.idx")
    indexes = [IndexedDataset(prefix) for prefix in prefixes]
    inputs: list[Metadata] = []
    for prefix, index in zip(prefixes, indexes, strict=True):
        if index.metadata is None:
            raise DataError(f"{prefix}.json: missing; only indexes that megazh built can be merged")
        if inputs and index.metadata.tokenizer != inputs[0].tokenizer:
            raise UsageError(
                f"{prefix}: tokenizer {index.metadata.tokenizer.fingerprint[:16]}… differs from "
                f"{inputs[0].tokenizer.fingerprint[:16]}… of {prefixes[0]}; index both with the same tokenizer"
            )
        inputs.append(index.metadata)
    folder = Path(f"{output}.build")
    with locked(folder / "lock", busy=f"{output}: another process builds this index"), _temporary(folder):
        writer = IndexWriter(folder, indexes[0].dtype)
        with Progress("merging", sum(index.tokens.nbytes for index in indexes)) as progress:
            for index in indexes:
                hashes = index.document_hashes()
                for at in range(0, len(index), _DOCUMENTS):
                    end = min(at + _DOCUMENTS, len(index))
                    tokens = index.tokens[index.starts[at] : index.starts[end]]
                    lengths = index.starts[at + 1 : end + 1] - index.starts[at:end]
                    writer.append(tokens, lengths, hashes[at:end])
                    progress.advance(tokens.nbytes)
        files = writer.finish()
        first = inputs[0]
        reasons: dict[str, int] = {}
        for each in inputs:
            for reason, number in each.rejected.reasons.items():
                reasons[reason] = reasons.get(reason, 0) + number
        metadata = Metadata(
            tokenizer=first.tokenizer,
            dtype=first.dtype,
            documents=writer.documents,
            tokens=writer.tokens,
            text_bytes=sum(each.text_bytes for each in inputs),
            empty_documents=sum(each.empty_documents for each in inputs),
            rejected=Rejected(total=sum(each.rejected.total for each in inputs), reasons=dict(sorted(reasons.items()))),
            token_length_histogram={str(edge): writer.histogram[edge] for edge in sorted(writer.histogram)},
            options=first.options,
            sources=[source for each in inputs for source in each.sources],
            files=files,
        )
        write_atomic(folder / "index.json", metadata.to_bytes(), durable=False)
        shutil.copyfile(f"{prefixes[0]}{first.tokenizer.file}", folder / "tokenizer")
        writer.commit(output, files, {".json": folder / "index.json", first.tokenizer.file: folder / "tokenizer"})
    return metadata


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Delete `folder` at the end, also after an error. Raises UsageError if it contains an interrupted build."""
    if (folder / PLAN).exists():
        raise UsageError(f"{folder}: an interrupted build is there; finish it, delete it, or choose another --output")
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
