"""Generation: the cache does not change the text; which tokens are sampled, which never are, and when it ends."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from decoders import SHAPES, alone, decoder, logits, small

from megazh.errors import UsageError
from megazh.model.generate import Forward, PrefixCache, cached_forward, generate, generate_batch, uncached_forward
from megazh.model.layers import Block
from megazh.model.sampling import Sampler, SamplingOptions

GREEDY = SamplingOptions(temperature=0.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fixed(values: torch.Tensor) -> Forward:
    """A `Forward` that returns the same logits for any tokens."""
    return lambda tokens: values.clone()


@pytest.mark.parametrize("name", SHAPES)
def test_cache_gives_the_logits_of_the_whole_text_at_every_position(name: str) -> None:
    model = decoder(small(**SHAPES[name])).eval()
    ids = torch.randint(0, 97, (1, 20), generator=seeded(1))
    with torch.no_grad():
        whole = logits(model, ids, *alone(20))[0]
    for pieces in ([1] * 20, [20], [7, 1, 1, 11], [1, 12, 7]):
        forward = cached_forward(model, 20)
        at = 0
        for size in pieces:
            found = forward(ids[0, at : at + size].tolist())
            at += size
            assert (found.shape, found.dtype) == ((97,), torch.float32)
            torch.testing.assert_close(found, whole[at - 1], rtol=1e-4, atol=1e-4)


def test_without_a_cache_the_text_is_the_same() -> None:
    model = decoder(small(num_key_value_heads=2)).eval()
    with_cache, without = (
        list(generate(forward, [1, 2, 3], 25, SamplingOptions(0.9, top_k=20), 97, (), 6))
        for forward in (cached_forward(model, 28), uncached_forward(model))
    )
    assert with_cache == without


def test_cache_in_bf16_stays_in_bf16() -> None:
    model = decoder(small()).bfloat16().eval()
    forward = cached_forward(model, 8)
    ids = [3, 14, 15, 92, 65]
    for token in ids:
        found = forward([token])
    with torch.no_grad():
        whole = logits(model, torch.tensor([ids]), *alone(5))[0, -1]
    assert (found - whole).abs().max() < 0.05 * whole.abs().max()


def test_more_than_the_cache_holds_is_refused() -> None:
    forward = cached_forward(decoder(small()), 4)
    forward([1, 2, 3])
    with pytest.raises(UsageError, match="5 tokens, but the cache holds only 4; give it a larger capacity"):
        forward([4, 5])


def test_each_position_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = []
    plain = Block.forward

    def counted(self: Block, hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        positions.append(hidden.shape[1])
        return plain(self, hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Block, "forward", counted)
    model = decoder(small()).eval()
    assert len(list(generate(cached_forward(model, 40), [1, 2, 3], 10, GREEDY, 97, (), 0))) == 10
    assert positions == [3, 3] + [1, 1] * 9, (
        "two layers: the prompt at once, then token by token, without the last token"
    )


def test_greedy_is_the_most_likely_one_without_a_cache() -> None:
    model = decoder(small()).eval()
    found = list(generate(cached_forward(model, 30), [5, 6], 12, GREEDY, 97, (), 0))
    assert found == list(generate(cached_forward(model, 30), [5, 6], 12, GREEDY, 97, (), 1)), "the seed does not matter"
    text = [5, 6]
    with torch.no_grad():
        for _ in range(12):
            text.append(int(logits(model, torch.tensor([text]), *alone(len(text)))[0, -1].argmax()))
    assert found == text[2:]


def test_seeds_are_reproducible_and_matter() -> None:
    model = decoder(small(initializer_range=0.05)).eval()

    def text(seed: int) -> list[int]:
        return list(generate(cached_forward(model, 40), [1], 30, SamplingOptions(temperature=1.0), 97, (), seed))

    torch.manual_seed(1)
    first = text(4)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert text(4) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert text(5) != first


@pytest.mark.parametrize(
    "options", [GREEDY, SamplingOptions(1.0), SamplingOptions(1.0, top_k=3), SamplingOptions(0.7, top_p=0.5)]
)
def test_padded_rows_are_never_drawn(options: SamplingOptions) -> None:
    values = torch.linspace(0, 1, 100)
    values[90:] = 1000.0
    sampler = Sampler(options, [[]] * 50, 90, range(50))
    assert sampler(values.expand(50, -1)).max() < 90


def test_end_id_ends_and_is_not_given_out() -> None:
    calls = []

    def counting(tokens: list[int]) -> torch.Tensor:
        calls.append(tokens)
        values = torch.zeros(10)
        values[len(calls) + 2] = 9.0
        return values

    assert list(generate(counting, [1, 2], 20, GREEDY, 10, {6, 8}, 0)) == [3, 4, 5]
    assert calls == [[1, 2], [3], [4], [5]]
    calls.clear()
    assert list(generate(counting, [1], 4, GREEDY, 10, (), 0)) == [3, 4, 5, 6]
    assert list(generate(counting, [1], 0, GREEDY, 10, (), 0)) == []


def test_no_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        next(generate(fixed(torch.zeros(4)), [], 1, GREEDY, 4, (), 0))


def shares(options: SamplingOptions, values: torch.Tensor, seen: list[int] | None = None, count: int = 3000) -> Counter:
    sampler = Sampler(options, [seen or []] * count, len(values), range(count))
    return Counter(sampler(values.expand(count, -1)).tolist())


def near(found: Counter, expected: torch.Tensor) -> None:
    """Check that frequencies are within five standard deviations of the probabilities, or zero where those are."""
    count = sum(found.values())
    for token, share in enumerate(expected.tolist()):
        if share == 0:
            assert found[token] == 0, token
        else:
            assert found[token] / count == pytest.approx(share, abs=5 * math.sqrt(share / count)), token


VALUES = torch.tensor([1.0, 3.0, -1.0, 2.5, 2.0, 0.0, 2.9])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    near(shares(SamplingOptions(temperature), VALUES), (VALUES / temperature).softmax(0))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    assert shares(SamplingOptions(temperature), VALUES * 100, count=20) == {1: 20}


@pytest.mark.parametrize("top_k", [1, 2, 3, 6, 7, 100])
def test_top_k(top_k: int) -> None:
    expected = VALUES.softmax(0)
    kept = sorted(range(7), key=lambda token: -VALUES[token])[:top_k]
    only = torch.zeros(7)
    only[kept] = expected[kept]
    near(shares(SamplingOptions(1.0, top_k=top_k), VALUES), only / only.sum())


def test_top_k_keeps_so_many_also_among_equals() -> None:
    """Logits of a bf16 model are often equal."""
    assert len(shares(SamplingOptions(1.0, top_k=1), torch.zeros(20), count=200)) == 1
    assert len(shares(SamplingOptions(1.0, top_k=5), torch.zeros(20), count=500)) == 5


def naive_top_p(values: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities over the smallest set of most likely tokens whose total reaches top_p."""
    probabilities = values.double().softmax(0).tolist()
    total, kept = 0.0, torch.zeros(len(values))
    for token in sorted(range(len(values)), key=lambda token: -probabilities[token]):
        kept[token] = probabilities[token]
        total += probabilities[token]
        if total >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0])
