"""Sampling of the next token from logits: penalties, temperature, top-k, top-p, with a seed for each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megazh.errors import DataError, UsageError


@dataclass(frozen=True)
class SamplingOptions:
    """Options for sampling the next token."""

    temperature: float = 0.8
    """Divisor of the logits; 0 always takes the most likely token (greedy)."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 0 samples from all."""
    top_p: float = 1.0
    """Probability mass to sample from: the fewest most likely tokens that together reach it."""
    repetition_penalty: float = 1.0
    """Penalty on earlier tokens: positive logits are divided by it, negative ones multiplied (arXiv 1909.05858)."""
    additive_penalty: float = 0.0
    """Amount by which the logit of a token is lowered for each earlier occurrence of it; the amount fades, see
    `penalty_decay`. 0: none."""
    penalty_decay: float = 0.98
    """Factor of `additive_penalty` per token since the occurrence: the last token counts in full, the one before it
    times this factor, and so on."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"temperature {self.temperature}: expected at least 0")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k}: expected at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}: expected more than 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise UsageError(f"repetition_penalty {self.repetition_penalty}: expected more than 0")
        if not self.additive_penalty >= 0:
            raise UsageError(f"additive_penalty {self.additive_penalty}: expected at least 0")
        if not 0 <= self.penalty_decay <= 1:
            raise UsageError(f"penalty_decay {self.penalty_decay}: expected a number from 0 to 1")


class Sampler:
    """Samples the next token of each row of a batch, on the device of the logits.

    What a row samples depends on its own logits, prompt and seed, not on the other rows.

    Args:
        options: see `SamplingOptions`.
        prompts: tokens of each row so far, to which penalties apply as to those that are sampled.
        tokenizer_size: number of ids in the tokenizer; ids from this on are padding of the vocabulary, never sampled.
        seeds: seed of the random numbers of each row.
    """

    def __init__(
        self, options: SamplingOptions, prompts: Sequence[Sequence[int]], tokenizer_size: int, seeds: Sequence[int]
    ) -> None:
        self._options, self._size = options, tokenizer_size
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._seen = torch.zeros(0)
        self._penalty = torch.zeros(0)
        if options.repetition_penalty != 1.0:
            self._seen = torch.zeros(len(prompts), tokenizer_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, _known(prompt, tokenizer_size)] = True
        if options.additive_penalty:
            self._penalty = torch.zeros(len(prompts), tokenizer_size)
            for row, prompt in enumerate(prompts):
                ids = torch.tensor(prompt, dtype=torch.long)
                amounts = options.additive_penalty * options.penalty_decay ** torch.arange(len(ids) - 1, -1, -1).float()
                inside = ids < tokenizer_size
                self._penalty[row].index_add_(0, ids[inside], amounts[inside])

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Sample a token of each row.

        Args:
            logits: (rows, vocab) fp32.

        Returns:
            (rows,) int64 on the device of the logits; -1 where a logit of the row is NaN or its largest is infinite
            (see `check_sampled`).
        """
        logits = logits[:, : self._size]
        finite = logits.amax(-1).isfinite()  # NaN if any logit is
        tokens = self._sampled(self._penalized(logits))
        self._remember(tokens)
        return torch.where(finite, tokens, -1)

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        options = self._options
        if options.repetition_penalty != 1.0:
            self._seen = self._seen.to(logits.device)
            penalty = options.repetition_penalty
            logits = torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if options.additive_penalty:
            self._penalty = self._penalty.to(logits.device)
            logits = logits - self._penalty
        return logits

    def _remember(self, tokens: torch.Tensor) -> None:
        at = tokens[:, None]
        if self._options.repetition_penalty != 1.0:
            self._seen.scatter_(1, at, True)
        if self._options.additive_penalty:
            self._penalty *= self._options.penalty_decay
            self._penalty.scatter_add_(1, at, self._penalty.new_full(at.shape, self._options.additive_penalty))

    def _sampled(self, logits: torch.Tensor) -> torch.Tensor:
        options = self._options
        if options.temperature == 0:
            return logits.argmax(-1)
        # The largest logit becomes 0, so that a tiny temperature cannot make it infinite.
        logits = (logits - logits.amax(-1, keepdim=True)) / options.temperature
        order: torch.Tensor | None = None
        if 0 < options.top_k < logits.shape[1]:
            logits, order = logits.topk(options.top_k)  # by index, not by value: logits in bf16 are often equal
        elif options.top_p < 1:
            logits, order = logits.sort(descending=True, stable=True)
        probabilities = logits.softmax(-1)
        if options.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= options.top_p, 0.0)
        index = _inverse_of_sums(probabilities, self._uniform(logits.device))
        return (index if order is None else order.gather(1, index)).squeeze(1)

    def _uniform(self, device: torch.device) -> torch.Tensor:
        """A random number of each row, (rows, 1) fp32, at least 0 and below 1: the same on every device."""
        drawn = torch.cat([torch.rand(1, 1, generator=each) for each in self._generators])
        return drawn.to(device, non_blocking=True)


def _known(ids: Sequence[int], size: int) -> list[int]:
    return [each for each in ids if each < size]


def _inverse_of_sums(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index at which the running sum of each row exceeds `uniform` times its total, (rows, 1) int64.

    The sums are in fp64: a number of fp32 below 1 times the total stays below it, so that no index of probability 0
    is taken.
    """
    sums = probabilities.double().cumsum(-1)
    return torch.searchsorted(sums, uniform.double() * sums[:, -1:], right=True).clamp_(max=sums.shape[1] - 1)


def check_sampled(tokens: Sequence[int]) -> None:
    """Check tokens that a `Sampler` returned.

    Raises:
        DataError: one is -1: a logit was not finite.
    """
    if min(tokens) < 0:
        raise DataError("the model's logits are not finite: training has diverged; use an earlier checkpoint")
