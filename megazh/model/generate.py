"""Text generation token by token, with a cache of the keys and values of earlier tokens."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from megazh.errors import DataError, UsageError
from megazh.model.attention import attend_with_mask
from megazh.model.config import ModelConfig
from megazh.model.decoder import Decoder
from megazh.model.dropout import Dropout
from megazh.model.rope import Rotary


class KeyValueCache:
    """Keys and values of one sequence, for the blocks that use this cache."""

    def __init__(self, config: ModelConfig, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make an empty cache.

        Args:
            config: shape of the model.
            capacity: length of the longest sequence, in tokens.
            device, dtype: device and dtype of the keys and values.
        """
        self._shape = (1, capacity, config.kv_heads, config.head_size)
        self._device, self._dtype = device, dtype
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rotary = Rotary(config)
        self.length = 0
        """Number of tokens in the cache."""

    def extend(self, count: int) -> "CachedAttention":
        """Prepare the attention of the next `count` tokens, which adds their keys and values to the cache.

        Raises:
            UsageError: the tokens exceed the capacity.
        """
        if self.length + count > self._shape[1]:
            raise UsageError(
                f"{self.length + count} tokens, but the cache holds only {self._shape[1]}; give it a larger capacity"
            )
        positions = torch.arange(self.length, self.length + count, device=self._device)
        self.length += count
        cos, sin = self._rotary(positions[None])
        return CachedAttention(self, cos, sin, positions)

    def write(
        self, layer: int, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values of block `layer` to the cache.

        Args:
            layer: number of the block, from 0.
            positions: (n,) integers, position of each new token.
            key, value: (1, n, kv_heads, head_dim).

        Returns:
            All keys and values of the block, (1, length, kv_heads, head_dim) each.
        """
        if layer not in self._layers:
            empty = torch.empty(2, *self._shape, device=self._device, dtype=self._dtype)
            self._layers[layer] = (empty[0], empty[1])
        keys, values = self._layers[layer]
        keys[:, positions], values[:, positions] = key, value
        return keys[:, : self.length], values[:, : self.length]


class CachedAttention:
    """Causal attention of new tokens to the cached tokens and to each other; an `attention.Attend`."""

    dropout: Dropout | None = None

    def __init__(self, cache: KeyValueCache, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
        self.cos, self.sin = cos, sin
        self._cache, self._positions = cache, positions
        cached_positions = torch.arange(cache.length, device=positions.device)
        self._mask = (cached_positions[None, :] <= positions[:, None])[None, None]

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `attention.Attend`."""
        keys, values = self._cache.write(layer, self._positions, key, value)
        return attend_with_mask(query, keys, values, self._mask)


Forward = Callable[[list[int]], torch.Tensor]
"""Function from the next tokens of a sequence to the logits that follow the last of them, (vocab,) fp32."""


def cached_forward(model: Decoder, capacity: int) -> Forward:
    """Make a `Forward` that feeds one sequence to `model` piece by piece, with a cache for `capacity` tokens."""
    weight = model.head.weight
    cache = KeyValueCache(model.config, capacity, weight.device, weight.dtype)

    @torch.no_grad()
    def forward(tokens: list[int]) -> torch.Tensor:
        hidden = model(torch.tensor([tokens], device=weight.device), cache.extend(len(tokens)))
        return model.logits(hidden[0, -1])

    return forward


def uncached_forward(model: Decoder) -> Forward:
    """Like `cached_forward`, but recomputes all tokens in each call; the reference for the cache."""
    weight = model.head.weight
    tokens: list[int] = []

    @torch.no_grad()
    def forward(new: list[int]) -> torch.Tensor:
        tokens.extend(new)
        cache = KeyValueCache(model.config, len(tokens), weight.device, weight.dtype)
        hidden = model(torch.tensor([tokens], device=weight.device), cache.extend(len(tokens)))
        return model.logits(hidden[0, -1])

    return forward


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

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"temperature {self.temperature}: expected at least 0")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k}: expected at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}: expected more than 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise UsageError(f"repetition_penalty {self.repetition_penalty}: expected more than 0")


def draw(
    logits: torch.Tensor,
    options: SamplingOptions,
    seen: Sequence[int],
    tokenizer_size: int,
    generator: torch.Generator,
) -> int:
    """Sample the next token.

    Args:
        logits: (vocab,) fp32.
        options: see `SamplingOptions`.
        seen: tokens to which the repetition penalty applies.
        tokenizer_size: number of ids in the tokenizer; ids from this on are padding of the vocabulary, never sampled.
        generator: a generator on the CPU.

    Raises:
        DataError: a logit is NaN, or the largest one is infinite.
    """
    logits = logits[:tokenizer_size].cpu().clone()
    if not logits.max().isfinite():  # NaN if any logit is
        raise DataError("the model's logits are not finite: training has diverged; use an earlier checkpoint")
    if seen and options.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(seen)))
        old = logits[ids]
        logits[ids] = torch.where(old > 0, old / options.repetition_penalty, old * options.repetition_penalty)
    if options.temperature == 0:
        return int(logits.argmax())
    # The largest logit becomes 0, so that a tiny temperature cannot make it infinite.
    logits = (logits - logits.max()) / options.temperature
    if 0 < options.top_k < len(logits):
        kept = logits.topk(options.top_k)  # by index, not by value: logits in bf16 are often equal
        logits = torch.full_like(logits, -torch.inf).scatter_(0, kept.indices, kept.values)
    if options.top_p < 1:
        sorted_logits, order = logits.sort(descending=True, stable=True)
        probabilities = sorted_logits.softmax(0)
        before = probabilities.cumsum(0) - probabilities
        logits[order[before >= options.top_p]] = -torch.inf
    return int(torch.multinomial(logits.softmax(0), 1, generator=generator))


def generate(
    forward: Forward,
    prompt: Sequence[int],
    count: int,
    options: SamplingOptions,
    tokenizer_size: int,
    end_ids: Collection[int],
    seed: int,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, as they are sampled, up to one of `end_ids`, or `count` tokens.

    The token that ends the text is not yielded.

    Args:
        forward: called with the prompt, then with each sampled token; see `cached_forward`.
        prompt: at least one token id.
        count: largest number of tokens to generate.
        options: see `SamplingOptions`.
        tokenizer_size: see `draw`.
        end_ids: token ids that end the text.
        seed: seed of the random numbers.

    Raises:
        UsageError: the prompt is empty.
        DataError: as `draw`.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    if not tokens:
        raise UsageError("the prompt is empty: give at least one character")
    new = tokens
    for _ in range(count):
        token = draw(forward(new), options, tokens, tokenizer_size, generator)
        if token in end_ids:
            return
        yield token
        tokens = [*tokens, token]
        new = [token]
