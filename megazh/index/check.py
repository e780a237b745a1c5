"""Show what is in an index, and verify all of it."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megazh.errors import DataError, UsageError
from megazh.files import sha256_file
from megazh.index.mask import count_trained, unpack
from megazh.index.metadata import Metadata, TokenizerInfo, load_tokenizer_of
from megazh.index.reader import IndexedDataset
from megazh.program import runnable
from megazh.progress import Progress

_STEP = 1 << 24  # tokens per step of the check
_BAR = 40  # characters of the longest bar in the histogram


def inspect_index(prefix: str, document: int | None = None, tokens: int = 200) -> Iterator[str]:
    """Lines about an index: header, counts, histogram and, if `document` is given, its first `tokens` tokens, decoded.

    Raises:
        UsageError: there is no such index, or no such document.
        DataError: the index is damaged.
    """
    index = IndexedDataset(prefix)
    data = index.metadata
    yield f"files        {prefix}.bin ({index.tokens.nbytes:,} bytes), {prefix}.idx (MMIDIDX version 1)"
    yield f"dtype        {index.dtype}"
    yield f"documents    {len(index):,} in {len(index.sequence_lengths):,} sequences"
    yield f"tokens       {len(index.tokens):,}"
    if data is None:
        yield runnable(
            f"description  none: {prefix}.json is missing, as for Megatron-LM's own; 'megazh index adopt' makes it"
        )
    else:
        yield f"text         {data.text_bytes:,} bytes"
        yield f"tokenizer    {data.tokenizer.kind}, {data.tokenizer.vocab_size:,} ids, {data.tokenizer.fingerprint}"
        yield f"end          {data.tokenizer.eod_id} {data.tokenizer.eod}"
        if data.coverage is not None:
            found = data.coverage
            yield f"lost         {found.lost_characters:,} of {found.characters:,} characters have no token"
        if data.template is not None:
            yield f"template     {data.template.name}, answers end with {data.template.stop}"
        if len(index.mask):
            yield f"mask         {_trained(index)}"
        yield f"skipped      {data.empty_documents:,} empty documents, {data.rejected.total:,} rejected lines"
        yield f"sha256       {data.files.bin.sha256} (.bin)"
        yield f"sources      {len(data.sources):,} files, {sum(source.bytes for source in data.sources):,} bytes"
        for source in data.sources[:10]:
            yield f"             {source.name} ({source.bytes:,} bytes, {source.sha256[:16]}…)"
        if len(data.sources) > 10:
            yield f"             … {len(data.sources) - 10:,} more in {prefix}.json"
        yield "documents by length in tokens"
        most = max(data.token_length_histogram.values())
        for edge, number in data.token_length_histogram.items():
            low = int(edge)
            bar = "█" * max(round(_BAR * number / most), 1)
            yield f"  {low:>10,} to {max(2 * low - 1, 0):<10,} {number:>12,} {bar}"
    if document is None:
        return
    try:
        ids = index[document]
    except IndexError:
        raise UsageError(f"--document {document}: {prefix} has documents 0 to {len(index) - 1}") from None
    yield f"document {document}: {len(ids):,} tokens{'' if len(ids) <= tokens else f', the first {tokens}'}"
    yield "ids          " + " ".join(map(str, ids[:tokens]))
    if data is not None:
        yield from _decoded(index, data, document, tokens)


def _decoded(index: IndexedDataset, data: Metadata, document: int, tokens: int) -> Iterator[str]:
    """The text of the first tokens of a document, with brackets around what is trained if there is a mask."""
    ids, tokenizer = index[document][:tokens], load_tokenizer_of(index.prefix, data)
    if not len(index.mask):
        yield tokenizer.decode(ids.tolist())
        return
    start = int(index.starts[document % len(index)])
    trained = unpack(index.mask, start, start + len(ids))
    changes = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    runs = [(trained[at], tokenizer.decode(ids[at:end].tolist())) for at, end in itertools.pairwise(changes)]
    yield "trained      in [brackets]"
    yield "".join(f"[{text}]" if is_trained else text for is_trained, text in runs)


def verify_index(prefix: str) -> str:
    """Read all of an index and check it; returns a line that says what was checked.

    Beyond the checks of `IndexedDataset`: the SHA-256 of each file is computed again, every id is below the
    vocabulary size, and every document ends with the end-of-document id and contains no other. With a mask, the id may
    also end the answers inside of a document; no first token of a document is trained.

    Raises:
        DataError: a check failed; the message says which and where.
    """
    index = IndexedDataset(prefix)
    data = index.metadata
    size = index.tokens.nbytes
    with Progress("verifying", 2 * size if data else size) as progress:
        if data is not None:
            index.document_hashes()
            for suffix, recorded in data.files.by_suffix().items():
                found = sha256_file(Path(prefix + suffix), progress.advance if suffix == ".bin" else None)
                if found != recorded.sha256:
                    raise DataError(
                        f"{prefix}{suffix}: wrong content: expected sha256 {recorded.sha256}, found {found}"
                    )
        largest = 0
        ends = 0
        for at in range(0, len(index.tokens), _STEP):
            tokens = index.tokens[at : at + _STEP]
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or (data is not None and high >= data.tokenizer.vocab_size):
                wrong = int(tokens.argmin() if low < 0 else tokens.argmax())
                limit = f"below the vocabulary of {data.tokenizer.vocab_size}" if data else "of at least 0"
                raise DataError(f"{prefix}.bin: token {at + wrong}: expected an id {limit}, found {tokens[wrong]}")
            largest = max(largest, high)
            if data is not None:
                ends += int(np.count_nonzero(tokens == data.tokenizer.eod_id))
            progress.advance(tokens.nbytes)
    if data is None:
        return f"{len(index):,} documents, {len(index.tokens):,} tokens, largest id {largest}: boundaries are right"
    lasts = index.tokens[index.starts[1:] - 1]
    wrong_ends = np.flatnonzero(lasts != data.tokenizer.eod_id)
    if len(wrong_ends):
        first = int(wrong_ends[0])
        raise DataError(
            f"{prefix}.bin: document {first}: expected end-of-document id {data.tokenizer.eod_id}, found {lasts[first]}"
        )
    counts = f"{len(index):,} documents, {len(index.tokens):,} tokens"
    if len(index.mask):
        _check_mask(index, data.tokenizer)
        return f"{counts}, {_trained(index)}: hashes, boundaries, ids, document ends, mask are right"
    if ends != len(index):
        raise DataError(f"{prefix}.bin: expected {len(index)} end-of-document ids, one per document, found {ends}")
    return f"{counts}: hashes, boundaries, ids, document ends are right"


def _check_mask(index: IndexedDataset, tokenizer: TokenizerInfo) -> None:
    prefix, mask, starts, total = index.prefix, index.mask, index.starts, len(index.tokens)
    firsts = starts[:-1]
    trained = np.flatnonzero((mask[firsts >> 3] >> (firsts & 7)) & 1)
    if len(trained):
        raise DataError(
            f"{prefix}.mask: document {trained[0]}: its first token is trained, but nothing predicts it; convert the "
            "conversations again"
        )
    if unpack(mask, total, 8 * len(mask)).any():
        raise DataError(f"{prefix}.mask: trains tokens beyond the last of {total}; convert the conversations again")
    longer = np.flatnonzero(np.diff(starts) > 1)
    twice = longer[index.tokens[starts[longer + 1] - 2] == tokenizer.eod_id]
    if len(twice):
        raise DataError(
            f"{prefix}.bin: document {twice[0]}: expected one end-of-document id {tokenizer.eod_id} at its "
            "end, found two"
        )


def _trained(index: IndexedDataset) -> str:
    trained = count_trained(index.mask)
    return f"{trained:,} of them trained ({trained / max(len(index.tokens), 1):.1%})"
