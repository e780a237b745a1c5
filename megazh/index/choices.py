"""Choices of recipes and of the command line, apart from what implements them: that imports numba, which is slow."""

from dataclasses import dataclass
from enum import StrEnum


class Packing(StrEnum):
    """How documents are packed into samples."""

    CONCAT = "concat"
    """Documents continue in the next sample; every sample is full."""
    BEST_FIT = "best_fit"
    """A document that fits is never cut; a longer one becomes full samples and a remainder."""


@dataclass(frozen=True)
class Cut:
    """Cuts of the pieces of documents in a sample into segments."""

    length: int
    """Largest number of tokens per segment, counted from the start of each piece."""
    keeps_labels: bool = True
    """Whether the last token of a segment that ends at a cut keeps its label, the next token of the document."""
