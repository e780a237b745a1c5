"""Text of token ids, all at once or one by one, in whole characters."""

import codecs
from collections.abc import Sequence

from megazh.tokenizer.base import Tokenizer

_REPLACEMENT = "\ufffd"
_UNFINISHED = 3
"""Number of U+FFFD at the end of a text that may still become a character, which has at most four bytes."""
_GIVE_UP = 8
"""Number of ids in a row that complete no character, after which their bytes are returned as U+FFFD.

Some decoders turn a whole run of bytes into U+FFFD until it is valid UTF-8.
"""
_WINDOW = 32
"""Number of ids that are decoded again for each new id; twice as many while these end in invalid bytes.

Without a limit, the time for a text would grow with the square of its length.
"""


_LONGEST = 4
"""Bytes of the longest character in UTF-8."""


def decode_whole(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of `ids` without the first bytes of a last character whose other bytes are missing.

    Such bytes are what a text ends with where its last character was cut. Other bytes that are not UTF-8 are U+FFFD,
    and so is U+FFFD itself.
    """
    tail, first = b"", len(ids)
    while first and len(tail) < _LONGEST and (piece := tokenizer.token_bytes(ids[first - 1])):
        first -= 1
        tail = piece + tail
    cut = _unfinished_bytes(tail)
    kept = len(ids)
    # Whole tokens first: some decoders turn all bytes before an unfinished character into U+FFFD, too.
    while cut and kept and len(piece := tokenizer.token_bytes(ids[kept - 1])) <= cut:
        kept, cut = kept - 1, cut - len(piece)
    text = tokenizer.decode(ids[:kept])
    return text[:-1] if cut and text.endswith(_REPLACEMENT) else text


def _unfinished_bytes(data: bytes) -> int:
    """Number of bytes at the end of `data` that begin a character without finishing it."""
    for count in range(min(_LONGEST - 1, len(data)), 0, -1):
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            if decoder.decode(data[-count:]) == "":
                return count
        except UnicodeDecodeError:
            continue
    return 0


class TextStream:
    """Turns ids into text piece by piece; the pieces joined equal the text of all ids, as `decode_whole` gives it.

    Text is held back while its end may be the first bytes of a character that the next token completes. Decoders may
    treat the start of a text differently (SentencePiece drops a space), so each id is decoded with those before it.
    """

    def __init__(self, tokenizer: Tokenizer, before: list[int] | None = None) -> None:
        """
        Args:
            before: ids before the text. Their own text is not returned, but a character that they only begin is.
        """
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._returned = 0  # characters of the text of `_ids` that were returned
        self._held = 0  # ids since the last one that completed a character
        for token_id in before or ():
            self.put(token_id)

    def put(self, token_id: int) -> str:
        """Add an id; returns the new text that later ids cannot change, which may be empty."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        doubtful = min(len(text) - len(text.rstrip(_REPLACEMENT)), _UNFINISHED)
        self._held = self._held + 1 if doubtful else 0
        certain = self._returned if doubtful and self._held < _GIVE_UP else len(text) - doubtful
        new = text[self._returned : certain]
        self._returned = max(self._returned, certain)
        if len(self._ids) > (2 * _WINDOW if doubtful else _WINDOW):
            self._shorten(text)
        return new

    def end(self) -> str:
        """The text held back so far, without a last character that was cut; other broken bytes are U+FFFD."""
        text = decode_whole(self._tokenizer, self._ids)
        new, self._returned = text[self._returned :], len(text)
        return new

    def _shorten(self, text: str) -> None:
        """Drop leading ids if the remaining ids alone decode to the end of `text`, that is, not within a character."""
        for cut in range(_WINDOW // 2, 0, -1):
            rest = self._tokenizer.decode(self._ids[cut:])
            gone = len(text) - len(rest)
            # The last characters may be U+FFFD that still change, so a match of these alone does not confirm the cut.
            if len(rest) > _UNFINISHED and text.endswith(rest):
                self._ids, self._returned = self._ids[cut:], self._returned - gone
                return
