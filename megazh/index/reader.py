"""Read an index through memory maps, after a check that its files are complete and belong together."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megazh.errors import DataError, UsageError
from megazh.files import check_sha256
from megazh.index.format import Header, read_header
from megazh.index.mask import read_mask
from megazh.index.metadata import Metadata, read_metadata

_STEP = 1 << 22  # sequences per step of the check
_AGAIN = "copy all files of the index again, or build it again"


class IndexedDataset:
    """The documents of `PREFIX.bin` and `PREFIX.idx`, checked on opening.

    Header, sizes, pointers, boundaries and dtype are always checked. If there is a `PREFIX.json`, the SHA-256 of each
    file must be the recorded one. A file is hashed only once, until it changes (see `megazh.files`).

    Attributes:
        prefix: path of the index without suffix.
        dtype: dtype of the tokens.
        metadata: contents of `PREFIX.json`; None for an index that Megatron-LM wrote.
        tokens: (tokens,) all tokens, memory-mapped, read-only.
        starts: (documents + 1,) int64, offset of each document in `tokens`, and the number of tokens.
        mask: which tokens are trained, as in `megazh.index.mask`; empty without a `PREFIX.mask`: all of them are.

    Raises:
        UsageError: there is no such index.
        DataError: a file is truncated, damaged, foreign or from another build; the message names file and fault.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self._bin, self._idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        try:
            bin_size, idx_size = self._bin.stat().st_size, self._idx.stat().st_size
        except FileNotFoundError as error:
            missing = Path(error.filename)
            if missing == self._bin and not self._idx.exists():
                raise UsageError(
                    f"{prefix}: no index there (neither {prefix}.bin nor {prefix}.idx); 'megazh index build' makes one"
                ) from None
            why = "an unfinished build counts as no index" if missing == self._idx else "the index is incomplete"
            raise UsageError(f"{missing}: missing; {why}: {_AGAIN}") from None
        header = read_header(self._idx, idx_size)
        self.dtype = header.dtype
        self.metadata = read_metadata(prefix)
        if self.metadata is not None:
            self._check_sizes(self.metadata, bin_size, idx_size)
        self._lengths = self._map(self._idx, np.dtype("<i4"), header.lengths_at, header.sequences)
        self._pointers = self._map(self._idx, np.dtype("<i8"), header.pointers_at, header.sequences)
        self._boundaries = self._map(self._idx, np.dtype("<i8"), header.boundaries_at, header.boundaries)
        self.sequence_modes: npt.NDArray[np.int8] | None = None
        """(sequences,) int8 mode of each sequence in a multimodal index, otherwise None."""
        if idx_size > header.end:
            self.sequence_modes = self._map(self._idx, np.dtype("i1"), header.end, header.sequences)
        total = self._check_sequences(header, bin_size)
        self.tokens = self._map(self._bin, self.dtype.newbyteorder("<"), 0, total)
        self.starts = self._document_starts(total)
        if self.metadata is not None:
            self._check_against(self.metadata)
        self.mask = read_mask(prefix, self.metadata)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._boundaries) - 1

    def __getitem__(self, document: int) -> npt.NDArray[np.integer]:
        """(tokens,) tokens of a document, a view of the file. Raises IndexError if there is no such document."""
        if not -len(self) <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        document %= len(self)
        return self.tokens[self.starts[document] : self.starts[document + 1]]

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """(sequences,) int32, number of tokens of each sequence."""
        return self._lengths

    @property
    def document_indices(self) -> npt.NDArray[np.int64]:
        """(documents + 1,) int64, first sequence of each document, and the number of sequences."""
        return self._boundaries

    def document_hashes(self) -> npt.NDArray[np.uint64]:
        """(documents,) uint64 content hashes from `PREFIX.docs`. Raises DataError if the file is missing or wrong."""
        path = Path(f"{self.prefix}.docs")
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DataError(
                f"{path}: missing; it holds the content hashes that decide the validation split; "
                + (_AGAIN if self.metadata else f"'megazh index adopt {self.prefix} --tokenizer TOK' makes it")
            ) from None
        if size != 8 * len(self):
            raise DataError(f"{path}: expected {8 * len(self)} bytes for {len(self)} documents, found {size}; {_AGAIN}")
        if self.metadata is not None:
            check_sha256(path, self.metadata.files.docs.sha256)
        return self._map(path, np.dtype("<u8"), 0, len(self))

    @staticmethod
    def _map(path: Path, dtype: np.dtype, offset: int, count: int) -> npt.NDArray:
        if count == 0:
            return np.empty(0, dtype)
        # A plain array over the map: slicing a numpy.memmap costs twice as much.
        return np.asarray(np.memmap(path, dtype, "r", offset, (count,)))

    def _check_sizes(self, metadata: Metadata, bin_size: int, idx_size: int) -> None:
        for path, size, recorded in (
            (self._idx, idx_size, metadata.files.idx),
            (self._bin, bin_size, metadata.files.bin),
        ):
            if size != recorded.bytes:
                raise DataError(
                    f"{path}: expected {recorded.bytes} bytes from {self.prefix}.json, found {size}; {_AGAIN}"
                )
            check_sha256(path, recorded.sha256)

    def _check_sequences(self, header: Header, bin_size: int) -> int:
        """Check lengths (not negative), pointers (sums of lengths), boundaries (ascending); returns the token count."""
        total = 0
        for at in range(0, header.sequences, _STEP):
            lengths = self._lengths[at : at + _STEP]
            if lengths.min() < 0:
                wrong_length = int(lengths.argmin())
                raise DataError(
                    f"{self._idx}: length of sequence {at + wrong_length}: expected at least 0, "
                    f"found {lengths[wrong_length]}; {_AGAIN}"
                )
            ends = np.cumsum(lengths, dtype=np.int64)
            expected = (total + ends - lengths) * self.dtype.itemsize
            wrong = np.flatnonzero(self._pointers[at : at + _STEP] != expected)
            if len(wrong):
                first = int(wrong[0])
                raise DataError(
                    f"{self._idx}: pointer of sequence {at + first}: expected {expected[first]} from the lengths "
                    f"before it, found {self._pointers[at + first]}; {_AGAIN}"
                )
            total += int(ends[-1])
        boundaries = self._boundaries
        if boundaries[0] != 0 or boundaries[-1] != header.sequences or (np.diff(boundaries) < 0).any():
            raise DataError(
                f"{self._idx}: document boundaries: expected them to ascend from 0 to {header.sequences}, found "
                f"{boundaries[0]} to {boundaries[-1]}{'' if len(boundaries) < 2 else ', not all ascending'}; {_AGAIN}"
            )
        if bin_size != total * self.dtype.itemsize:
            raise DataError(
                f"{self._bin}: expected {total * self.dtype.itemsize} bytes for the {total} tokens ({self.dtype}) of "
                f"{self._idx.name}, found {bin_size}: truncated, or from another index; {_AGAIN}"
            )
        return total

    def _document_starts(self, total: int) -> npt.NDArray[np.int64]:
        starts = np.empty(len(self._boundaries), np.int64)
        inside = self._boundaries[self._boundaries < len(self._pointers)]
        starts[: len(inside)] = self._pointers[inside] // self.dtype.itemsize
        starts[len(inside) :] = total
        return starts

    def _check_against(self, metadata: Metadata) -> None:
        for name, recorded, found in (
            ("documents", metadata.documents, len(self)),
            ("tokens", metadata.tokens, len(self.tokens)),
            ("dtype", metadata.dtype, self.dtype.name),
        ):
            if recorded != found:
                raise DataError(
                    f"{self.prefix}.json: {name}: expected {found} from the index, found {recorded}; {_AGAIN}"
                )
