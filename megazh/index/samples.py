"""Samples of one corpus: pack its documents, keep the sample table in the cache, gather tokens and labels."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megazh.caches import cache_dir, warn_not_kept
from megazh.errors import WorkerError
from megazh.files import fsync_directory, locked
from megazh.index.choices import Cut
from megazh.index.compiled import compiled
from megazh.index.mask import Mask
from megazh.index.order import permutation, stream_key
from megazh.index.packing import Packing, SampleTable, pack
from megazh.index.reader import IndexedDataset
from megazh.index.trained import keep_trained
from megazh.writing import writing

IGNORED = -100
"""Label of tokens without a successor to predict: the last token of a document, padding, and what a mask leaves out."""
_CACHE_VERSION = 1
Int32s = npt.NDArray[np.int32]


class Sample(NamedTuple):
    """One training sample, or a batch of them with a leading dimension.

    Attributes:
        tokens: (seq,) int32.
        labels: (seq,) int32, the next token of the same document, or -100 if there is none. They are already
            shifted: a loss compares logits[i] with labels[i].
        position_ids: (seq,) int32, counted from 0 in each segment: a piece of a document, or what `Cut` makes of it,
            and the padding.
        cu_seqlens: (segments + 1,) int32, cumulative segment boundaries, starting with 0 and filled up with seq;
            segments = `SampleShape.segments`.
    """

    tokens: Int32s
    labels: Int32s
    position_ids: Int32s
    cu_seqlens: Int32s


@dataclass(frozen=True)
class SampleShape:
    """Shape of a sample, the same for all corpora of a mixture."""

    seq_len: int
    """Tokens per sample."""
    packing: Packing
    max_docs: int
    """Largest number of pieces of documents per sample, padding included."""
    running_positions: bool = False
    """Whether position ids continue with a document that continues in the next sample, not from 0 in each piece."""
    shortest_cut: int | None = None
    """Smallest length of a `Cut` of these samples, which the boundaries have room for; None: they are never cut."""

    @property
    def segments(self) -> int:
        """Largest number of segments per sample, those made by cuts included."""
        # A piece of n tokens has (n - 1) // length cuts at most, and all pieces together have up to seq_len tokens.
        return self.max_docs + ((self.seq_len - 1) // self.shortest_cut if self.shortest_cut else 0)

    @property
    def document_map_size(self) -> int:
        """Integers per sample of position_ids, cu_seqlens and the sample's number, of 64 bits, together."""
        return self.seq_len + self.segments + 3


class CorpusSamples:
    """The packed samples of some documents of one index, in the order of packing.

    Args:
        index: index of the documents.
        shape: shape of the samples.
        padding_id: token id of padding.
        table: the pieces of each sample.
    """

    def __init__(self, index: IndexedDataset, shape: SampleShape, padding_id: int, table: SampleTable) -> None:
        self.index, self.shape, self.table = index, shape, table
        self._padding_id = padding_id

    def __len__(self) -> int:
        return len(self.table)

    def gather(
        self,
        rows: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        tokens: Int32s,
        labels: Int32s,
        document_map: Int32s,
        cut: Cut | None = None,
    ) -> None:
        """Copy the samples `rows` to the rows `places` of a batch, without Python's lock.

        Args:
            rows: (n,) numbers of packed samples.
            places: (n,) row of the batch for each sample.
            tokens, labels: (batch, seq) int32, contiguous; written.
            document_map: (batch, seq + segments + 3) int32, contiguous; written: position_ids, then cu_seqlens. The
                last two columns are for the sample's number, and not written.
            cut: the cuts to make. None: none.

        Raises:
            ValueError: the document map has no room for these cuts.
        """
        table = self.table
        if cut is not None and (self.shape.shortest_cut is None or cut.length < self.shape.shortest_cut):
            raise ValueError(f"cuts of {cut.length} tokens in samples made for {self.shape.shortest_cut}")
        _gather(
            self.index.tokens,
            self.index.starts,
            self.index.mask,
            table.document,
            table.offset,
            table.length,
            table.first_piece,
            rows,
            places,
            self._padding_id,
            self.shape.running_positions,
            self.shape.seq_len if cut is None else cut.length,
            cut is None or cut.keeps_labels,
            tokens,
            labels,
            document_map,
        )

    def labels_at_cuts(self, rows: npt.NDArray[np.int64], length: int) -> int:
        """Number of labels at cuts of `length` tokens in the samples `rows`, found without reading their tokens."""
        table, index = self.table, self.index
        pieces = table.document, table.offset, table.length, table.first_piece
        return int(_labels_at_cuts(index.starts, index.mask, *pieces, rows, length))


