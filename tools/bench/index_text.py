"""The text of `index.py`: read or made up, without duplicates, and divided into one slice per round."""

import itertools
import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from megazh.corpus.options import ReadOptions
from megazh.corpus.pieces import cut, piece_size, piece_sources
from megazh.corpus.reader import read_piece
from megazh.corpus.sources import find_sources
from megazh.errors import DataError

FILES_A_SLICE = 4
"""Number of files per slice, so that two workers get equal shares even of a small slice."""

_WORDS = 60_000
_BLOCK = 1 << 17  # words made up at a time
_PUNCTUATION = ("，", "。", "、", "；", "：", "？", "！", "”，", "\n")
_LATIN = ("the", "model", "GPU", "Linux", "data", "token", "Python", "BERT", "version", "API", "CPU", "web")


@dataclass(frozen=True)
class Slice:
    """The text of one round. The head is its beginning, for contenders that are too slow for all of it."""

    files: list[Path]
    documents: int
    text_bytes: int
    head: Path
    head_documents: int
    head_bytes: int


def read_documents(inputs: Sequence[str], options: ReadOptions, max_bytes: int, seed: int) -> list[str]:
    """Distinct, non-empty documents of the files, in random order and in NFC (gigatoken does not normalize).

    Args:
        max_bytes: bytes of text after which reading stops.
    """
    sources = find_sources(inputs)
    seen: dict[str, None] = {}  # a set that keeps the order
    size = 0
    for piece in cut(sources, options, piece_size(sources)):
        for batch in read_piece(piece_sources(sources, piece, options), piece, options):
            for text in batch.texts:
                text = unicodedata.normalize("NFC", text)
                if text not in seen:
                    seen[text] = None
                    size += len(text.encode())
        if size >= max_bytes:
            break
    documents = list(seen)
    random.Random(seed).shuffle(documents)
    return documents


def made_up_documents(size: int, seed: int) -> Iterator[str]:
    """About `size` bytes of Chinese-like documents: Zipf-distributed words, punctuation, some Latin and digits.

    The characters are the 3,755 common ones of GB 2312, level 1; documents have 2 kB on average (log-normal).
    """
    rng = np.random.default_rng(seed)
    words = _made_up_words(rng)
    weights = 1 / np.arange(3, len(words) + 3)
    edges = np.cumsum(weights / weights.sum())
    marks = np.array(("", *_PUNCTUATION), object)
    rest = size
    while rest > 0:
        pieces = np.empty(2 * _BLOCK, object)
        pieces[0::2] = words[np.searchsorted(edges, rng.random(_BLOCK)).clip(max=len(words) - 1)]
        chosen = (rng.random(_BLOCK) < 0.16) * np.minimum(rng.geometric(0.4, _BLOCK), len(_PUNCTUATION))
        pieces[1::2] = marks[chosen]
        lengths = np.maximum(rng.lognormal(5.2, 0.9, _BLOCK // 50), 4).astype(np.int64)
        start = 0
        for end in np.cumsum(2 * lengths).tolist():
            if end > len(pieces) or rest <= 0:
                break
            text = "".join(pieces[start:end])
            start = end
            rest -= len(text.encode())
            yield text


def _made_up_words(rng: np.random.Generator) -> npt.NDArray[np.object_]:
    """(words,) made-up words, the most frequent first."""
    codes = (bytes([high, low]) for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF))
    characters = np.array([code.decode("gb2312", "ignore") for code in codes], object)
    characters = rng.permutation(characters[characters != ""])
    common = 1 / np.arange(20, len(characters) + 20)
    common /= common.sum()
    lengths = rng.choice([1, 2, 3, 4], _WORDS, p=[0.15, 0.6, 0.15, 0.1])
    drawn = iter(rng.choice(len(characters), int(lengths.sum()), p=common).tolist())
    words = np.array(["".join(characters[next(drawn)] for _ in range(length)) for length in lengths], object)
    words[:2000] = sorted(words[:2000], key=len)  # the most frequent words are short
    words[70::40] = [f" {_LATIN[number % len(_LATIN)]}{number % 7 or ''} " for number in range(len(words[70::40]))]
    words[90::60] = [str(number * 37 % 2100) for number in range(len(words[90::60]))]
    return words


def write_slices(
    documents: Sequence[str], folder: Path, slices: int, head_share: float, head_bytes: int
) -> list[Slice]:
    """Divide the documents into `slices` slices of about equal size, written as JSONL files to `folder`.

    Args:
        head_share: size of a head as a share of its slice.
        head_bytes: least size of a head in bytes.

    Raises:
        DataError: there are too few documents.
    """
    sizes = np.array([len(document.encode()) for document in documents], np.int64)
    ranges = _ranges(sizes, 0, len(documents), slices)
    if any(end - start < 2 * FILES_A_SLICE for start, end in ranges):
        raise DataError(f"{len(documents)} documents are too few for {slices} slices: give more text or fewer --rounds")
    result = []
    for number, (start, end) in enumerate(ranges):
        files = []
        for part, (first, last) in enumerate(_ranges(sizes, start, end, FILES_A_SLICE)):
            files.append(folder / f"slice{number:02d}-{part}.jsonl")
            write_jsonl(files[-1], documents[first:last])
        ends = np.cumsum(sizes[start:end])
        wanted = max(head_share * int(ends[-1]), head_bytes)
        head_documents = min(int(np.searchsorted(ends, wanted)) + 1, end - start)
        head = folder / f"slice{number:02d}-head.jsonl"
        write_jsonl(head, documents[start : start + head_documents])
        result.append(Slice(files, end - start, int(ends[-1]), head, head_documents, int(ends[head_documents - 1])))
    return result


def write_jsonl(path: Path, documents: Sequence[str]) -> None:
    """Write one JSON object with the key `text` per line."""
    with open(path, "wb") as file:
        for document in documents:
            file.write(orjson.dumps({"text": document}) + b"\n")


def _ranges(sizes: npt.NDArray[np.int64], start: int, end: int, count: int) -> list[tuple[int, int]]:
    """Half-open ranges that divide the documents from `start` to `end` into `count` groups of about equal bytes."""
    ends = np.cumsum(sizes[start:end])
    total = int(ends[-1]) if len(ends) else 0
    cuts = [start + int(np.searchsorted(ends, total * number / count)) for number in range(1, count)]
    edges = [start, *cuts, end]
    return list(itertools.pairwise(edges))
