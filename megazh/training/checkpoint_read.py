"""Reads a checkpoint into the state of a rank: from each file only the ranges that the rank needs, in any layout."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megazh.errors import DataError
from megazh.files import sha256_file
from megazh.model.lora_config import PART
from megazh.pipeline.state import MASTER, WEIGHT, Piece
from megazh.run.pulse import beat
from megazh.tensor_file import DTYPES, TensorReader
from megazh.training.checkpoint_list import CheckpointManifest, FileEntry, PieceEntry, TensorEntry
from megazh.training.collect import gather

_WEIGHTS = (WEIGHT, MASTER)


def find_damage(checkpoint: Path, manifest: CheckpointManifest) -> str:
    """Compare the files of a checkpoint with their hashes, each rank some of them. All ranks call it.

    Returns:
        What is wrong with the first file that differs; empty if none does. The same on all ranks.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = [
        fault
        for entry in manifest.files[rank::ranks]
        if (fault := fault_of(checkpoint, entry, lambda size: beat("checking a checkpoint")))
    ]
    return next((fault for faults in gather(own) for fault in faults), "")


def fault_of(checkpoint: Path, entry: FileEntry, on_bytes: Callable[[int], None] | None = None) -> str:
    """What is wrong with a file of a checkpoint; empty if its hash is right."""
    path = checkpoint / entry.name
    try:
        found = sha256_file(path, on_bytes)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return "" if found == entry.sha256 else f"{path}: its content has changed since it was written"


def shape_in_file(entry: TensorEntry, piece: PieceEntry) -> list[int]:
    """Shape of a piece in its file: rows of the parameter for a weight, and flat for the optimizer's state."""
    numbers = piece.end - piece.begin
    if entry.kind != WEIGHT:
        return [-(-numbers // entry.block)]
    return [numbers // math.prod(entry.shape[1:]), *entry.shape[1:]]


def load_checkpoint(
    optimizer: Any,
    checkpoint: Path,
    manifest: CheckpointManifest,
    log: Callable[[str], None],
    weights_only: bool = False,
) -> None:
    """Restore weights, masters and, where it is of the same optimizer, the optimizer's state. All ranks call it.

    Args:
        optimizer: what holds this rank's pieces: has `pieces_to_load()`, `name` and `updates`. Its state is new.
        checkpoint: the checkpoint, whose hashes have been checked.
        manifest: its manifest.
        log: prints a line once, on rank 0.
        weights_only: whether the optimizer's state is left as it is, clean.

    Raises:
        DataError: the checkpoint is of another model, or a file of it cannot be read; all ranks raise the same error.
    """
    pieces, failure = optimizer.pieces_to_load(), ""
    if weights_only:  # low-rank pairs begin beside the weights of a checkpoint that has none
        pieces = [piece for piece in pieces if PART not in piece.parameter]
    entries = {(entry.parameter, entry.kind): entry for entry in manifest.tensors}
    state = [piece for piece in pieces if piece.kind not in _WEIGHTS]
    missing = "" if weights_only else _why_clean(optimizer, manifest, state, entries)
    why = "" if weights_only else next(filter(None, gather(missing)), "")
    clean = weights_only or bool(why)
    try:
        wanted = [
            (piece, _source(checkpoint, piece, entries)) for piece in pieces if not clean or piece.kind in _WEIGHTS
        ]
        _read(checkpoint, wanted)
    except DataError as error:
        failure = str(error)
    if failure := next(filter(None, gather(failure)), ""):
        raise DataError(failure)
    optimizer.updates = 0 if clean else manifest.updates
    if why:
        log(f"{checkpoint.name}: {why}: weights are taken from it, and the state of {optimizer.name} starts clean")


def _why_clean(
    optimizer: Any, manifest: CheckpointManifest, state: Sequence[Piece], entries: dict[tuple[str, str], TensorEntry]
) -> str:
    """Why the optimizer's state cannot be taken from a checkpoint; empty if it can."""
    if manifest.optimizer != optimizer.name:
        return f"was saved with the optimizer {manifest.optimizer}"
    for piece in state:
        entry = entries.get((piece.parameter, piece.kind))
        if entry is None:
            return f"has no {piece.kind} of {piece.parameter}"
        if (entry.block, entry.dtype) != (piece.block, DTYPES[piece.values.dtype]):
            return f"has {piece.kind} of {piece.parameter} as {entry.dtype} per {entry.block} elements"
    return ""


def _source(checkpoint: Path, piece: Piece, entries: dict[tuple[str, str], TensorEntry]) -> TensorEntry:
    """The tensor that a piece is read from: weights and masters stand in for one another."""
    kinds = [piece.kind]
    if piece.kind == MASTER or (piece.kind == WEIGHT and piece.values.dtype == torch.float32):
        kinds = [MASTER, WEIGHT]
    entry = next((entries[piece.parameter, kind] for kind in kinds if (piece.parameter, kind) in entries), None)
    if entry is None:
        raise DataError(f"{checkpoint}: holds no {piece.kind} of {piece.parameter}: it is of another model")
    if tuple(entry.shape) != piece.shape:
        raise DataError(
            f"{checkpoint}: {piece.parameter} has shape {entry.shape} in it, and {list(piece.shape)} in this model"
        )
    return entry


def _read(checkpoint: Path, wanted: Sequence[tuple[Piece, TensorEntry]]) -> None:
    """Copy into each piece what the files hold of it, file by file."""
    by_file: dict[str, list[tuple[Piece, TensorEntry, Any]]] = {}
    for piece, entry in wanted:
        for stored in entry.pieces:
            if stored.begin < piece.end and piece.begin < stored.end:
                by_file.setdefault(stored.file, []).append((piece, entry, stored))
    for name, parts in sorted(by_file.items()):
        with TensorReader(checkpoint / name) as reader:
            for piece, entry, stored in parts:
                beat("loading a checkpoint")
                begin, end = max(piece.begin, stored.begin), min(piece.end, stored.end)
                shape = shape_in_file(entry, stored)
                first, last = (begin - stored.begin) // entry.block, -(-(end - stored.begin) // entry.block)
                found = reader.read(stored.key, entry.dtype, shape, first, last)
                place = (begin - piece.begin) // piece.block
                with torch.no_grad():
                    piece.values[place : place + found.numel()].copy_(found)
