"""The held-out samples of a run, and what their losses say: by corpus and together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megazh.index.mixture import ValidationSamples
from megazh.run.records import CorpusValidation
from megazh.tokenizer import Tokenizer
from megazh.training.feed import ValidationFeed
from megazh.training.layout import Layout


@dataclass(frozen=True)
class Validation:
    """Result of a pass over the held-out samples."""

    loss: float
    """Mean loss in nats per token."""
    bits_per_byte: float
    """Bits per byte of text, which does not depend on the tokenizer."""
    corpora: dict[str, CorpusValidation]
    """The same of each corpus that has samples in the pass, by its name in the manifest."""


class HeldOut:
    """The samples of a pass, the same each time, with their labels and bytes counted by corpus.

    Bits per byte are the loss summed over all labels (end-of-document tokens included), divided by ln 2 and by the
    number of UTF-8 bytes of text that the labels stand for (see `count_bytes`).

    Args:
        samples: all held-out samples.
        layout: the arrangement of the ranks.
        replica: number of this rank's replica.
        limit: largest number of samples to use, evenly spread over all; None: all.
        tokenizer: gives the bytes of each token.
    """

    def __init__(
        self, samples: ValidationSamples, layout: Layout, replica: int, limit: int | None, tokenizer: Tokenizer
    ) -> None:
        self.feed = ValidationFeed(samples, layout, replica, limit)
        self.samples = len(self.feed.numbers)
        """Number of samples in a pass."""
        self._names = samples.names
        self._samples, self._labels = [0] * len(self._names), [0] * len(self._names)
        for number in self.feed.numbers:
            corpus = samples.corpus_of(number)
            self._samples[corpus] += 1
            self._labels[corpus] += samples.valid_labels(number)
        self._bytes = count_bytes(samples, self.feed.numbers, tokenizer)

    def result(self, losses: list[torch.Tensor], device: torch.device) -> Validation:
        """The result of a pass. All ranks call it, and all get the same.

        Sums are in fp64, and each micro-batch holds samples of one corpus: how many samples that is changes nothing
        beyond the rounding of their fp32 losses.

        Args:
            losses: this rank's losses of the feed's micro-batches in order, scalars as the feed scales them; empty on
                ranks without the head.
            device: where ranks exchange tensors.
        """
        own = [0.0] * len(self._names)
        if losses:
            for corpus, loss in zip(self.feed.corpora, torch.stack(losses).double().tolist(), strict=True):
                own[corpus] += loss
        total = torch.tensor(own, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        sums = [loss * self.feed.valid for loss in total.tolist()]
        corpora = {}
        for number, name in enumerate(self._names):
            if self._samples[number]:
                found = _figures(sums[number], self._labels[number], self._bytes[number])
                corpora[name] = CorpusValidation.of(*found, self._samples[number])
        return Validation(*_figures(sum(sums), sum(self._labels), sum(self._bytes)), corpora)


def _figures(nats: float, labels: int, size: float) -> tuple[float, float]:
    """Nats per token and bits per byte."""
    return nats / max(labels, 1), nats / math.log(2) / max(size, 1)


def count_bytes(samples: ValidationSamples, numbers: Sequence[int], tokenizer: Tokenizer) -> list[float]:
    """Number of UTF-8 bytes of text that the labels of the samples `numbers` stand for, by corpus (`samples.names`).

    Tokens of a byte-level BPE are bytes of text. Others stand for text that was normalized, and may have lost blanks
    between words or unknown characters. For these, the bytes of the tokens are scaled by (bytes of text) / (bytes of
    tokens) of their corpus, both counted when it was built: the sum over a whole corpus is the size of its text.
    """
    sizes: npt.NDArray[np.int64] | None = None
    found = [0.0] * len(samples.names)
    for number in numbers:
        if sizes is None:
            sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)], np.int64)
        labels = samples.sample(number).labels
        size = int(sizes[labels[labels >= 0]].sum())
        corpus = samples.index_of(number).metadata
        coverage = None if corpus is None else corpus.coverage
        scale = 1.0
        if corpus is not None and coverage is not None and coverage.token_bytes:
            scale = corpus.text_bytes / coverage.token_bytes
        found[samples.corpus_of(number)] += size * scale
    return found