@compiled(nogil=True)
def _gather(
    stored: npt.NDArray,
    starts: npt.NDArray[np.int64],
    mask: Mask,
    document: npt.NDArray[np.int64],
    offset: npt.NDArray[np.int64],
    length: npt.NDArray[np.int64],
    first_piece: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    padding_id: int,
    running: bool,
    longest: int,
    keeps_labels: bool,
    tokens: Int32s,
    labels: Int32s,
    document_map: Int32s,
) -> None:
    seq_len = tokens.shape[1]
    for which in range(len(rows)):
        row, place = rows[which], places[which]
        # One-dimensional views, which the compiler turns into vector instructions.
        row_tokens, row_labels = tokens[place], labels[place]
        positions, boundaries = document_map[place, :seq_len], document_map[place, seq_len:-2]
        boundaries[:] = seq_len
        boundaries[0] = 0
        filled = segments = 0
        for piece in range(first_piece[row], first_piece[row + 1]):
            begin = starts[document[piece]] + offset[piece]
            size = length[piece]
            end = filled + size
            _copy(stored[begin : begin + size], row_tokens[filled:end])
            _copy(stored[begin + 1 : begin + size], row_labels[filled : end - 1])
            ends = begin + size == starts[document[piece] + 1]
            row_labels[end - 1] = IGNORED if ends else stored[begin + size]
            if len(mask):
                _ignore_untrained(mask, begin + 1, row_labels[filled : end - 1 if ends else end])
            position = offset[piece] if running else 0
            while filled < end:
                segment_end = min(filled + longest, end)
                _count_from(position, positions[filled:segment_end])
                if segment_end < end and not keeps_labels:
                    row_labels[segment_end - 1] = IGNORED
                filled, position = segment_end, 0
                segments += 1
                boundaries[segments] = filled
        row_tokens[filled:] = padding_id
        row_labels[filled:] = IGNORED
        _count_from(0, positions[filled:])


@compiled(nogil=True)
def _labels_at_cuts(
    starts: npt.NDArray[np.int64],
    mask: Mask,
    document: npt.NDArray[np.int64],
    offset: npt.NDArray[np.int64],
    length: npt.NDArray[np.int64],
    first_piece: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    longest: int,
) -> int:
    found = 0
    for row in rows:
        for piece in range(first_piece[row], first_piece[row + 1]):
            if not len(mask):
                found += (length[piece] - 1) // longest
                continue
            begin = starts[document[piece]] + offset[piece]
            for token in range(begin + longest, begin + length[piece], longest):  # the labels: what follows a cut
                found += (mask[token >> 3] >> (token & 7)) & 1
    return found


@compiled(nogil=True)
def _copy(source: npt.NDArray, out: Int32s) -> None:
    for at in range(len(out)):
        out[at] = source[at]


@compiled(nogil=True)
def _ignore_untrained(mask: Mask, first: int, labels: Int32s) -> None:
    """Drop the labels that are not trained; `first` is the token that the first label is."""
    for at in range(len(labels)):
        token = first + at
        if not (mask[token >> 3] >> (token & 7)) & 1:
            labels[at] = IGNORED