def test_top_p(top_p: float) -> None:
    near(shares(SamplingOptions(1.0, top_p=top_p), VALUES), naive_top_p(VALUES, top_p))


def test_top_p_counts_what_temperature_and_top_k_left() -> None:
    options = SamplingOptions(0.5, top_k=3, top_p=0.6)
    values = VALUES / 0.5
    values[values < values.topk(3).values[-1]] = -torch.inf
    near(shares(options, VALUES), naive_top_p(values, 0.6))


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    seen = [1, 1, 1, 2, 5]
    expected = torch.tensor([1.0, 3.0 / 1.5, -1.0 * 1.5, 2.5, 2.0, 0.0, 2.9])
    near(shares(SamplingOptions(1.0, repetition_penalty=1.5), VALUES, seen), expected.softmax(0))
    greedy = SamplingOptions(0.0, repetition_penalty=1.5)
    assert shares(greedy, VALUES, seen, 1) == {6: 1}
    assert shares(greedy, VALUES, [], 1) == {1: 1}


def test_repetition_penalty_counts_prompt_and_what_was_drawn() -> None:
    values = torch.tensor([5.0, 4.0, 3.0, 2.9])
    options = SamplingOptions(0.0, repetition_penalty=2.0)
    assert list(generate(fixed(values), [0], 3, options, 4, (), 0)) == [1, 2, 3]


