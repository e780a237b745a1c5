"""Packing: no token is lost, no document that fits is cut, no sample has too many segments."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megazh.index.packing import Packing, SampleTable, default_max_docs, pack

LENGTHS = st.lists(st.integers(1, 90), min_size=0, max_size=60)


def _pack(
    lengths: list[int], seq_len: int, packing: Packing, max_docs: int = 64, keep_tail: bool = False
) -> SampleTable:
    return pack(np.arange(len(lengths)), np.array(lengths, np.int64), seq_len, packing, max_docs, keep_tail)


def _pieces(table: SampleTable) -> list[list[tuple[int, int, int]]]:
    """For each sample, (document, offset, length) of its pieces."""
    flat = list(zip(table.document.tolist(), table.offset.tolist(), table.length.tolist(), strict=True))
    first = table.first_piece.tolist()
    return [flat[start:end] for start, end in itertools.pairwise(first)]


def _concat_reference(lengths: list[int], seq_len: int, max_docs: int) -> list[list[tuple[int, int, int]]]:
    """Packing by `concat`, one token at a time."""
    samples: list[list[list[int]]] = [[]]
    for document, length in enumerate(lengths):
        for offset in range(length):
            current = samples[-1]
            filled = sum(piece[2] for piece in current)
            left = length - offset
            goes_on = bool(current) and current[-1][0] == document
            if filled == seq_len or (not goes_on and len(current) == max_docs - 1 and left < seq_len - filled):
                samples.append([])
                current, goes_on = samples[-1], False
            if goes_on:
                current[-1][2] += 1
            else:
                current.append([document, offset, 1])
    return [[tuple(piece) for piece in sample] for sample in samples if sample]


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(2, 40), st.integers(2, 8))
def test_concat_equals_the_simple_way(lengths: list[int], seq_len: int, max_docs: int) -> None:
    found = _pieces(_pack(lengths, seq_len, Packing.CONCAT, max_docs, keep_tail=True))
    assert found == _concat_reference(lengths, seq_len, max_docs)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 40))
def test_concat_loses_less_than_one_sample(lengths: list[int], seq_len: int) -> None:
    table = _pack(lengths, seq_len, Packing.CONCAT, max_docs=1000)
    total = sum(lengths)
    assert len(table) == total // seq_len
    assert table.length.sum() == total - total % seq_len


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(2, 40), st.integers(2, 8), st.sampled_from(list(Packing)))
def test_samples_are_whole_and_within_bounds(lengths: list[int], seq_len: int, max_docs: int, packing: Packing) -> None:
    table = _pack(lengths, seq_len, packing, max_docs, keep_tail=True)
    seen: dict[int, list[tuple[int, int]]] = {}
    for sample, pieces in enumerate(_pieces(table)):
        filled = sum(length for _, _, length in pieces)
        assert 0 < filled <= seq_len
        assert len(pieces) + (filled < seq_len) <= max_docs, "padding is a segment, too"
        labels = sum(length - (offset + length == lengths[document]) for document, offset, length in pieces)
        assert table.valid_labels[sample] == labels
        for document, offset, length in pieces:
            seen.setdefault(document, []).append((offset, length))
    for document, length in enumerate(lengths):
        at = 0
        for offset, size in sorted(seen[document]):
            assert offset == at
            at += size
        assert at == length, "every token exactly once"


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(2, 40))
def test_best_fit_cuts_only_what_cannot_fit(lengths: list[int], seq_len: int) -> None:
    table = _pack(lengths, seq_len, Packing.BEST_FIT)
    for document, length in enumerate(lengths):
        sizes = sorted(table.length[table.document == document].tolist(), reverse=True)
        assert sizes == [seq_len] * (length // seq_len) + ([length % seq_len] if length % seq_len else [])


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(2, 40))
def test_best_fit_needs_as_many_samples_as_the_simple_way(lengths: list[int], seq_len: int) -> None:
    rooms: list[int] = []
    for size in sorted((length % seq_len for length in lengths if length % seq_len), reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - size)
        else:
            rooms.append(seq_len - size)
    expected = len(rooms) + sum(length // seq_len for length in lengths)
    assert len(_pack(lengths, seq_len, Packing.BEST_FIT, max_docs=1000)) == expected


def test_wide_numbers() -> None:
    """Documents with far more than 2^31 tokens in total, and document numbers above 2^31."""
    lengths = np.full(5, 2**31 - 1, np.int64)
    documents = np.arange(5) + 2**33
    table = pack(documents, lengths, 2**20, Packing.CONCAT, 16, keep_tail=False)
    assert table.length.sum() == 5 * (2**31 - 1) // 2**20 * 2**20
    assert table.document[-1] == 2**33 + 4
    assert all(getattr(table, name).dtype == np.int64 for name in ("document", "offset", "length", "first_piece"))


def test_sizes_that_cannot_work() -> None:
    for seq_len, max_docs in ((1, 16), (16, 1)):
        with pytest.raises(ValueError, match="at least 2"):
            _pack([5], seq_len, Packing.CONCAT, max_docs)


def test_default_max_docs_has_room_for_short_documents() -> None:
    assert default_max_docs(1024) == 128
    table = _pack([9] * 50_000, 1024, Packing.BEST_FIT, default_max_docs(1024))
    assert 1 - table.length.sum() / (len(table) * 1024) < 0.02


def test_speed_of_a_million_documents() -> None:
    """Nothing is quadratic. The targets are 0.2 s and 2 s on one core; tools/bench/pack.py measures them."""
    lengths = np.maximum(np.random.default_rng(0).lognormal(4.2, 0.9, 1_000_000), 1).astype(np.int64)
    for packing, limit in ((Packing.CONCAT, 2.0), (Packing.BEST_FIT, 10.0)):
        pack(np.arange(10), lengths[:10], 1024, packing, 128, keep_tail=False)  # compiles
        begin = time.perf_counter()
        table = pack(np.arange(len(lengths)), lengths, 1024, packing, 128, keep_tail=False)
        assert time.perf_counter() - begin < limit
        assert 1 - table.length.sum() / (len(table) * 1024) < 0.005
