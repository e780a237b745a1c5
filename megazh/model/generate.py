"""Text from a model: one token after the other, with the keys and values of earlier ones kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megazh.errors import DataError, UsageError
from megazh.model.attention import attend_with_mask
from megazh.model.config import ModelConfig
from megazh.model.decoder import Decoder
from megazh.model.rope import Rotary


class KeyValueCache:
    """Keys and values of one sequence, for some blocks of a model."""

    def __init__(self, config: ModelConfig, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        """`capacity`: the longest sequence, in tokens."""
        self._shape = (1, capacity, config.kv_heads, config.head_size)
        self._device, self._dtype = device, dtype
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rotary = Rotary(config)
        self.length = 0
        """Tokens that are held."""

    def extend(self, count: int) -> "CachedAttention":
        """The attention of the next `count` tokens, whose keys and values are added.

        Raises:
            UsageError: more than the capacity.
        """
        if self.length + count > self._shape[1]:
            raise UsageError(f"{self.length + count} tokens, and the cache holds {self._shape[1]}")
        positions = torch.arange(self.length, self.length + count, device=self._device)
        self.length += count
        cos, sin = self._rotary(positions[None])
        return CachedAttention(self, cos, sin, positions)

    def write(
        self, layer: int, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (1, n, kv_heads, head_dim) keys and values of block `layer`; returns all that it has."""
        if layer not in self._layers:
            empty = torch.empty(2, *self._shape, device=self._device, dtype=self._dtype)
            self._layers[layer] = (empty[0], empty[1])
        keys, values = self._layers[layer]
        keys[:, positions], values[:, positions] = key, value
        return keys[:, : self.length], values[:, : self.length]


class CachedAttention:
    """Attention of new tokens to themselves and to all that the cache holds; see `attention.Attend`."""

    def __init__(self, cache: KeyValueCache, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
        self.cos, self.sin = cos, sin
        self._cache, self._positions = cache, positions
        places = torch.arange(cache.length, device=positions.device)
        self._mask = (places[None, :] <= positions[:, None])[None, None]

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `attention.Attend`."""
        keys, values = self._cache.write(layer, self._positions, key, value)
        return attend_with_mask(query, keys, values, self._mask)


Forward = Callable[[list[int]], torch.Tensor]
"""The next tokens of a sequence to the (vocab,) fp32 logits behind the last of them."""


def cached_forward(model: Decoder, capacity: int) -> Forward:
    """Feed one sequence to `model` piece by piece, with a cache for `capacity` tokens."""
    weight = model.head.weight
    cache = KeyValueCache(model.config, capacity, weight.device, weight.dtype)

    @torch.no_grad()
    def forward(tokens: list[int]) -> torch.Tensor:
        hidden = model(torch.tensor([tokens], device=weight.device), cache.extend(len(tokens)))
        return model.logits(hidden[0, -1])

    return forward


def uncached_forward(model: Decoder) -> Forward:
    """Like `cached_forward`, but computes all tokens again each time; what the cache must equal."""
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
    """How the next token is drawn."""

    temperature: float = 0.8
    """0 takes the most likely one (greedy)."""
    top_k: int = 0
    """Only the so many most likely ones; 0: all."""
    top_p: float = 1.0
    """Only the most likely ones that together have this probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens that are there already are divided by it, or multiplied where negative (arXiv 1909.05858)."""

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
    """The next token.

    Args:
        logits: (vocab,) fp32.
        seen: tokens that the repetition penalty concerns.
        tokenizer_size: ids from here on are padding of the vocabulary, and never drawn.
        generator: on the CPU.
    """
    logits = logits[:tokenizer_size].cpu().clone()
    if logits.isnan().any():
        raise DataError("the model's logits are not numbers: it has diverged; take an earlier checkpoint")
    if seen and options.repetition_penalty != 1.0:
        there = torch.tensor(sorted(set(seen)))
        found = logits[there]
        logits[there] = torch.where(found > 0, found / options.repetition_penalty, found * options.repetition_penalty)
    if options.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / options.temperature  # the largest is 0: no temperature makes it infinite
    if 0 < options.top_k < len(logits):
        kept = logits.topk(options.top_k)  # by place: logits in bf16 are often equal
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
    end_id: int | None,
    seed: int,
) -> Iterator[int]:
    """Tokens behind a prompt, as they are drawn, until `end_id` (not given out) or `count` of them.

    Args:
        forward: takes the prompt first, then each token drawn; see `cached_forward`.
        prompt: at least one id.
        tokenizer_size: see `draw`.
        end_id: ends the text; None: nothing does.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    if not tokens:
        raise UsageError("the prompt is empty: give at least one character")
    new = tokens
    for _ in range(count):
        token = draw(forward(new), options, tokens, tokenizer_size, generator)
        if token == end_id:
            return
        yield token
        tokens = [*tokens, token]
        new = [token]
