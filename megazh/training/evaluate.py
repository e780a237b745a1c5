"""Validation loss and sampled continuations, computed by the training pipeline itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megazh.index.mixture import ValidationSamples
from megazh.model.generate import SamplingOptions, generate
from megazh.pipeline.generate import pipeline_forward
from megazh.tokenizer import Tokenizer
from megazh.training.feed import ValidationFeed
from megazh.training.layout import Layout

SAMPLING = SamplingOptions(temperature=0.7, top_k=50, top_p=0.95)
"""Sampling options of continuations during training."""


@dataclass(frozen=True)
class Validation:
    """Result of a pass over the held-out samples."""

    loss: float
    """Mean loss in nats per token."""
    bits_per_byte: float
    """Bits per byte of text, which does not depend on the tokenizer."""


class Validator:
    """Validates on the same samples each time.

    Bits per byte are the loss summed over all labels (end-of-document tokens included), divided by ln 2 and by the
    number of UTF-8 bytes of text that the labels stand for: the bytes of their tokens, times the bytes of text for each
    byte of a token in the whole corpus (see `count_bytes`), which is 1 unless the tokenizer changes or drops text.

    Args:
        samples: all held-out samples.
        layout: the arrangement of the ranks.
        replica: number of this rank's replica.
        limit: largest number of samples to use; None: all.
        tokenizer: gives the bytes of each token.
    """

    def __init__(
        self, samples: ValidationSamples, layout: Layout, replica: int, limit: int | None, tokenizer: Tokenizer
    ) -> None:
        self._feed = ValidationFeed(samples, layout, replica, limit)
        self.samples = len(self._feed.numbers)
        """Number of samples in a pass."""
        self._bytes = count_bytes(samples, self._feed.numbers, tokenizer)

    def __call__(self, engine: Any) -> Validation:
        """Validate. All ranks call it."""
        loss = float(engine.eval_batch(iter(self._feed), num_micro_batches=self._feed.micro_batches))
        return Validation(loss, loss * self._feed.valid / math.log(2) / max(self._bytes, 1))


def count_bytes(samples: ValidationSamples, numbers: Sequence[int], tokenizer: Tokenizer) -> float:
    """Number of UTF-8 bytes of text that the labels of the samples `numbers` stand for.

    Tokens of a byte-level BPE are bytes of text. Others stand for text that was normalized, and may have lost blanks
    between words or unknown characters. For these, the bytes of the tokens are scaled by (bytes of text) / (bytes of
    tokens) of their corpus, both counted when it was built: the sum over a whole corpus is the size of its text.
    """
    sizes: npt.NDArray[np.int64] | None = None
    total = 0.0
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
        total += size * scale
    return total


def sample_text(engine: Any, tokenizer: Tokenizer, prompt: str, count: int, seed: int) -> str:
    """Sample a continuation of `prompt`, at most `count` tokens long. All ranks call it and get the same text."""
    ids = tokenizer.encode(prompt)
    module = engine.module
    module.eval()
    forward = pipeline_forward(module, len(ids) + count)
    tokens = generate(forward, ids, count, SAMPLING, tokenizer.vocab_size, tokenizer.eod_id, seed)
    text = tokenizer.decode([*ids, *tokens])
    module.train()
    return text[len(tokenizer.decode(ids)) :]
