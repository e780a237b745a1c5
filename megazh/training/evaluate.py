"""Loss on held-out documents, and continuations of prompts, through the pipeline as it stands."""

import math
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
"""How continuations are drawn during training."""


@dataclass(frozen=True)
class Validation:
    """What a pass over held-out samples gives."""

    loss: float
    """Nats a token."""
    bits_per_byte: float
    """Bits that the model needs for a byte of text, whatever the tokenizer."""


class Validator:
    """Validates on the same samples each time.

    Bits per byte are the loss summed over all labels, end-of-document tokens included, divided by ln 2 and by the
    UTF-8 bytes that the labels stand for.
    """

    def __init__(
        self, samples: ValidationSamples, layout: Layout, replica: int, limit: int | None, tokenizer: Tokenizer
    ) -> None:
        self._feed = ValidationFeed(samples, layout, replica, limit)
        self.samples = len(self._feed.numbers)
        """How many it validates on."""
        self._bytes = self._count_bytes(samples, tokenizer)

    def _count_bytes(self, samples: ValidationSamples, tokenizer: Tokenizer) -> int:
        counts: npt.NDArray[np.int64] = np.zeros(tokenizer.vocab_size, np.int64)
        for number in self._feed.numbers:
            labels = samples.sample(number).labels
            counts += np.bincount(labels[labels >= 0], minlength=tokenizer.vocab_size)
        return sum(int(counts[token]) * len(tokenizer.token_bytes(int(token))) for token in np.flatnonzero(counts))

    def __call__(self, engine: Any) -> Validation:
        """Validate; all ranks call it."""
        loss = float(engine.eval_batch(iter(self._feed), num_micro_batches=self._feed.micro_batches))
        return Validation(loss, loss * self._feed.valid / math.log(2) / max(self._bytes, 1))


def sample_text(engine: Any, tokenizer: Tokenizer, prompt: str, count: int, seed: int) -> str:
    """A continuation of `prompt`, of at most `count` tokens; all ranks call it and get the same."""
    ids = tokenizer.encode(prompt)
    module = engine.module
    module.eval()
    forward = pipeline_forward(module, len(ids) + count)
    tokens = generate(forward, ids, count, SAMPLING, tokenizer.vocab_size, tokenizer.eod_id, seed)
    text = tokenizer.decode([*ids, *tokens])
    module.train()
    return text[len(tokenizer.decode(ids)) :]
