"""What a run records in `metrics.jsonl`."""

import math
from dataclasses import dataclass
from typing import Self


def perplexity(loss: float) -> float:
    """e to the mean cross entropy in nats per token; inf where no float can hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class CorpusValidation:
    """The part of a validation that one corpus has."""

    loss: float
    """Mean cross entropy in nats per token."""
    perplexity: float
    """e to the loss."""
    bits_per_byte: float
    """Bits per UTF-8 byte of text."""
    samples: int
    """Samples evaluated."""

    @classmethod
    def of(cls, loss: float, bits_per_byte: float, samples: int) -> Self:
        """The figures of a mean loss."""
        return cls(loss, perplexity(loss), bits_per_byte, samples)
