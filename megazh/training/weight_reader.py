"""Reads the weights of a checkpoint range by range, so that a model need not fit the memory.

Low-rank pairs of a LoRA run are merged into the matrices as these are read.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from megazh.config import from_mapping
from megazh.errors import DataError, UsageError
from megazh.model.config import ModelConfig
from megazh.model.lora_config import PART, LoraConfig, places
from megazh.tensor_file import DTYPES, TensorReader
from megazh.training.checkpoint_list import MANIFEST, CheckpointManifest, FileEntry, TensorEntry
from megazh.training.checkpoint_read import fault_of, shape_in_file

_BLOCK = 1 << 22  # numbers that are read at a time


class WeightReader:
    """The weights of a checkpoint, open for reading.

    Args:
        checkpoint: the checkpoint. Files that its manifest names by absolute paths may lie elsewhere.
        manifest: its manifest.
        kinds: kinds of tensors, of which the first is read that a parameter has.

    Raises:
        DataError: a file cannot be read.
    """

    def __init__(self, checkpoint: Path, manifest: CheckpointManifest, *kinds: str) -> None:
        self._checkpoint = checkpoint
        self._entries: dict[str, TensorEntry] = {}
        for kind in reversed(kinds):
            self._entries |= {entry.parameter: entry for entry in manifest.tensors if entry.kind == kind}
        names = {piece.file for entry in self._entries.values() for piece in entry.pieces}
        self._pairs = _pairs(manifest, self._entries)
        self.files: list[FileEntry] = [entry for entry in manifest.files if entry.name in names]
        """The files that are read, as far as their hashes are known."""
        self._names, self._readers, self._stack = sorted(names), dict[str, TensorReader](), ExitStack()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of the merged model by name, without rows that only pad them."""
        return {name: tuple(entry.shape) for name, entry in self._entries.items() if PART not in name}

    def check(self, on_bytes: Callable[[int], None]) -> None:
        """Compare the files with their hashes; `on_bytes` is called with the size of each block read.

        Raises:
            DataError: the content of a file has changed.
        """
        for entry in self.files:
            if fault := fault_of(self._checkpoint, entry, on_bytes):
                raise DataError(f"{fault}; take another checkpoint")

    def blocks(
        self, parameter: str, begin: int = 0, end: int | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[torch.Tensor]:
        """Read a range of a parameter, counted in the flattened parameter; by default all of it.

        Args:
            parameter: its name.
            begin, end: first number of the range, and the one behind its last.
            dtype: dtype of the numbers. Default: that of the file.

        Yields:
            1-D tensors on the CPU, one behind the other.

        Raises:
            DataError: the file holds something else than the manifest names.
        """
        end = math.prod(self._entry(parameter).shape) if end is None else end
        dtype = dtype or self.dtype(parameter)
        if parameter not in self._pairs:
            for stored in self.stored(parameter, begin, end):
                yield stored.to(dtype)
            return
        width = self._entry(parameter).shape[1]
        rows = max(1, _BLOCK // width)
        for row in range(begin // width, -(-end // width), rows):
            last = min(row + rows, -(-end // width))
            block = torch.cat(list(self.stored(parameter, row * width, last * width))).view(-1, width)
            merged = self._merged(parameter, block.float(), row).reshape(-1)
            yield merged[max(0, begin - row * width) : end - row * width].to(dtype)

    def _merged(self, parameter: str, block: torch.Tensor, first: int) -> torch.Tensor:
        """Rows of a matrix from `first` on, in fp32, with what its pairs add to them."""
        merged = block.clone()
        for name, begin, end, scale in self._pairs[parameter]:
            low, high = max(begin, first), min(end, first + len(block))
            if low < high:
                a, b = (self._whole(f"{name}.{which}") for which in "ab")
                merged[low - first : high - first] += scale * (b[low - begin : high - begin] @ a)
        return merged

    def _whole(self, parameter: str) -> torch.Tensor:
        return torch.cat(list(self.stored(parameter))).view(self._entry(parameter).shape).float()

    def stored(self, parameter: str, begin: int = 0, end: int | None = None) -> Iterator[torch.Tensor]:
        """A range of a parameter as the files hold it, without its pairs; see `blocks`."""
        entry = self._entry(parameter)
        end = math.prod(entry.shape) if end is None else end
        for piece in sorted(entry.pieces, key=lambda piece: piece.begin):
            shape = shape_in_file(entry, piece)
            first, last = max(begin, piece.begin), min(end, piece.end)
            for start in range(first, last, _BLOCK):
                stop = min(start + _BLOCK, last)
                yield self._readers[piece.file].read(
                    piece.key, entry.dtype, shape, start - piece.begin, stop - piece.begin
                )

    def dtype(self, parameter: str) -> torch.dtype:
        """Dtype of a parameter in the file."""
        name = self._entry(parameter).dtype
        return next(dtype for dtype, known in DTYPES.items() if known == name)

    def _entry(self, parameter: str) -> TensorEntry:
        if parameter not in self._entries:
            raise DataError(f"{self._checkpoint / MANIFEST}: names no {parameter}: it is of another model")
        return self._entries[parameter]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._readers = {name: stack.enter_context(TensorReader(self._checkpoint / name)) for name in self._names}
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _pairs(
    manifest: CheckpointManifest, entries: Mapping[str, TensorEntry]
) -> dict[str, list[tuple[str, int, int, float]]]:
    """The low-rank pairs of a checkpoint by matrix: name, rows from and to, and scale of each."""
    if not any(PART in name for name in entries):
        return {}
    try:
        lora = from_mapping(manifest.recipe["lora"], LoraConfig, "recipe")
        model = from_mapping(manifest.recipe["model"], ModelConfig, "recipe")
        found: dict[str, list[tuple[str, int, int, float]]] = {}
        for block in range(model.num_hidden_layers):
            for place in places(model, lora):
                matrix = f"blocks.{block}.{place.product}"
                pair = (f"{matrix}{PART}{place.target}", place.begin, place.end, lora.scale)
                found.setdefault(f"{matrix}.weight", []).append(pair)
    except (KeyError, ZeroDivisionError, UsageError) as error:
        raise DataError(f"{MANIFEST}: does not describe its low-rank pairs: {error}") from None
    return found