@compiled(nogil=True)
def _count_from(first: int, out: Int32s) -> None:
    for at in range(len(out)):
        out[at] = np.int32(first) + np.int32(at)


def pack_documents(
    index: IndexedDataset, documents: npt.NDArray[np.int64], shape: SampleShape, seed: object, keep_tail: bool
) -> SampleTable:
    """Pack `documents` of `index`, shuffled by `seed`, or load the table from the cache if it was packed before.

    The cache may be deleted at any time. Of several processes that start together, one packs while the others wait
    for its lock, which the kernel releases if that process dies. Without a writable cache each process packs itself.

    Args:
        documents: (documents,) numbers of the documents to pack.
        keep_tail: see `packing.pack`.
    """
    key = _cache_key(index, documents, shape, seed, keep_tail)
    folder = cache_dir() / "samples" / key
    table = _load(folder)
    if table is not None:
        return table
    try:
        with locked(folder.with_suffix(".lock")):
            table = _load(folder)
            if table is None:
                table = _pack(index, documents, shape, seed, keep_tail)
                _save(folder, table)
    except (OSError, WorkerError) as error:  # the lock or the copy on the disk, which this process can do without
        warn_not_kept(cache_dir(), error)
    return _pack(index, documents, shape, seed, keep_tail) if table is None else table


def _pack(
    index: IndexedDataset, documents: npt.NDArray[np.int64], shape: SampleShape, seed: object, keep_tail: bool
) -> SampleTable:
    order = permutation(len(documents), stream_key("documents", seed))
    shuffled = documents[order]
    lengths = index.starts[shuffled + 1] - index.starts[shuffled]
    table = pack(shuffled, lengths, shape.seq_len, shape.packing, shape.max_docs, keep_tail)
    return keep_trained(table, index.starts, index.mask) if len(index.mask) else table


def _cache_key(
    index: IndexedDataset, documents: npt.NDArray[np.int64], shape: SampleShape, seed: object, keep_tail: bool
) -> str:
    """Hash of everything that determines the table: document lengths and numbers, mask, shape, seed."""
    digest = hashlib.sha256()
    digest.update(np.ascontiguousarray(documents).data)
    if index.metadata is not None:
        digest.update(index.metadata.files.idx.sha256.encode())
        if index.metadata.files.mask is not None:
            digest.update(index.metadata.files.mask.sha256.encode())
    else:
        digest.update(index.starts.data)
    settings = [_CACHE_VERSION, shape.seq_len, shape.packing.value, shape.max_docs, str(seed), keep_tail]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()


def _save(folder: Path, table: SampleTable) -> None:
    """Put the table into the cache by rename, so that other processes see all of it or nothing."""
    with writing(folder, sum(getattr(table, field.name).nbytes for field in fields(SampleTable))):
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for field in fields(SampleTable):
                with open(temporary / f"{field.name}.npy", "wb") as file:
                    array = getattr(table, field.name)
                    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                    file.write(array.data)  # np.save reports a full disk without its errno
                    file.flush()
                    os.fsync(file.fileno())
            shutil.rmtree(folder, ignore_errors=True)  # a damaged entry, if any
            os.rename(temporary, folder)
            fsync_directory(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _load(folder: Path) -> SampleTable | None:
    """The table from the cache, memory-mapped; None if it is missing or incomplete."""
    arrays = {}
    with contextlib.suppress(OSError, ValueError, EOFError):
        for field in fields(SampleTable):
            arrays[field.name] = np.asarray(np.load(folder / f"{field.name}.npy", mmap_mode="r", allow_pickle=False))
        table = SampleTable(**arrays)
        pieces, samples = len(table.document), len(table.valid_labels)
        complete = (
            all(array.dtype == np.int64 and array.ndim == 1 for array in arrays.values())
            and len(table.offset) == len(table.length) == pieces
            and len(table.first_piece) == samples + 1
            and len(table.untrained) == 1
            and int(table.first_piece[-1]) == pieces
        )
        return table if complete else None
    return None
