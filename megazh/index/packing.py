"""Packing: choose the pieces of documents that make up each sample of `seq_len` tokens.

There are two methods, both linear in the number of documents. `concat` lets a document continue in the next sample.
`best_fit` never cuts a document that fits: it is Best-Fit Decreasing over documents (and the remainders of longer
ones) as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830). Open bins are kept in one list per free
room, with a bit set of the rooms in use, so that the fullest bin that still fits is found in a few machine words.

A sample has at most `max_docs` segments. Padding counts as a segment: a sample that is not full has at most
`max_docs - 1` pieces and is closed before it would get more.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megazh.index.choices import Packing
from megazh.index.compiled import compiled

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampleTable:
    """The pieces of documents in each sample; all arrays are int64.

    Attributes:
        document: (pieces,) number of the document that the piece belongs to.
        offset: (pieces,) offset of the piece in its document, in tokens.
        length: (pieces,) number of tokens of the piece.
        first_piece: (samples + 1,) number of the first piece of each sample, and the number of pieces.
        valid_labels: (samples,) number of labels that are not -100.
        untrained: (1,) number of samples that were left out because a mask trains none of their labels.
    """

    document: Int64s
    offset: Int64s
    length: Int64s
    first_piece: Int64s
    valid_labels: Int64s
    untrained: Int64s = field(default_factory=lambda: np.zeros(1, np.int64))

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.valid_labels)


def default_max_docs(seq_len: int) -> int:
    """Default limit of segments per sample: room for documents of eight tokens, and at least 16."""
    return max(16, seq_len // 8)


def pack(
    documents: Int64s, lengths: Int64s, seq_len: int, packing: Packing, max_docs: int, keep_tail: bool
) -> SampleTable:
    """Pack documents into samples.

    Args:
        documents: (documents,) numbers of the documents, in the order of packing.
        lengths: (documents,) number of tokens of each, in the same order.
        seq_len: tokens per sample, at least 2.
        max_docs: largest number of segments per sample, at least 2.
        keep_tail: with `concat`, pad a last sample that is not full instead of dropping it.

    Raises:
        ValueError: `seq_len` or `max_docs` is below 2.
    """
    if seq_len < 2 or max_docs < 2:
        raise ValueError(f"seq_len and max_docs must be at least 2, found {seq_len} and {max_docs}")
    lengths = np.ascontiguousarray(lengths, np.int64)
    documents = np.ascontiguousarray(documents, np.int64)
    if packing is Packing.CONCAT:
        at, offset, length, first = _concat(lengths, seq_len, max_docs, keep_tail)
    else:
        at, offset, length, first = _best_fit(lengths, seq_len, max_docs)
    valid = _valid_labels(at, offset, length, first, lengths)
    return SampleTable(documents[at], offset, length, first, valid)


@compiled()
def _concat(lengths: Int64s, seq_len: int, max_docs: int, keep_tail: bool) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    total = lengths.sum()
    most_samples = total // seq_len + len(lengths) // (max_docs - 1) + 2
    most_pieces = len(lengths) + most_samples
    at = np.empty(most_pieces, np.int64)
    offset = np.empty(most_pieces, np.int64)
    length = np.empty(most_pieces, np.int64)
    first = np.empty(most_samples + 1, np.int64)
    first[0] = 0
    samples = pieces = 0
    room = seq_len
    for document in range(len(lengths)):
        done = 0
        while done < lengths[document]:
            left = lengths[document] - done
            if left < room and pieces - first[samples] == max_docs - 1:
                samples += 1
                first[samples] = pieces
                room = seq_len
            take = min(left, room)
            at[pieces], offset[pieces], length[pieces] = document, done, take
            pieces += 1
            done += take
            room -= take
            if room == 0:
                samples += 1
                first[samples] = pieces
                room = seq_len
    if room < seq_len:
        if keep_tail:
            samples += 1
            first[samples] = pieces
        else:
            pieces = first[samples]
    return at[:pieces].copy(), offset[:pieces].copy(), length[:pieces].copy(), first[: samples + 1].copy()


@compiled()
def _best_fit(lengths: Int64s, seq_len: int, max_docs: int) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    whole = 0
    counts = np.zeros(seq_len + 1, np.int64)  # remainders by length
    for document in range(len(lengths)):
        whole += lengths[document] // seq_len
        counts[lengths[document] % seq_len] += 1
    counts[0] = 0
    chunks = counts.sum()
    begin = np.empty(seq_len + 1, np.int64)  # first place of each length, longest first
    position = 0
    for size in range(seq_len, -1, -1):
        begin[size] = position
        position += counts[size]
    chunk = np.empty(chunks, np.int64)
    for document in range(len(lengths)):
        size = lengths[document] % seq_len
        if size:
            chunk[begin[size]] = document
            begin[size] += 1

    bin_of = np.empty(chunks, np.int64)
    held = np.empty(chunks, np.int64)  # pieces in each bin; there are no more bins than chunks
    below = np.empty(chunks, np.int64)  # next bin in the list of the same room
    top = np.full(seq_len + 1, -1, np.int64)  # head of the list of open bins, by room
    words = seq_len // 64 + 1
    open_rooms = np.zeros(words, np.uint64)  # bit r: some open bin has room r
    bins = 0
    for number in range(chunks):
        size = lengths[chunk[number]] % seq_len
        room = _next_bit(open_rooms, size)
        if room < 0:
            target = bins
            bins += 1
            held[target] = 0
            room = seq_len
        else:
            target = top[room]
            top[room] = below[target]
            if top[room] < 0:
                open_rooms[room >> 6] &= ~(np.uint64(1) << np.uint64(room & 63))
        bin_of[number] = target
        held[target] += 1
        room -= size
        if room > 0 and held[target] < max_docs - 1:
            below[target] = top[room]
            top[room] = target
            open_rooms[room >> 6] |= np.uint64(1) << np.uint64(room & 63)

    samples, pieces = whole + bins, whole + chunks
    at = np.empty(pieces, np.int64)
    offset = np.empty(pieces, np.int64)
    length = np.empty(pieces, np.int64)
    first = np.empty(samples + 1, np.int64)
    number = 0
    for document in range(len(lengths)):
        for part in range(lengths[document] // seq_len):
            at[number], offset[number], length[number] = document, part * seq_len, seq_len
            first[number] = number
            number += 1
    slot = np.empty(bins + 1, np.int64)
    slot[0] = whole
    for target in range(bins):
        slot[target + 1] = slot[target] + held[target]
        first[whole + target] = slot[target]
    first[samples] = pieces
    for entry in range(chunks):
        document, target = chunk[entry], bin_of[entry]
        size = lengths[document] % seq_len
        at[slot[target]], offset[slot[target]], length[slot[target]] = document, lengths[document] - size, size
        slot[target] += 1
    return at, offset, length, first


@compiled()
def _next_bit(words: npt.NDArray[np.uint64], start: int) -> int:
    """Number of the lowest set bit that is not below `start`, or -1."""
    number = start >> 6
    word = words[number] & (np.uint64(0xFFFFFFFFFFFFFFFF) << np.uint64(start & 63))
    while word == 0:
        number += 1
        if number == len(words):
            return -1
        word = words[number]
    bit = 0
    if word & np.uint64(0xFFFFFFFF) == 0:
        word >>= np.uint64(32)
        bit += 32
    if word & np.uint64(0xFFFF) == 0:
        word >>= np.uint64(16)
        bit += 16
    if word & np.uint64(0xFF) == 0:
        word >>= np.uint64(8)
        bit += 8
    while word & np.uint64(1) == 0:
        word >>= np.uint64(1)
        bit += 1
    return number * 64 + bit


@compiled()
def _valid_labels(at: Int64s, offset: Int64s, length: Int64s, first: Int64s, lengths: Int64s) -> Int64s:
    """(samples,) number of labels: every token has one, except the last of a document."""
    valid = np.zeros(len(first) - 1, np.int64)
    for sample in range(len(valid)):
        for piece in range(first[sample], first[sample + 1]):
            ends = offset[piece] + length[piece] == lengths[at[piece]]
            valid[sample] += length[piece] - (1 if ends else 0)
    return valid
