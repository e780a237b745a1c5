"""Choices of the command line, apart from the modules that implement them: those import numba, which is slow."""

from enum import StrEnum


class Packing(StrEnum):
    """How documents are packed into samples."""

    CONCAT = "concat"
    """Documents continue in the next sample; every sample is full."""
    BEST_FIT = "best_fit"
    """A document that fits is never cut; a longer one becomes full samples and a remainder."""
