"""Put indexes of the same tokenizer together into one."""

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

_DOCUMENTS = 1 << 16


def merge_indexes(prefixes: Sequence[str], output: Path) -> Metadata:
    """Write the documents of all `prefixes`, in that order, as the index `output`.

    Sources keep their names; where two inputs have a source of the same name, both are listed.

    Raises:
        UsageError: an index is missing, differs in tokenizer, or the output is in use.
        DataError: an index is damaged, or has no description.
        BusyError: another process writes the same output.
    """
    if Path(f"{output}.idx").exists():
        raise UsageError(f"--output {output}: an index is there already; choose another name, or delete {output}.idx")
    indexes = [IndexedDataset(prefix) for prefix in prefixes]
    parts: list[Metadata] = []
    for prefix, index in zip(prefixes, indexes, strict=True):
        if index.metadata is None:
            raise DataError(f"{prefix}.json: missing; only indexes that megazh built can be merged")
        if parts and index.metadata.tokenizer != parts[0].tokenizer:
            raise UsageError(
                f"{prefix}: tokenizer {index.metadata.tokenizer.fingerprint[:16]}… differs from "
                f"{parts[0].tokenizer.fingerprint[:16]}… of {prefixes[0]}"
            )
        parts.append(index.metadata)
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
        first = parts[0]
        reasons: dict[str, int] = {}
        for part in parts:
            for reason, number in part.rejected.reasons.items():
                reasons[reason] = reasons.get(reason, 0) + number
        metadata = Metadata(
            tokenizer=first.tokenizer,
            dtype=first.dtype,
            documents=writer.documents,
            tokens=writer.tokens,
            text_bytes=sum(part.text_bytes for part in parts),
            empty_documents=sum(part.empty_documents for part in parts),
            rejected=Rejected(total=sum(part.rejected.total for part in parts), reasons=dict(sorted(reasons.items()))),
            token_length_histogram={str(edge): writer.histogram[edge] for edge in sorted(writer.histogram)},
            options=first.options,
            sources=[source for part in parts for source in part.sources],
            files=files,
        )
        write_atomic(folder / "index.json", metadata.to_bytes(), durable=False)
        shutil.copyfile(f"{prefixes[0]}{first.tokenizer.file}", folder / "tokenizer")
        writer.commit(output, files, {".json": folder / "index.json", first.tokenizer.file: folder / "tokenizer"})
    return metadata


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Whatever happens, `folder` is gone afterwards. Raises UsageError where an interrupted build is in it."""
    if (folder / PLAN).exists():
        raise UsageError(f"{folder}: an interrupted build is there; finish it, delete it, or choose another --output")
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
