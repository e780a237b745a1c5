"""This rank's part of a checkpoint: a copy of its pieces in host memory, and the files that a thread writes from it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megazh.files import fsync_directory
from megazh.pipeline.sharded_optimizer import layer_of
from megazh.pipeline.state import WEIGHT, Piece
from megazh.run.pulse import beat
from megazh.tensor_file import DTYPES, NamedTensor, file_bytes, write_tensor_file
from megazh.training.checkpoint_list import OPTIMIZER, WEIGHTS, FileEntry, PieceEntry, TensorEntry

_ALIGNMENT = 64  # bytes; every dtype's width divides it


@dataclass(frozen=True)
class Written:
    """What a rank has written of a checkpoint."""

    files: list[FileEntry]
    tensors: list[TensorEntry]
    """Tensors with this rank's pieces alone."""


class HostCopy:
    """A copy of a rank's pieces in host memory, as large as the pieces, which is kept from one save to the next.

    Args:
        pieces: the pieces; later copies read the memory that they view.
        rank: number of this rank, which its file of optimizer state is named after.
    """

    def __init__(self, pieces: Sequence[Piece], rank: int) -> None:
        self._pieces = sorted(pieces, key=lambda piece: -piece.values.element_size())
        on_gpu = any(piece.values.is_cuda for piece in pieces)
        sizes = [-(-piece.values.nbytes // _ALIGNMENT) * _ALIGNMENT for piece in self._pieces]
        self.memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=on_gpu)
        """All copies one behind the other, page-locked where the pieces are on a GPU."""
        self._files: dict[str, list[tuple[Piece, NamedTensor]]] = {}
        place = 0
        for piece, size in zip(self._pieces, sizes, strict=True):
            values = self.memory[place : place + piece.values.nbytes].view(piece.values.dtype)
            place += size
            name = _file_of(piece, rank)
            self._files.setdefault(name, []).append((piece, NamedTensor(_key_of(piece), _shape_in_file(piece), values)))
        self.bytes = sum(file_bytes([named for _, named in file]) for file in self._files.values())
        """Size of all files that this rank writes."""

    def take(self) -> None:
        """Copy the pieces as they are now; returns when the copy is there."""
        on_gpu = False
        for file in self._files.values():
            for piece, named in file:
                named.values.copy_(piece.values.detach(), non_blocking=True)
                on_gpu = on_gpu or piece.values.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()

    def write(self, folder: Path) -> Written:
        """Write this rank's files below `folder` and flush them to disk. Raises OSError."""
        files, tensors = [], []
        for name, pieces in sorted(self._files.items()):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            named = [each for _, each in pieces]
            digest = write_tensor_file(path, named, lambda size: beat("saving"))
            files.append(FileEntry(name=name, bytes=file_bytes(named), sha256=digest))
            tensors += [_entry(piece, each, name) for piece, each in pieces]
        for parent in {Path(name).parent for name in self._files}:
            fsync_directory(folder / parent)
        return Written(files, tensors)


def merged(parts: Sequence[Written]) -> Written:
    """What all ranks have written together: each tensor once, with the pieces of all of them."""
    tensors: dict[tuple[str, str], TensorEntry] = {}
    for entry in (entry for part in parts for entry in part.tensors):
        before = tensors.get((entry.parameter, entry.kind))
        pieces = sorted([*(before.pieces if before else []), *entry.pieces], key=lambda piece: piece.begin)
        tensors[entry.parameter, entry.kind] = entry.model_copy(update={"pieces": pieces})
    files = sorted((entry for part in parts for entry in part.files), key=lambda entry: entry.name)
    for one, other in itertools.pairwise(files):
        if one.name == other.name:
            raise ValueError(f"{one.name}: written by two ranks")
    return Written(files, [tensors[name] for name in sorted(tensors)])


def _file_of(piece: Piece, rank: int) -> str:
    if piece.stored_as is not None:
        return piece.stored_as.file
    if piece.kind == WEIGHT:
        return f"{WEIGHTS}/{layer_of(piece.parameter)}.safetensors"
    return f"{OPTIMIZER}/rank_{rank:05d}.safetensors"


def _key_of(piece: Piece) -> str:
    """Weights are named as in `Decoder`, so that other programs find them, or as those know them."""
    if piece.stored_as is not None:
        return piece.stored_as.key
    if piece.kind == WEIGHT:
        return piece.parameter
    return f"{piece.kind}/{piece.parameter}/{piece.begin}"


def _shape_in_file(piece: Piece) -> tuple[int, ...]:
    if piece.stored_as is not None:
        return piece.stored_as.shape
    if piece.kind != WEIGHT:
        return (piece.values.numel(),)
    if (piece.begin, piece.end) != (0, math.prod(piece.shape)):
        raise ValueError(f"{piece.parameter}: a rank is to write elements {piece.begin} up to {piece.end} of a weight")
    return piece.shape


def _entry(piece: Piece, named: NamedTensor, file: str) -> TensorEntry:
    return TensorEntry(
        parameter=piece.parameter,
        kind=piece.kind,
        dtype=DTYPES[named.values.dtype],
        shape=list(piece.shape),
        block=piece.block,
        pieces=[PieceEntry(file=file, key=named.key, begin=piece.begin, end=piece.end)],
    )
