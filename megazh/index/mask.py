"""`PREFIX.mask`: which tokens of an index are trained.

One bit a token of `PREFIX.bin`, in the same order: token n is bit n % 8 of byte n // 8, counted from the least
significant bit (`numpy.packbits(..., bitorder="little")`). A set bit means that the loss covers the token, as the one
to be predicted: position i of a sample has a label if token i + 1 is of the same document and its bit is set. Bits of
the last byte beyond the last token are 0.

`PREFIX.json` has size and SHA-256 of the file as `files.mask`. An index without that key has no mask, and all of its
tokens are trained.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megazh.errors import DataError
from megazh.files import HashedFile, check_sha256
from megazh.index.metadata import FileInfo, Metadata

Mask = npt.NDArray[np.uint8]
"""(ceil(tokens / 8),) uint8, read-only, as in the file; of length 0 for an index without a mask."""

_AGAIN = "copy all files of the index again, or convert the conversations again"


def mask_path(prefix: Path | str) -> Path:
    """Path of the mask, `PREFIX.mask`."""
    return Path(f"{prefix}.mask")


def read_mask(prefix: Path | str, metadata: Metadata | None) -> Mask:
    """The mask of an index, memory-mapped; empty if the index has none.

    Raises:
        DataError: the mask is missing or truncated, or belongs to another index.
    """
    recorded = metadata.files.mask if metadata is not None else None
    if metadata is None or recorded is None:
        none = np.empty(0, np.uint8)
        none.flags.writeable = False  # the type of a memory map, for which numba has compiled
        return none
    path = mask_path(prefix)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: missing; it says which tokens of {prefix}.bin are trained; {_AGAIN}") from None
    expected = -(-metadata.tokens // 8)
    if size != expected or size != recorded.bytes:
        raise DataError(
            f"{path}: expected {expected} bytes for the {metadata.tokens} tokens of {prefix}.bin, found {size}: "
            f"truncated, or of another index; {_AGAIN}"
        )
    try:
        check_sha256(path, recorded.sha256)
    except DataError as error:
        raise DataError(f"{error}; it is damaged, or the mask of another index") from None
    return np.asarray(np.memmap(path, np.uint8, "r"))


def unpack(mask: Mask, begin: int, end: int) -> npt.NDArray[np.bool_]:
    """(end - begin,) whether the tokens from `begin` to `end`, both counted in `PREFIX.bin`, are trained."""
    first = begin // 8
    bits = np.unpackbits(mask[first : -(-end // 8)], bitorder="little")
    return bits[begin - 8 * first : end - 8 * first].astype(np.bool_)


def count_trained(mask: Mask) -> int:
    """Number of trained tokens."""
    return int(np.bitwise_count(mask).sum(dtype=np.int64))


class MaskWriter:
    """Writes a mask as a stream. The methods raise WriteError if the file cannot be written.

    Args:
        file: a new file, closed by `finish`.
    """

    def __init__(self, file: HashedFile) -> None:
        self._file = file
        self.path = file.path
        self.trained = 0
        """Number of trained tokens so far."""
        self._rest = np.empty(0, np.bool_)  # tokens of an unfinished byte

    def append(self, trained: npt.NDArray[np.bool_]) -> None:
        """Add tokens: (tokens,) whether each is trained."""
        bits = np.concatenate([self._rest, trained])
        whole = len(bits) - len(bits) % 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").data)
        self._rest = bits[whole:]
        self.trained += int(np.count_nonzero(trained))

    def finish(self) -> FileInfo:
        """Complete the file and flush it to disk; returns its size and hash."""
        self._file.write(np.packbits(self._rest, bitorder="little").data)
        self._file.close()
        return FileInfo(bytes=self._file.size, sha256=self._file.sha256)
