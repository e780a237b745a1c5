"""Fonts for text in pictures: one that has the Chinese characters of a text, or a plain word that there is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.font_manager import FontEntry

BASE = "DejaVu Sans"
"""The font that comes with matplotlib; it has no Chinese."""

PACKAGE = "fonts-noto-cjk"
"""Package of Debian and Ubuntu with fonts for Chinese, Japanese and Korean."""

# Begin of the names of fonts that have Chinese; the first one that is installed is taken.
_CHINESE = (
    "Noto Sans CJK", "Noto Sans SC", "Source Han Sans", "WenQuanYi", "Microsoft YaHei", "PingFang", "Hiragino Sans GB",
    "SimHei", "Heiti", "Noto Serif CJK", "Source Han Serif", "Droid Sans Fallback", "AR PL", "SimSun",
    "Arial Unicode MS", "Unifont",
)  # fmt: skip


@dataclass(frozen=True)
class Fonts:
    """The fonts of a picture."""

    families: tuple[str, ...]
    """Names of fonts; each character is drawn with the first that has it."""
    missing: frozenset[str] = frozenset()
    """Characters of the text that none of them has."""

    def drawable(self, text: str) -> str:
        """Text in which a character that no font has is written as its number, such as <U+4E00>."""
        return "".join(f"<U+{ord(each):04X}>" if each in self.missing else each for each in text)

    @property
    def note(self) -> str:
        """A line for the user where characters are missing; empty where none are."""
        if not self.missing:
            return ""
        shown = "".join(sorted(self.missing)[:8])
        return (
            f"no font on this machine has {shown}: a PNG shows such characters as <U+4E00>, and an SVG leaves them to "
            f"the fonts of whoever looks at it; install the package {PACKAGE}, then draw again"
        )


def fonts_for(texts: Iterable[str]) -> Fonts:
    """Choose the fonts that draw some texts, among those that are installed on this machine."""
    from matplotlib import font_manager

    needed = {each for text in texts for each in text if not each.isspace()}
    needed -= _characters(font_manager.findfont(BASE))
    if not needed:
        return Fonts((BASE,))
    entries = _installed()
    families = [BASE]
    for begin in _CHINESE:
        for entry in sorted((entry for entry in entries if entry.name.startswith(begin)), key=_plainness):
            if found := needed & _characters(entry.fname):
                families.append(entry.name)
                needed -= found
                break
        if not needed:
            break
    return Fonts(tuple(families), frozenset(needed))


def _plainness(entry: FontEntry) -> tuple[bool, bool, bool, int, str]:
    """Order of the fonts of a maker: simplified Chinese, else the first face of a collection; of normal weight."""
    weight = entry.weight if isinstance(entry.weight, int) else 400
    name = entry.name
    return "SC" not in name, "JP" not in name, "Mono" in name, abs(weight - 400), name


def _installed() -> list[FontEntry]:
    """All fonts of this machine, also those that were installed after matplotlib wrote its list of them."""
    from matplotlib import font_manager

    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            try:
                font_manager.fontManager.addfont(path)
            except (OSError, RuntimeError, ValueError):  # no font that matplotlib reads
                continue
    return list(font_manager.fontManager.ttflist)


def _characters(path: str | Path) -> set[str]:
    """The characters that a font file has; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return {chr(code) for code in FT2Font(str(path)).get_charmap()}
    except (OSError, RuntimeError):
        return set()
