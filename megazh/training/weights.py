"""Loads the weights of a checkpoint as one model in one process; reads tensors and plain values, never code."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megazh.errors import DataError
from megazh.files import check_sha256
from megazh.model.decoder import Decoder
from megazh.model.layers import layer_count
from megazh.training.checkpoint_list import MANIFEST, STATE, read_manifest
from megazh.training.recipe import Recipe


def load_decoder(checkpoint: Path, recipe: Recipe, device: torch.device) -> Decoder:
    """Load the whole model of a checkpoint, in the dtype that it was trained in, for generation (not for training).

    Raises:
        DataError: a file is missing, damaged, or does not fit the model.
    """
    hashes = {entry.name: entry.sha256 for entry in read_manifest(checkpoint).files}
    model = Decoder(recipe.model, seed=None)
    last = layer_count(recipe.model) - 1
    layers = {0: model.embedding, last - 1: model.norm}
    layers.update({number + 1: block for number, block in enumerate(model.blocks)})
    if not recipe.model.tie_word_embeddings:
        layers[last] = model.head
    for number, layer in layers.items():
        name = f"{STATE}/layer_{number:02d}-model_states.pt"
        path = checkpoint / name
        if name not in hashes:
            raise DataError(
                f"{path}: missing in {checkpoint / MANIFEST}: the checkpoint belongs to another model; remove "
                f"{checkpoint} to use the one before it"
            )
        check_sha256(path, hashes[name])
        try:
            layer.load_state_dict(load_tensors(path, device), assign=True)
        except (RuntimeError, KeyError, AttributeError, TypeError) as error:
            if is_of_device(error):
                raise
            raise DataError(f"{path}: does not fit the model: {' '.join(str(error).split())[:200]}") from None
    return model.eval()


def load_tensors(path: Path, map_location: Any = None, allowed: Sequence[Any] = ()) -> Any:
    """Read a file of a checkpoint without executing anything that it holds.

    Args:
        path: the file.
        map_location: as for `torch.load`.
        allowed: types that the file may hold besides tensors and plain values.

    Raises:
        DataError: the file holds anything else, or is damaged.
    """
    with torch.serialization.safe_globals(list(allowed)):
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        except Exception as error:  # pickle, zip and torch raise many types
            if is_of_device(error):
                raise
            unpickler = re.search(r"WeightsUnpickler error: (.*?)(?:\. |$)", str(error), re.MULTILINE)
            reason = unpickler[1] if unpickler else (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{path}: not a checkpoint file: {reason}") from None


def is_of_device(error: Exception) -> bool:
    """Whether an exception tells of the memory or of a failing GPU, and not of what was read."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and ("CUDA" in str(error) or "not enough memory" in str(error))
