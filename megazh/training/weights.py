"""Loads the weights of a checkpoint as one model in one process, and exports them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megazh.errors import DataError
from megazh.files import check_sha256
from megazh.model.decoder import Decoder
from megazh.model.layers import load_unpadded
from megazh.model.lora_config import PART
from megazh.pipeline.state import MASTER, WEIGHT
from megazh.tensor_file import NamedTensor, write_tensor_file
from megazh.training.checkpoint_list import MANIFEST, CheckpointManifest, read_manifest
from megazh.training.model_source import ModelSource
from megazh.training.weight_reader import WeightReader


def load_decoder(source: ModelSource, device: torch.device) -> Decoder:
    """Load a whole model, in the dtype that it was trained in, for generation (not for training).

    Weights in fp16, which only Hugging Face folders have, become fp32.

    Raises:
        DataError: a file is missing, damaged, or does not fit the model.
    """
    config = source.model
    model = Decoder(config, seed=None)
    check_shapes(source, unpadded_shapes(model))
    state = {}
    for name, values in _tensors(source.path, source.manifest, WEIGHT):
        state[name] = (values.float() if values.dtype == torch.float16 else values).to(device)
    if config.tie_word_embeddings:
        state["head.weight"] = state["embedding.weight"]
    load_unpadded(model, state)
    return model.eval()


def unpadded_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a model by name, without rows that only pad them."""
    return {
        name: (getattr(weight, "rows", len(weight)), *weight.shape[1:]) for name, weight in model.named_parameters()
    }


def check_shapes(source: ModelSource, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint holds the parameters of the model that it describes.

    Raises:
        DataError: it lacks one, has one more, or one of another shape.
    """
    stored = {
        entry.parameter: tuple(entry.shape)
        for entry in source.manifest.tensors
        if entry.kind == WEIGHT and PART not in entry.parameter
    }
    for name in sorted({**wanted, **stored}):
        if stored.get(name) != wanted.get(name):
            raise DataError(
                f"{source.path / MANIFEST}: {name} has {_shape(stored.get(name))} in it, and "
                f"{_shape(wanted.get(name))} in the model that it describes: it is damaged; remove {source.path} to "
                "use the one before it"
            )


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
    kinds = (MASTER, WEIGHT) if dtype is torch.float32 else (WEIGHT,)
    found = dict(_tensors(checkpoint, manifest, *kinds))
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


def _tensors(checkpoint: Path, manifest: CheckpointManifest, *kinds: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the first of these kinds that each has, whole, after their files' hashes have been checked."""
    with WeightReader(checkpoint, manifest, *kinds) as reader:
        for file in reader.files:
            check_sha256(checkpoint / file.name, file.sha256)
        for name, shape in reader.shapes.items():
            yield name, torch.cat(list(reader.blocks(name))).view(shape)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no place" if shape is None else f"shape {list(shape)}"
