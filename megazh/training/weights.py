"""Loads the weights of a checkpoint as one model in one process, and exports them."""

from collections.abc import Iterator
from pathlib import Path

import torch

from megazh.errors import DataError
from megazh.files import check_sha256
from megazh.model.decoder import Decoder
from megazh.model.layers import load_unpadded
from megazh.pipeline.state import MASTER, WEIGHT
from megazh.tensor_file import DTYPES, NamedTensor, TensorReader, write_tensor_file
from megazh.training.checkpoint_list import MANIFEST, CheckpointManifest, TensorEntry, read_manifest
from megazh.training.recipe import Recipe


def load_decoder(checkpoint: Path, recipe: Recipe, device: torch.device) -> Decoder:
    """Load the whole model of a checkpoint, in the dtype that it was trained in, for generation (not for training).

    Raises:
        DataError: a file is missing, damaged, or does not fit the model.
    """
    manifest = read_manifest(checkpoint)
    model = Decoder(recipe.model, seed=None)
    wanted = {
        name: (getattr(weight, "rows", len(weight)), *weight.shape[1:]) for name, weight in model.named_parameters()
    }
    stored = {entry.parameter: tuple(entry.shape) for entry in manifest.tensors if entry.kind == WEIGHT}
    for name in sorted({**wanted, **stored}):
        if stored.get(name) != wanted.get(name):
            raise DataError(
                f"{checkpoint / MANIFEST}: {name} has {_shape(stored.get(name))} in it, and {_shape(wanted.get(name))} "
                f"in the model of the run: the checkpoint belongs to another model; remove {checkpoint} to use the one "
                "before it"
            )
    state = {name: values.to(device) for name, values in _tensors(checkpoint, manifest, WEIGHT)}
    if recipe.model.tie_word_embeddings:
        state["head.weight"] = state["embedding.weight"]
    load_unpadded(model, state)
    return model.eval()


def export_weights(checkpoint: Path, target: Path, dtype: torch.dtype) -> int:
    """Write the weights of a checkpoint to one safetensors file, named as in `Decoder`; returns their number.

    Args:
        checkpoint: the checkpoint.
        target: the file to write, by a rename once it is whole.
        dtype: bf16, or fp32, for which the fp32 masters are taken where the checkpoint has them.

    Raises:
        DataError: a file of the checkpoint is missing or damaged.
        OSError: the file cannot be written.
    """
    manifest = read_manifest(checkpoint)
    masters = {entry.parameter for entry in manifest.tensors if entry.kind == MASTER}
    found = dict(_tensors(checkpoint, manifest, WEIGHT))
    if dtype is torch.float32 and masters:
        found.update(_tensors(checkpoint, manifest, MASTER))
    tensors = [
        NamedTensor(name, tuple(values.shape), values.to(dtype).reshape(-1)) for name, values in sorted(found.items())
    ]
    temporary = target.with_name(f".{target.name}.unfinished")
    try:
        write_tensor_file(temporary, tensors)
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return sum(tensor.values.numel() for tensor in tensors)


def _tensors(checkpoint: Path, manifest: CheckpointManifest, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a kind, whole, after their files' hashes have been checked."""
    entries = [entry for entry in manifest.tensors if entry.kind == kind]
    hashes = {entry.name: entry.sha256 for entry in manifest.files}
    readers: dict[str, TensorReader] = {}
    for name in {piece.file for entry in entries for piece in entry.pieces}:
        check_sha256(checkpoint / name, hashes[name])
        readers[name] = TensorReader(checkpoint / name)
    for entry in entries:
        yield entry.parameter, _whole(entry, readers)


def _whole(entry: TensorEntry, readers: dict[str, TensorReader]) -> torch.Tensor:
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    parts = []
    for piece in sorted(entry.pieces, key=lambda piece: piece.begin):
        shape = entry.shape if entry.kind == WEIGHT else [piece.end - piece.begin]
        parts.append(readers[piece.file].read(piece.key, entry.dtype, shape))
    return torch.cat(parts).to(dtypes[entry.dtype]).view(entry.shape)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no place" if shape is None else f"shape {list(shape)}"