def test_draw_leaves_the_logits_alone() -> None:
    values = VALUES.clone()
    shares(SamplingOptions(0.5, 2, 0.5, 1.5, 1.0), values, [1, 2], 3)
    assert torch.equal(values, VALUES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingOptions(temperature=-0.1), "temperature -0.1"),
        (lambda: SamplingOptions(temperature=math.nan), "temperature nan"),
        (lambda: SamplingOptions(top_k=-1), "top_k -1"),
        (lambda: SamplingOptions(top_p=0.0), "top_p 0.0"),
        (lambda: SamplingOptions(top_p=1.1), "top_p 1.1"),
        (lambda: SamplingOptions(repetition_penalty=0.0), "repetition_penalty 0.0"),
        (lambda: SamplingOptions(additive_penalty=-1.0), "additive_penalty -1.0"),
        (lambda: SamplingOptions(penalty_decay=1.5), "penalty_decay 1.5"),
    ],
)
def test_options_that_cannot_work_are_refused(make: Callable[[], SamplingOptions], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_additive_penalty_fades_by_token() -> None:
    # Logits 3, 2.5, 0 and a penalty of 1 that halves at each token.
    values = torch.tensor([3.0, 2.5, 0.0])
    options = SamplingOptions(0.0, additive_penalty=1.0, penalty_decay=0.5)
    # Prompt [0]: 2, 2.5 gives 1; then 3 - 0.5, 2.5 - 1 gives 0; then 3 - 1.25, 2.5 - 0.5 gives 1.
    assert list(generate(fixed(values), [0], 3, options, 3, (), 0)) == [1, 0, 1]
    near(shares(SamplingOptions(1.0, additive_penalty=1.0, penalty_decay=0.5), values, [0, 1, 1, 0]),
         torch.tensor([3 - 1.125, 2.5 - 0.75, 0.0]).softmax(0))  # fmt: skip


def test_penalties_equal_those_of_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    values = torch.randn(3, 50, generator=seeded(2)) * 4
    ids = torch.randint(0, 50, (3, 30), generator=seeded(4))
    expected = processors.RepetitionPenaltyLogitsProcessor(1.4)(ids, values.clone()).argmax(-1)
    found = Sampler(SamplingOptions(0.0, repetition_penalty=1.4), ids.tolist(), 50, [0, 0, 0])(values)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["plain", "grouped", "neox", "yarn"])
@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(1.0, 20, 0.9, 1.1, 0.5)])
def test_rows_of_a_batch_are_what_each_is_alone(name: str, options: SamplingOptions) -> None:
    model = decoder(small(**SHAPES[name])).eval()
    prompts = [[5], [7, 8, 9, 10, 11], [1, 2, 3], [96] * 9]
    found = generate_batch(model, prompts, 12, options, 97, {3}, [1, 2, 3, 4])
    alone = [
        list(generate(cached_forward(model, 30), prompt, 12, options, 97, {3}, seed))
        for seed, prompt in enumerate(prompts, start=1)
    ]
    assert found == alone


def test_the_cache_is_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = torch.zeros

    def counted(*shape: Any, **options: Any) -> torch.Tensor:
        found = plain(*shape, **options)
        if found.dim() == 5:
            sizes.append(tuple(found.shape))
        return found

    monkeypatch.setattr(torch, "zeros", counted)
    generate_batch(decoder(small()).eval(), [[1], [2, 3]], 6, GREEDY, 97, (), [0, 0])
    assert sizes == [(2, 2, 4, 8, 8)] * 2, "one for each block: keys and values, rows, heads, capacity, dimensions"


def test_prompts_that_begin_alike_are_as_without_a_cache() -> None:
    model = decoder(small()).eval()
    cache, text = PrefixCache(model, 1024), [1, 2, 3] * 20
    options = SamplingOptions(1.0, repetition_penalty=1.2)
    for length, prompt in (
        (40, text[:40]),
        (50, text[:50]),
        (50, text[:50]),
        (3, [9, 9, 9]),
        (41, text[:41]),
        (520, [5] * 520),
    ):
        found = list(generate(cache.forward(length + 12), prompt, 12, options, 97, (), length))
        assert found == list(generate(cached_forward(model, 600), prompt, 12, options, 97, (), length))


def test_shares_over_a_large_vocabulary() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=5000)).float()
    found = shares(SamplingOptions(1.0, top_k=50, top_p=0.95), values, count=300)
    assert set(found) <= set(values.topk(50).indices.tolist())
    assert len(found) > 30
