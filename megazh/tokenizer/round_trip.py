"""Whether ids decode to the text that they were made from."""

from collections.abc import Sequence
from dataclasses import dataclass

from megazh.tokenizer.base import Tokenizer

_BEFORE, _AFTER = 10, 20  # characters of an example before and after the first difference


@dataclass
class RoundTrip:
    """Comparison of documents with the text that their ids decode to."""

    documents: int = 0
    """Documents compared."""
    normalized: int = 0
    """Documents that come back as the tokenizer normalizes them (NFC, for example), not letter for letter."""
    differ: int = 0
    """Documents that come back otherwise."""
    example: str = ""
    """The first difference: the text around it, and what it becomes."""

    def add(self, text: str, ids: Sequence[int], tokenizer: Tokenizer) -> None:
        """Compare a document. A space that the tokenizer puts before each text is no difference."""
        found = tokenizer.decode(ids)
        self.documents += 1
        if text in (found, found.removeprefix(" ")):
            return
        normal = tokenizer.normalize(text)
        if normal.removeprefix(" ") == found.removeprefix(" ") and normal.count("\n") == text.count("\n"):
            self.normalized += 1
            return
        self.differ += 1
        if not self.example:
            same = next(
                (at for at, (a, b) in enumerate(zip(text, found, strict=False)) if a != b), min(len(text), len(found))
            )
            begin, end = max(0, same - _BEFORE), same + _AFTER
            self.example = f"{text[begin:end]!r} becomes {found[begin:end]!r}"

    def describe(self) -> str:
        """One line about the comparison."""
        if not self.documents:
            return "no document: none was encoded in this run"
        if self.differ:
            return f"{self.differ:,} of {self.documents:,} samples do not decode to their text: {self.example}"
        if self.normalized:
            return f"to the text; {self.normalized:,} of {self.documents:,} samples as the tokenizer normalizes it"
        return f"to the text, letter for letter (samples: {self.documents:,})"
