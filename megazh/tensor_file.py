"""Files of named tensors in the safetensors format: written in one pass with their hash, read without executing code.

Format: https://huggingface.co/docs/safetensors/index#format. A file is the length of its header (8 bytes, little
endian), the header in JSON with dtype, shape and place of each tensor, and the numbers.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from megazh.errors import DataError
from megazh.writing import write_all

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names that the format gives to dtypes."""
_BLOCK = 1 << 22  # bytes that are hashed and written at a time


@dataclass(frozen=True)
class NamedTensor:
    """A tensor for a file."""

    key: str
    """Name of the tensor in the file."""
    shape: tuple[int, ...]
    """Shape that the file gives it."""
    values: torch.Tensor
    """The numbers, flat and contiguous, on the CPU where they are to be written."""


def header_of(tensors: Sequence[NamedTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The beginning of a file of these tensors, in this order, up to their numbers.

    Args:
        tensors: the tensors.
        metadata: texts by key that the header holds as well.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    place = 0
    for tensor in tensors:
        end = place + tensor.values.nbytes
        header[tensor.key] = {
            "dtype": DTYPES[tensor.values.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(tensors: Sequence[NamedTensor]) -> int:
    """Size of the file of these tensors."""
    return len(header_of(tensors)) + sum(tensor.values.nbytes for tensor in tensors)


def write_tensor_file(
    path: Path, tensors: Sequence[NamedTensor], on_bytes: Callable[[int], object] = lambda size: None
) -> str:
    """Write a file, flushed to disk; returns its SHA-256 as hex.

    Give tensors of wide dtypes first, so that each begins at a multiple of its width. `on_bytes` is called with the
    size of each block written.

    Raises:
        OSError: it cannot be written.
    """
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for data in (memoryview(header_of(tensors)), *(bytes_of(tensor.values) for tensor in tensors)):
            for begin in range(0, len(data), _BLOCK):
                block = data[begin : begin + _BLOCK]
                digest.update(block)
                write_all(file, block)
                on_bytes(len(block))
        os.fsync(file.fileno())
    return digest.hexdigest()


def bytes_of(values: torch.Tensor) -> memoryview:
    """The bytes of the numbers of a tensor on the CPU, in their order."""
    return memoryview(values.detach().reshape(-1).view(torch.uint8).numpy())


class TensorReader:
    """A file of tensors, open for reading.

    Raises:
        DataError: the file cannot be read, or is none of this format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            self._keys = set(self._file.keys())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        except SafetensorError as error:
            raise DataError(f"{path}: not a file of tensors: {error}") from None

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype, as the format names it, and shape of each tensor, by name."""
        slices = {key: self._file.get_slice(key) for key in sorted(self._keys)}
        return {key: (found.get_dtype(), tuple(found.get_shape())) for key, found in slices.items()}

    def metadata(self) -> dict[str, str]:
        """The texts in the header, by key."""
        return self._file.metadata() or {}

    def read(self, key: str, dtype: str, shape: Sequence[int], begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Read a range of a tensor.

        Args:
            key: its name.
            dtype: its dtype as the format names it.
            shape: its shape.
            begin: first number of the range, counted in the flattened tensor.
            end: number behind the last. Default: to the end.

        Returns:
            1-D, on the CPU.

        Raises:
            DataError: the file holds no such tensor, or another dtype or shape.
        """
        if key not in self._keys:
            raise DataError(f"{self._path}: holds no {key}")
        try:
            found = self._file.get_slice(key)
            there = (found.get_dtype(), list(found.get_shape()))
            if there != (dtype, list(shape)):
                raise DataError(
                    f"{self._path}: {key} is {there[0]} {there[1]}, and the manifest names {dtype} {list(shape)}"
                )
            if len(shape) == 0:
                return self._file.get_tensor(key).reshape(1)
            row = 1
            for size in shape[1:]:
                row *= size
            end = row * shape[0] if end is None else end
            first = begin // row
            rows = found[first : -(-end // row)]
        except SafetensorError as error:
            raise DataError(f"{self._path}: {key} cannot be read: {error}") from None
        return rows.reshape(-1)[begin - first * row : end - first * row]

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)
