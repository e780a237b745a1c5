"""Writer of safetensors files whose tensors need not be in memory, and of the shards of a Hugging Face model."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megazh.files import HashedFile, write_atomic
from megazh.tensor_file import NamedTensor, bytes_of, header_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names of the file of a model in one shard, and of the index of a model in several."""


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor for a file, whose numbers come in blocks when they are written."""

    key: str
    """Name of the tensor in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[torch.Tensor]]
    """The numbers in their order, as 1-D tensors of this dtype on the CPU."""

    @property
    def bytes(self) -> int:
        """Size of its numbers."""
        return self._empty.nbytes

    @property
    def _empty(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def named(self) -> NamedTensor:
        """Name, shape and dtype, without numbers: enough for the header of a file."""
        return NamedTensor(self.key, self.shape, self._empty)


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written."""

    name: str
    bytes: int
    sha256: str


def write_streamed(
    path: Path,
    tensors: Sequence[StreamedTensor],
    on_bytes: Callable[[int], None],
    metadata: Mapping[str, str] | None = None,
) -> WrittenFile:
    """Write a file of tensors, one block of one tensor in memory at a time, flushed to disk.

    Args:
        path: the file.
        tensors: its tensors; those of wide dtypes first, so that each begins at a multiple of its width.
        on_bytes: called with the size of each block written.
        metadata: texts by key for the header.

    Raises:
        ValueError: the blocks of a tensor are of another dtype, or not as many numbers as it has.
        WriteError: the file cannot be written; nothing is left of it.
    """
    file = HashedFile(path)
    try:
        file.write(header_of([tensor.named() for tensor in tensors], metadata))
        for tensor in tensors:
            written = 0
            for block in tensor.blocks():
                if block.dtype != tensor.dtype:
                    raise ValueError(f"{tensor.key}: a block of {block.dtype}, expected {tensor.dtype}")
                file.write(bytes_of(block))
                written += block.nbytes
                on_bytes(block.nbytes)
            if written != tensor.bytes:
                raise ValueError(f"{tensor.key}: {written} bytes in its blocks, expected {tensor.bytes}")
        file.close()
    except BaseException:
        file.discard()
        raise
    return WrittenFile(path.name, file.size, file.sha256)


def write_shards(
    folder: Path, tensors: Sequence[StreamedTensor], shard_bytes: int, on_bytes: Callable[[int], None]
) -> list[str]:
    """Write a model as `model.safetensors`, or as several files of that size and their index.

    Args:
        folder: the folder, which exists.
        tensors: the tensors in the order of the model.
        shard_bytes: largest size of the numbers in a file; a larger tensor has a file of its own.
        on_bytes: see `write_streamed`.

    Returns:
        The names of the files with tensors.

    Raises:
        WriteError: a file cannot be written.
    """
    shards = _split(tensors, shard_bytes)
    if len(shards) == 1:
        return [write_streamed(folder / SINGLE, shards[0], on_bytes).name]
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_streamed(folder / name, shard, on_bytes)
        places |= {tensor.key: name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors)}, "weight_map": places}
    write_atomic(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return list(dict.fromkeys(places.values()))


def _split(tensors: Sequence[StreamedTensor], limit: int) -> list[list[StreamedTensor]]:
    shards: list[list[StreamedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards
