"""Megatron-LM's index format, MMIDIDX version 1, byte for byte.

`PREFIX.bin` holds the tokens of all sequences, one after the other, and nothing else. `PREFIX.idx` is little endian:

=====================  ===========================================================
bytes                  content
=====================  ===========================================================
9                      ``MMIDIDX\\0\\0``
8                      uint64 version, 1
1                      uint8 code of the tokens' dtype
8                      uint64 S, the number of sequences
8                      uint64 D, the number of document boundaries (documents + 1)
4 S                    int32 length of each sequence in tokens
8 S                    int64 pointer to each sequence, in bytes into the .bin
8 D                    int64 document boundaries in sequences: 0, ..., S
S, only multimodal     int8 mode of each sequence
=====================  ===========================================================

Source: `megatron/core/datasets/indexed_dataset.py`. megazh writes one sequence per document.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megazh.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
"""Megatron's codes for integer dtypes; 6 and 7 are float64 and float32, which hold no tokens."""
CODES: dict[np.dtype[Any], int] = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """The fixed part of an `.idx` file."""

    dtype: np.dtype[Any]
    """Dtype of the tokens in the `.bin` file."""
    sequences: int
    boundaries: int
    """Number of document boundaries, one more than documents."""

    @property
    def lengths_at(self) -> int:
        """Byte offset of the sequence lengths."""
        return HEADER.size

    @property
    def pointers_at(self) -> int:
        """Byte offset of the sequence pointers."""
        return self.lengths_at + 4 * self.sequences

    @property
    def boundaries_at(self) -> int:
        """Byte offset of the document boundaries."""
        return self.pointers_at + 8 * self.sequences

    @property
    def end(self) -> int:
        """Size of the file in bytes, without the modes of a multimodal index."""
        return self.boundaries_at + 8 * self.boundaries

    def pack(self) -> bytes:
        """The header as it is stored."""
        return HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.sequences, self.boundaries)


def read_header(path: Path, size: int) -> Header:
    """Read and check the header of an `.idx` file of `size` bytes. Raises DataError, which names the fault."""
    with open(path, "rb") as file:
        raw = file.read(HEADER.size)
    if raw[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{path}: not a Megatron index: expected it to begin with {MAGIC!r}, found {raw[:9]!r}; give the PREFIX of "
            "an index"
        )
    if len(raw) < HEADER.size:
        raise DataError(
            f"{path}: truncated: expected a header of {HEADER.size} bytes, found {len(raw)}; copy or build "
            "the index again"
        )
    _, version, code, sequences, boundaries = HEADER.unpack(raw)
    if version != VERSION:
        raise DataError(f"{path}: expected version {VERSION}, found {version}; build the index again")
    if code not in DTYPES:
        floats = {6: " (float64)", 7: " (float32)"}.get(code, "")
        raise DataError(
            f"{path}: expected an integer dtype code ({', '.join(map(str, DTYPES))}), found {code}{floats}: it "
            "holds no token ids; give an index of text"
        )
    header = Header(DTYPES[code], sequences, boundaries)
    if size not in (header.end, header.end + sequences):
        fault = "truncated" if size < header.end else "too long"
        raise DataError(
            f"{path}: {fault}: {sequences} sequences and {boundaries} boundaries make {header.end} bytes, found "
            f"{size}; copy or build the index again"
        )
    if boundaries < 1:
        raise DataError(f"{path}: expected at least one document boundary, found none; build the index again")
    return header
