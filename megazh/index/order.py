"""The order of samples: pure functions of names and numbers, with no state and no total in them.

Two parts: `Blend` says from which corpus sample n comes and how many came from it before; `permuted` puts the
samples of an epoch in a random order, one number at a time, without a table.
"""

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt
from numba import njit

_ROUNDS = 8


@dataclass(frozen=True)
class _Node:
    """A node of the blend's tree: a corpus (leaf), or two sub-trees and their weights."""

    weight: int
    corpus: int = -1
    sides: "tuple[_Node, _Node] | None" = None


class Blend:
    """Interleaves corpora by weight so that after any n samples each is within two samples of its share.

    The corpora are the leaves of a Huffman tree over the weights. Of the first m samples that reach a node,
    round(m a / (a + b)) go left, where a and b are the weights of its sides: so where sample n goes follows from
    n alone. The bound: rounding adds at most 1/2 at each node, and what came from above is scaled by the share r
    of the side. In a Huffman tree r <= 2/3 for every inner node, so the error there stays below 1/2 + 2/3 3/2 =
    3/2, and below 2 at a leaf. Arithmetic is in exact integers.

    Args:
        weights: one positive weight a corpus; only their ratios matter.
    """

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        exact = [Fraction(weight) for weight in weights]
        if not exact or min(exact) <= 0:
            raise ValueError("a blend needs at least one weight, and positive ones")
        scale = lcm(*(weight.denominator for weight in exact))
        self.weights = [int(weight * scale) for weight in exact]
        heap = [(weight, corpus, _Node(weight, corpus)) for corpus, weight in enumerate(self.weights)]
        heapq.heapify(heap)
        made = len(heap)
        while len(heap) > 1:
            small, large = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
            node = _Node(small.weight + large.weight, sides=(large, small))
            heapq.heappush(heap, (node.weight, made, node))
            made += 1
        self._root = heap[0][2]
        self._paths = dict(_paths(self._root, ()))

    def share(self, corpus: int) -> Fraction:
        """The share of `corpus`, exactly."""
        return Fraction(self.weights[corpus], self._root.weight)

    def locate(self, number: int) -> tuple[int, int]:
        """(corpus, how many samples of that corpus come before) for sample `number`, from 0."""
        node = self._root
        while node.sides is not None:
            large, small = node.sides
            before = _goes_left(number, node)
            if _goes_left(number + 1, node) > before:
                node, number = large, before
            else:
                node, number = small, number - before
        return node.corpus, number

    def count(self, corpus: int, samples: int) -> int:
        """How many of the first `samples` samples come from `corpus`."""
        for node, to_left in self._paths[corpus]:
            left = _goes_left(samples, node)
            samples = left if to_left else samples - left
        return samples


def _goes_left(samples: int, node: _Node) -> int:
    assert node.sides is not None
    return (2 * samples * node.sides[0].weight + node.weight) // (2 * node.weight)


def _paths(node: _Node, above: tuple[tuple[_Node, bool], ...]) -> list[tuple[int, tuple[tuple[_Node, bool], ...]]]:
    if node.sides is None:
        return [(node.corpus, above)]
    left, right = node.sides
    return _paths(left, (*above, (node, True))) + _paths(right, (*above, (node, False)))


def stream_key(*parts: object) -> np.uint64:
    """A 64-bit key for one random order, from everything that tells it apart from the others."""
    text = "\x1f".join(str(part) for part in parts)
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


@njit(cache=True)
def mix64(value: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit moves every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@njit(cache=True)
def permuted(number: int, size: int, key: np.uint64) -> int:
    """Where `number` (below `size`) goes in the random permutation of 0 to size - 1 that `key` names.

    A Feistel network over the next even number of bits; a result that is too large is put through again
    (cycle walking), at most a few times on average.
    """
    half = np.uint64(1)
    while (np.uint64(1) << (half + half)) < np.uint64(size):
        half += np.uint64(1)
    mask = (np.uint64(1) << half) - np.uint64(1)
    value = np.uint64(number)
    while True:
        left, right = value >> half, value & mask
        for turn in range(_ROUNDS):
            salt = key + np.uint64(turn + 1) * np.uint64(0x9E3779B97F4A7C15)
            left, right = right, left ^ (mix64(right ^ salt) & mask)
        value = (left << half) | right
        if value < np.uint64(size):
            return np.int64(value)  # type: ignore[return-value]  # numba returns it as an int


@njit(cache=True)
def permutation(size: int, key: np.uint64) -> npt.NDArray[np.int64]:
    """(size,) int64: `permuted` of every number."""
    out = np.empty(size, np.int64)
    for number in range(size):
        out[number] = permuted(number, size, key)
    return out


@njit(cache=True)
def select_side(
    hashes: npt.NDArray[np.uint64], salt: np.uint64, limit: np.uint64, validation: bool
) -> npt.NDArray[np.int64]:
    """Numbers of the documents on one side of the split: on the validation side, mix64(hash ^ salt) < limit."""
    out = np.empty(len(hashes), np.int64)
    found = 0
    for document in range(len(hashes)):
        if (mix64(hashes[document] ^ salt) < limit) == validation:
            out[found] = document
            found += 1
    return out[:found].copy()
