"""The order of samples: shares, permutations, and the split."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megazh.index.order import Blend, permutation, permuted, permuted_all, select_side, stream_key

GOLDEN_ORDER = [9, 0, 5, 8, 7, 6, 10, 4, 2, 1, 11, 3]
GOLDEN_BLEND = [0, 1, 0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 1, 0, 2, 0, 1, 0]


def _largest_deviation(weights: list, samples: int) -> Fraction:
    blend = Blend(weights)
    counts = Counter()
    worst = Fraction(0)
    for number in range(samples):
        corpus, before = blend.locate(number)
        assert before == counts[corpus], "draws of a corpus are numbered without a gap"
        counts[corpus] += 1
        for each in range(len(weights)):
            worst = max(worst, abs(counts[each] - (number + 1) * blend.share(each)))
    return worst


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12))
def test_every_corpus_stays_within_two_samples_of_its_share(weights: list[int]) -> None:
    assert _largest_deviation(weights, 400) < 2


@pytest.mark.parametrize(
    "weights",
    [
        [1] * 40,
        [2**k for k in range(20)],
        [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233],  # the deepest tree for this total weight
        [Fraction("0.1"), Fraction("0.2"), Fraction("0.7")],
        [1, 10**9],
    ],
)
def test_shares_of_awkward_weights(weights: list) -> None:
    assert _largest_deviation(weights, 2000) < 2


def test_count_agrees_with_locate_far_out() -> None:
    blend = Blend([Fraction("0.3"), Fraction("0.45"), Fraction("0.2"), Fraction("0.05")])
    for number in (0, 1, 999, 10**6, 10**12, 10**18 + 7):
        corpus, before = blend.locate(number)
        assert blend.count(corpus, number) == before
        assert sum(blend.count(each, number) for each in range(4)) == number
        for each in range(4):
            assert abs(blend.count(each, number) - number * blend.share(each)) < 2


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 10**6) | st.integers(1, 10**20), min_size=1, max_size=12),
    st.lists(st.integers(0, 100) | st.integers(0, 10**15), max_size=30),
)
@example([10**20, 3], [10**15, 5, 5])  # products of more than 64 bits
@example([1, 2], [(2**63 - 3) // 6 - 1])  # just not
def test_many_samples_at_once_are_where_each_is_by_itself(weights: list[int], numbers: list[int]) -> None:
    blend = Blend(weights)
    found: list[tuple[int, int] | None] = [None] * len(numbers)
    for corpus, places, before in blend.by_corpus(np.array(numbers, np.int64)):
        assert len(places)
        assert before.dtype == np.int64
        for place, number in zip(places, before, strict=True):
            assert found[place] is None
            found[place] = (corpus, int(number))
    assert found == [blend.locate(number) for number in numbers]


def test_a_blend_needs_positive_weights() -> None:
    for weights in ([], [0], [1, -1]):
        with pytest.raises(ValueError, match="positive"):
            Blend(weights)


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 10_007])
def test_permuted_is_a_permutation(size: int) -> None:
    order = permutation(size, stream_key("test", size))
    assert sorted(order.tolist()) == list(range(size))
    assert [permuted(number, size, stream_key("test", size)) for number in range(0, size, 7)] == order[::7].tolist()


def test_permuted_all_is_permuted_of_each() -> None:
    key, numbers = stream_key("many"), np.array([5, 0, 10_006, 5, 77])
    assert permuted_all(numbers, 10_007, key).tolist() == [permuted(number, 10_007, key) for number in numbers]


def test_orders_differ_by_key_and_look_random() -> None:
    size, keys = 10, 20_000
    first = np.array([permuted(0, size, stream_key("epoch", key)) for key in range(keys)])
    counts = np.bincount(first, minlength=size)
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert chi_square < 27.9, f"place of sample 0 is not uniform: {counts}"  # 9 degrees of freedom, p = 0.001
    orders = {tuple(permutation(size, stream_key("epoch", key)).tolist()) for key in range(500)}
    assert len(orders) > 490
    long = permutation(10_000, stream_key("long"))
    assert abs(np.corrcoef(long, np.arange(10_000))[0, 1]) < 0.05


def test_orders_never_change() -> None:
    """A checkpoint relies on the order: if a release changed it, resumed runs would repeat data."""
    assert permutation(12, stream_key("epoch", 7, "wiki", 0)).tolist() == GOLDEN_ORDER
    assert [Blend([5, 3, 1]).locate(number)[0] for number in range(18)] == GOLDEN_BLEND


def test_the_split_follows_from_hash_and_salt_alone() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 50_000, np.uint64)
    limit = np.uint64(int(0.1 * 2**64))
    salt = stream_key("validation", "a")
    training, validation = (select_side(hashes, salt, limit, side) for side in (False, True))
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(50_000))
    assert abs(len(validation) / 50_000 - 0.1) < 0.005
    chosen = set(hashes[validation].tolist())
    shuffled = np.random.default_rng(1).permutation(hashes)
    assert set(shuffled[select_side(shuffled, salt, limit, True)].tolist()) == chosen
    other = select_side(hashes, stream_key("validation", "b"), limit, True)
    assert len(set(other.tolist()) & set(validation.tolist())) < 1000
    smaller = select_side(hashes, salt, np.uint64(int(0.05 * 2**64)), True)
    assert set(smaller.tolist()) < set(validation.tolist()), "a smaller fraction keeps a part of the larger one's"
    assert len(select_side(hashes, salt, np.uint64(0), True)) == 0
