"""Text of tokens as they come, never a part of a character."""

from megazh.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_LONGEST = 3
"""Replacements at the end that the next token may still turn into a character: it has at most four bytes."""
_PATIENCE = 8
"""So many tokens without the end of a character are no character; some decoders doubt a whole run of bytes."""
_WINDOW = 32
"""Ids that are decoded again for each new one, twice as many amid garbage: time must not grow with the square."""


class TextStream:
    """Turns ids into text piece by piece; what is put together equals the text of all ids at once.

    Text is held back while its end may be the first bytes of a character that the next token completes. A decoder
    may treat the start of a text differently (SentencePiece drops a space), so ids in front are decoded along.
    """

    def __init__(self, tokenizer: Tokenizer, before: list[int] | None = None) -> None:
        """`before`: ids in front of the text, which is not repeated; but a character that they only begin is told."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0  # characters of the window's text that are out
        self._held = 0  # ids since the last one that ended a character
        for token_id in before or ():
            self.put(token_id)

    def put(self, token_id: int) -> str:
        """The text that is certain now, perhaps none."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        doubtful = min(len(text) - len(text.rstrip(_REPLACEMENT)), _LONGEST)
        self._held = self._held + 1 if doubtful else 0
        certain = self._told if doubtful and self._held < _PATIENCE else len(text) - doubtful
        new = text[self._told : certain]
        self._told = max(self._told, certain)
        if len(self._ids) > (2 * _WINDOW if doubtful else _WINDOW):
            self._shorten(text)
        return new

    def end(self) -> str:
        """What was held back; bytes that make no character stand as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        new, self._told = text[self._told :], len(text)
        return new

    def _shorten(self, text: str) -> None:
        """Drop ids in front, where the rest alone gives the end of `text`: not within a character."""
        for cut in range(_WINDOW // 2, 0, -1):
            rest = self._tokenizer.decode(self._ids[cut:])
            gone = len(text) - len(rest)
            # What lies within the last replacements may yet change, and says nothing about the cut.
            if len(rest) > _LONGEST and text.endswith(rest):
                self._ids, self._told = self._ids[cut:], self._told - gone
                return
