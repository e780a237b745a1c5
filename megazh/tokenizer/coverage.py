"""How much of a text its ids stand for: characters that no token stands for, unknown tokens, bytes.

Characters are counted after the tokenizer's own normalization. Blanks are not counted, since many tokenizers drop them
between words and put them back when they decode; line breaks are, since they do not come back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megazh.tokenizer.base import Tokenizer
from megazh.tokenizer.encoders import Ids, Offsets

_BLANK_BYTES = b" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"
_EXCERPT = 30  # characters of an example


@dataclass
class Counts:
    """Sums over documents."""

    characters: int = 0
    """Characters of the text."""
    lost: int = 0
    """Characters that no token stands for: unknown or dropped ones, and line breaks that became blanks."""
    unknown: int = 0
    """Unknown tokens."""
    token_bytes: int | None = None
    """UTF-8 bytes that the tokens stand for; None where all bytes are kept, so that nothing is counted."""
    example: str = ""
    """Beginning of the first document with a loss, and what its ids stand for."""


class CoverageTable:
    """What each id of a tokenizer stands for, to count it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        pieces = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self._bytes = np.array([len(piece) for piece in pieces], np.int64)
        self._solid = np.array([_solid(piece) for piece in pieces], np.int64)
        self._breaks = np.array([piece.count(b"\n") for piece in pieces], np.int64)
        self._blank_first = np.array([piece.startswith(b" ") for piece in pieces], np.bool_)

    def count(self, texts: Sequence[str], ids: Ids, offsets: Offsets, counts: Counts) -> None:
        """Add to `counts` what the ids of the documents `texts`, `ids[offsets[i]:offsets[i + 1]]`, stand for."""
        if self._tokenizer.unk_id is not None:
            counts.unknown += int(np.count_nonzero(ids == self._tokenizer.unk_id))
        counts.token_bytes = (counts.token_bytes or 0) + int(self._bytes[ids].sum())
        solid, breaks = _sums(self._solid[ids], offsets), _sums(self._breaks[ids], offsets)
        for at, text in enumerate(texts):
            first, end = int(offsets[at]), int(offsets[at + 1])
            if first < end and self._blank_first[ids[first]] and text[:1] != " ":
                counts.token_bytes -= 1  # put before each text by SentencePiece and its like
            normal = self._tokenizer.normalize(text)
            lost = max(0, _solid(normal) - int(solid[at])) + max(0, text.count("\n") - int(breaks[at]))
            if lost and not counts.lost:
                found = self._tokenizer.decode(ids[first : min(end, first + 2 * _EXCERPT)].tolist())
                counts.example = f"{text[:_EXCERPT]!r} becomes {found[:_EXCERPT]!r}"
            counts.lost += lost


def _sums(values: npt.NDArray[np.int64], offsets: Offsets) -> npt.NDArray[np.int64]:
    """(documents,) sum of the values of each document."""
    before = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=before[1:])
    return before[offsets[1:]] - before[offsets[:-1]]


def _solid(text: str | bytes) -> int:
    """Number of characters that are not blank; of bytes that are no whole text, those that begin one."""
    if isinstance(text, str):
        return len("".join(text.split()))
    try:
        return _solid(text.decode())
    except UnicodeDecodeError:
        return sum(byte & 0xC0 != 0x80 and byte not in _BLANK_BYTES for byte in text)
