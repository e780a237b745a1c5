"""The order of samples: pure functions of names and numbers, without state and without the length of the run.

`Blend` decides which corpus sample n comes from, and how many samples came from that corpus before. `permuted` puts
the samples of an epoch into a random order, one number at a time, without a table.
"""

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from megazh.index.compiled import compiled

Int64s = npt.NDArray[np.int64]
_ROUNDS = 8


@dataclass(frozen=True)
class _Node:
    """A node of the blend's tree: a leaf (one corpus), or two subtrees."""

    weight: int
    corpus: int = -1
    sides: "tuple[_Node, _Node] | None" = None


class Blend:
    """Interleaves corpora by weight: after any n samples, each corpus is within two samples of its share.

    The corpora are the leaves of a Huffman tree over the weights. Of the first m samples that reach a node,
    round(m a / (a + b)) go to its left subtree, where a and b are the weights of the two subtrees. So the corpus of
    sample n follows from n alone.

    Why two samples: rounding adds an error of at most 1/2 at each node, and the error from the node above is scaled
    by the share r of the subtree. In a Huffman tree r <= 2/3 for every inner node, so the error there stays below
    1/2 + 2/3 * 3/2 = 3/2, and below 2 at a leaf. All arithmetic is in exact integers.

    Args:
        weights: one positive weight per corpus; only their ratios matter.

    Raises:
        ValueError: there is no weight, or one that is not positive.
    """

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        exact = [Fraction(weight) for weight in weights]
        if not exact or min(exact) <= 0:
            raise ValueError("a blend needs at least one weight, and all weights must be positive")
        scale = lcm(*(weight.denominator for weight in exact))
        self.weights = [int(weight * scale) for weight in exact]
        heap = [(weight, corpus, _Node(weight, corpus)) for corpus, weight in enumerate(self.weights)]
        heapq.heapify(heap)
        order = len(heap)  # breaks ties between equal weights
        while len(heap) > 1:
            small, large = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
            node = _Node(small.weight + large.weight, sides=(large, small))
            heapq.heappush(heap, (node.weight, order, node))
            order += 1
        self._root = heap[0][2]
        self._paths = dict(_paths(self._root, ()))

    def share(self, corpus: int) -> Fraction:
        """Exact share of `corpus` in the samples."""
        return Fraction(self.weights[corpus], self._root.weight)

    def locate(self, number: int) -> tuple[int, int]:
        """(corpus, number of earlier samples from that corpus) of sample `number`, counted from 0."""
        node = self._root
        while node.sides is not None:
            large, small = node.sides
            before = _goes_left(number, node)
            if _goes_left(number + 1, node) > before:
                node, number = large, before
            else:
                node, number = small, number - before
        return node.corpus, number

    def by_corpus(self, numbers: Int64s) -> list[tuple[int, Int64s, Int64s]]:
        """What `locate` gives for many samples at once.

        Args:
            numbers: (n,) sample numbers, counted from 0.

        Returns:
            For each corpus that any of them comes from: the corpus, the places in `numbers` of its samples, and the
            number of earlier samples from that corpus for each.
        """
        found = []
        if len(numbers) and 2 * (int(numbers.max()) + 2) * self._root.weight >= 1 << 63:
            numbers = numbers.astype(object)  # exact where products leave 64 bits
        nodes = [(self._root, np.arange(len(numbers)), numbers)]
        while nodes:
            node, places, reached = nodes.pop()
            if not len(places):
                continue
            if node.sides is None:
                found.append((node.corpus, places, reached.astype(np.int64)))
                continue
            large, small = node.sides
            before = _goes_left(reached, node)
            left = _goes_left(reached + 1, node) > before
            nodes.append((large, places[left], before[left]))
            nodes.append((small, places[~left], (reached - before)[~left]))
        return found

    def count(self, corpus: int, samples: int) -> int:
        """Number of samples from `corpus` among the first `samples` samples."""
        for node, to_left in self._paths[corpus]:
            left = _goes_left(samples, node)
            samples = left if to_left else samples - left
        return samples


def _goes_left(samples: Any, node: _Node) -> Any:
    """Number of the first `samples` samples at `node` that go to its left subtree; of one number, or of an array."""
    assert node.sides is not None
    return (2 * samples * node.sides[0].weight + node.weight) // (2 * node.weight)


def _paths(node: _Node, above: tuple[tuple[_Node, bool], ...]) -> list[tuple[int, tuple[tuple[_Node, bool], ...]]]:
    """For each corpus below `node`: the nodes from the root to it, each with whether the way goes left."""
    if node.sides is None:
        return [(node.corpus, above)]
    left, right = node.sides
    return _paths(left, (*above, (node, True))) + _paths(right, (*above, (node, False)))


def stream_key(*parts: object) -> np.uint64:
    """64-bit key of one random order, hashed from `parts`, which tell it apart from all other orders."""
    text = "\x1f".join(str(part) for part in parts)
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


@compiled()
def mix64(value: np.uint64) -> np.uint64:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit affects every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@compiled()
def permuted(number: int, size: int, key: np.uint64) -> int:
    """Image of `number` (below `size`) under the random permutation of 0 to size - 1 that `key` selects.

    A Feistel network over the next even number of bits. A result of `size` or more is put through it again (cycle
    walking), a few times on average.
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


@compiled()
def permutation(size: int, key: np.uint64) -> npt.NDArray[np.int64]:
    """(size,) int64: `permuted` of each number from 0 to size - 1."""
    out = np.empty(size, np.int64)
    for number in range(size):
        out[number] = permuted(number, size, key)
    return out


@compiled(nogil=True)
def permuted_all(numbers: npt.NDArray[np.int64], size: int, key: np.uint64) -> npt.NDArray[np.int64]:
    """(n,) int64: `permuted` of each of `numbers`."""
    out = np.empty(len(numbers), np.int64)
    for at in range(len(numbers)):
        out[at] = permuted(numbers[at], size, key)
    return out


@compiled()
def select_side(
    hashes: npt.NDArray[np.uint64], salt: np.uint64, limit: np.uint64, validation: bool
) -> npt.NDArray[np.int64]:
    """(n,) numbers of the documents on one side of the split; the validation side has mix64(hash ^ salt) < limit."""
    out = np.empty(len(hashes), np.int64)
    found = 0
    for document in range(len(hashes)):
        if (mix64(hashes[document] ^ salt) < limit) == validation:
            out[found] = document
            found += 1
    return out[:found].copy()
