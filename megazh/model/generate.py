"""Text generation token by token, with a cache of the keys and values of earlier tokens."""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from megazh.errors import UsageError
from megazh.model.decode import Decoding
from megazh.model.decoder import Decoder
from megazh.model.kv_cache import KeyValueCache
from megazh.model.sampling import Sampler, SamplingOptions, check_sampled

Forward = Callable[[list[int]], torch.Tensor]
"""Function from the next tokens of a sequence to the logits that follow the last of them, (vocab,) fp32."""

_LEAST = 512  # tokens that a `PrefixCache` has memory for


def cached_forward(model: Decoder, capacity: int, graphs: bool | None = None) -> Forward:
    """Make a `Forward` that feeds one sequence to `model` piece by piece, with a cache for `capacity` tokens.

    `graphs`: see `Decoding`.
    """
    decoding = Decoding(model, capacity, 1, graphs)
    return lambda tokens: decoding.append([tokens])[0]


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


class PrefixCache:
    """Feeds one text after another, as the prompts of a chat, and computes only what differs from the text before.

    Args:
        model: the model, in evaluation mode.
        longest: largest number of tokens of a text. Memory is taken for as many as the longest text so far needs, up
            to a power of two.
        graphs: see `Decoding`.
    """

    def __init__(self, model: Decoder, longest: int, graphs: bool | None = None) -> None:
        self._model, self._longest, self._graphs = model, longest, graphs
        self._decoding: Decoding | None = None
        self._capacity = 0
        self._ids: list[int] = []

    def forward(self, capacity: int) -> Forward:
        """Make a `Forward` for another text of up to `capacity` tokens. It ends those that were made before."""
        if capacity > self._capacity:
            self._capacity = max(capacity, min(self._longest, max(_LEAST, 1 << (capacity - 1).bit_length())))
            self._decoding, self._ids = Decoding(self._model, self._capacity, 1, self._graphs), []
        decoding, begun = self._decoding, False
        assert decoding is not None

        def forward(tokens: list[int]) -> torch.Tensor:
            nonlocal begun
            if not begun:
                begun = True
                same = 0  # at most all tokens but the last, whose logits are asked for
                while same < min(len(self._ids), len(tokens) - 1) and self._ids[same] == tokens[same]:
                    same += 1
                decoding.keep(same)
                self._ids, tokens = self._ids[:same], tokens[same:]
            logits = decoding.append([tokens])[0]
            self._ids += tokens
            return logits

        return forward


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
        tokenizer_size: see `Sampler`.
        end_ids: token ids that end the text. Penalties leave them as they are: a chat would hardly end its answers
            otherwise, since the prompt has the end of each earlier one.
        seed: seed of the random numbers.

    Raises:
        UsageError: the prompt is empty.
        DataError: the logits are not finite.
    """
    new = list(prompt)
    if not new:
        raise UsageError("the prompt is empty: give at least one character")
    sampler = Sampler(options, [_without(new, end_ids)], tokenizer_size, [seed])
    for _ in range(count):
        token = int(sampler(forward(new)[None]))
        check_sampled([token])
        if token in end_ids:
            return
        yield token
        new = [token]


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    count: int,
    options: SamplingOptions,
    tokenizer_size: int,
    end_ids: Collection[int],
    seeds: Sequence[int],
    graphs: bool | None = None,
) -> list[list[int]]:
    """The tokens that follow each of several prompts, computed together; each row as `generate` gives it alone.

    Equal up to rounding, that is: matrix products of several rows add up in another order than those of one.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids, at least one each.
        seeds: seed of the random numbers of each prompt.
        graphs: see `Decoding`.
        count, options, tokenizer_size, end_ids: see `generate`; `count` is for each row.

    Raises:
        UsageError: a prompt is empty.
        DataError: the logits are not finite.
    """
    decoding = Decoding(model, max(map(len, prompts)) + count, len(prompts), graphs)
    sampler = Sampler(options, [_without(prompt, end_ids) for prompt in prompts], tokenizer_size, seeds)
    texts: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts))) if count else set()
    logits = decoding.begin(prompts)
    while running:
        tokens = sampler(logits)
        found = tokens.tolist()
        check_sampled([found[row] for row in running])
        for row in sorted(running):
            if found[row] in end_ids:
                running.remove(row)
                continue
            texts[row].append(found[row])
            if len(texts[row]) == count:
                running.remove(row)
        if running:
            logits = decoding.append(tokens.clamp(min=0)[:, None])
    return texts


def _without(ids: Sequence[int], left_out: Collection[int]) -> list[int]:
    return [each for each in ids if each not in left_out]
