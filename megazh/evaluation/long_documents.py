"""Long documents of an index or of text files, as the ids of a model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import find_sources
from megazh.errors import UsageError
from megazh.exchange.tokenizer_files import exported_fingerprint
from megazh.index.metadata import load_tokenizer_of
from megazh.index.reader import IndexedDataset
from megazh.tokenizer import Tokenizer
from megazh.tokenizer.sample import sample_texts


@dataclass(frozen=True)
class LongDocuments:
    """The beginnings of documents of at least a length."""

    ids: list[npt.NDArray[np.integer]]
    """The first `length` token ids of each."""
    read: int
    """Documents that were looked at, shorter ones included."""


def long_documents(data: str, tokenizer: Tokenizer, length: int, limit: int | None, text_key: str) -> LongDocuments:
    """The first documents of at least `length` tokens.

    Args:
        data: the PREFIX of an index, or files of text as `megazh index build` takes them.
        tokenizer: the model's tokenizer.
        length: tokens that a document needs.
        limit: largest number of documents to take; None: all that are long enough.
        text_key: key or column of the text in files that have keys.

    Raises:
        UsageError: no such data, an index of another tokenizer, or no document is that long.
        DataError: a file is damaged.
    """
    is_index = any(Path(f"{data}{suffix}").is_file() for suffix in (".bin", ".idx"))
    documents = (
        _of_index(data, tokenizer, length, limit) if is_index else _of_text(data, tokenizer, length, limit, text_key)
    )
    if not documents.read:
        raise UsageError(f"{data}: holds no document; of rows, --text-key names the key of the text")
    if not documents.ids:
        raise UsageError(
            f"{data}: none of {documents.read:,} documents has {length:,} tokens; give longer ones, or smaller --bounds"
        )
    return documents


def _of_index(prefix: str, tokenizer: Tokenizer, length: int, limit: int | None) -> LongDocuments:
    index = IndexedDataset(prefix)
    if index.metadata is None:
        raise UsageError(
            f"{prefix}: its tokenizer is not known; 'megazh index adopt {prefix} --tokenizer TOK' names it"
        )
    own = load_tokenizer_of(prefix, index.metadata)
    if own.fingerprint != tokenizer.fingerprint and exported_fingerprint(own) != exported_fingerprint(tokenizer):
        raise UsageError(f"{prefix}: was made with another tokenizer than the model's; give the text instead")
    long = np.flatnonzero(np.diff(index.starts) >= length)[:limit]
    read = len(index) if limit is None or len(long) < limit else int(long[-1]) + 1
    return LongDocuments([index[int(number)][:length] for number in long], read)


def _of_text(data: str, tokenizer: Tokenizer, length: int, limit: int | None, text_key: str) -> LongDocuments:
    options = ReadOptions(text_key=text_key)
    _, batches = sample_texts(find_sources([data], read=options), options, None)
    found, read = list[npt.NDArray[np.integer]](), 0
    for texts in batches:
        for text in texts:
            if limit is not None and len(found) == limit:
                return LongDocuments(found, read)
            read += 1
            ids = tokenizer.encode(text)
            if len(ids) >= length:
                found.append(np.array(ids[:length], np.int32))
    return LongDocuments(found, read)
