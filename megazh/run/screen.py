"""Text for a terminal of limited width: wide characters count twice, and colours not at all."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from megazh.run.lines import one_line

PLAIN, BOLD, DIM, BLUE, GREEN, YELLOW, RED = "", "1", "2", "34", "32", "33", "31"
"""Styles, as terminals number them (ECMA-48, select graphic rendition)."""

ELLIPSIS = "…"
_LEAST_FILLED = 0.7
"""Share of a line that is filled where it is broken at a gap."""


class Span(NamedTuple):
    """A piece of a line."""

    text: str
    style: str = PLAIN


Line = Sequence[Span]


def width_of(text: str) -> int:
    """Columns that a terminal shows a text in."""
    return sum(map(_columns, text))


def clip(text: str, width: int) -> str:
    """A text in at most `width` columns; what is cut off is shown by an ellipsis."""
    if width_of(text) <= width:
        return text
    return _fitting(text, max(0, width - 1)) + ELLIPSIS * (width > 0)


def wrapped(text: str, width: int, most: int) -> list[str]:
    """A text on lines of `width` columns, at most `most` of them; control characters and line breaks become spaces."""
    lines: list[str] = []
    rest = one_line(text)
    while rest and len(lines) < most - 1:
        line = _fitting(rest, width)
        if len(line) < len(rest) and rest[len(line)] != " " and line.rfind(" ") > len(line) * _LEAST_FILLED:
            line = line[: line.rindex(" ")]  # between words; Chinese has no gaps, and breaks anywhere
        if not line:  # narrower than a character
            break
        lines.append(line)
        rest = rest[len(line) :].lstrip()
    return [*lines, clip(rest, width)] if rest else lines


def render(line: Line, width: int, colours: bool) -> str:
    """A line as text in at most `width` columns, with or without the codes of its styles."""
    parts, left = [], width
    for text, style in line:
        shown = clip(text, left)
        left -= width_of(shown)
        parts.append(f"\x1b[{style}m{shown}\x1b[0m" if colours and style and shown else shown)
    return "".join(parts)


def beside(left: Iterable[Line], right: Iterable[Line], width: int, gap: int = 2) -> Iterator[Line]:
    """Two blocks of as many lines side by side; the left one is `width` columns wide."""
    for one, other in zip(left, right, strict=True):
        room = width - sum(width_of(span.text) for span in one) + gap
        yield [*one, Span(" " * room), *other]


def _fitting(text: str, width: int) -> str:
    """The longest begin of a text that fits."""
    for number, each in enumerate(text):
        width -= _columns(each)
        if width < 0:
            return text[:number]
    return text


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
