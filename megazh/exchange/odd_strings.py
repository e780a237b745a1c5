"""Texts on which two tokenizers differ sooner than on ordinary text; for comparing their ids."""

import random
from collections.abc import Iterator, Sequence

from megazh.tokenizer import Tokenizer
from megazh.tokenizer.encoders import PROBES

_RANGES = (
    (0x00, 0x7F),  # ASCII with its control characters
    (0x80, 0x24F),  # Latin
    (0x300, 0x36F),  # combining marks
    (0x370, 0x5FF),  # Greek, Cyrillic, Hebrew
    (0x900, 0x97F),  # Devanagari
    (0x1100, 0x11FF),  # Hangul, decomposed
    (0x2000, 0x206F),  # spaces, line separators, marks of direction
    (0x2150, 0x24FF),  # number forms, arrows, circled letters
    (0x2580, 0x259F),  # blocks, among them the U+2581 of SentencePiece
    (0x3000, 0x30FF),  # Chinese punctuation, kana
    (0x4E00, 0x9FFF),  # Chinese characters
    (0xAC00, 0xD7A3),  # Hangul
    (0xF900, 0xFFEF),  # compatibility and full-width forms
    (0x1F300, 0x1FAFF),  # emoji
    (0x20000, 0x2A6DF),  # rare Chinese characters
)
_BLANKS = (" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u3000", "\u00a0", "\u200b", " \n ")
_LONGEST = 12  # parts of a text


def odd_strings(tokenizer: Tokenizer, count: int, without: Sequence[str], seed: int = 0) -> list[str]:
    """Make `count` texts, the same for the same tokenizer and seed.

    They are made of the tokenizer's own pieces in an order that text never has, of characters from many scripts, of
    blanks, digits, repetitions, and of parts of each other.

    Args:
        tokenizer: the tokenizer whose pieces are used.
        count: number of texts.
        without: strings that no text may contain, such as the control tokens.
        seed: seed of the random choice.
    """
    draw = random.Random(seed)
    pieces = list(_pieces(tokenizer))
    found = [text for text in PROBES if not _holds(text, without)][:count]
    while len(found) < count:
        text = "".join(_part(draw, pieces) for _ in range(draw.randint(1, _LONGEST)))
        if not _holds(text, without):
            found.append(text)
    return found


def _pieces(tokenizer: Tokenizer) -> Iterator[str]:
    """The pieces that are whole characters."""
    for token_id in range(tokenizer.vocab_size):
        try:
            text = tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            continue
        if text:
            yield text


def _part(draw: random.Random, pieces: Sequence[str]) -> str:
    kind = draw.random()
    if kind < 0.45:
        return draw.choice(pieces)
    if kind < 0.55:
        piece = draw.choice(pieces)
        return piece[: draw.randint(1, len(piece))]
    if kind < 0.65:
        return draw.choice(pieces) * draw.randint(2, 5)
    if kind < 0.8:
        first, last = draw.choice(_RANGES)
        return "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 4)))
    if kind < 0.92:
        return draw.choice(_BLANKS)
    return str(draw.randrange(10 ** draw.randint(1, 9)))


def _holds(text: str, without: Sequence[str]) -> bool:
    return any(each in text for each in without)
