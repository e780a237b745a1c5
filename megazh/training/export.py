"""Exports a trained model as a Hugging Face folder, parameter by parameter: no model is in memory as a whole."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megazh.errors import DataError, UsageError
from megazh.exchange.families import Family, choose_family
from megazh.exchange.generation_config import GENERATION, generation_config
from megazh.exchange.hf_config import CONFIG, hf_config
from megazh.exchange.shards import StreamedTensor, write_shards
from megazh.exchange.tensor_names import HfTensor, hf_tensors
from megazh.exchange.tokenizer_files import write_tokenizer_files
from megazh.files import new_folder, write_atomic
from megazh.pipeline.precision import Dtype
from megazh.progress import Progress
from megazh.tokenizer import Tokenizer
from megazh.training.checkpoint_list import MANIFEST
from megazh.training.model_card import MODEL_CARD, model_card
from megazh.training.model_source import ModelSource
from megazh.training.weight_reader import WeightReader
from megazh.writing import check_room, check_writable

SHARD_BYTES = 5 * 10**9
"""Usual size of a file of weights."""


@dataclass(frozen=True)
class ExportOptions:
    """Choices of an export."""

    dtype: Dtype | None = None
    """Dtype of the weights in the folder; fp32 takes the fp32 masters where there are any. Default: the dtype that the
    model computes in."""
    shard_bytes: int = SHARD_BYTES
    """Largest size of a file of weights."""
    family: Family | None = None
    """Family of the exported model. Default: the first that can express it."""
    force: bool = False
    """Whether a folder of an earlier export is replaced."""


@dataclass(frozen=True)
class Exported:
    """An export that is done."""

    family: Family
    dtype: Dtype
    parameters: int
    bytes: int
    """Size of all files with weights."""
    files: int
    """Number of files with weights."""


def export_to_hf(source: ModelSource, target: Path, options: ExportOptions) -> Exported:
    """Write a model as a folder that transformers and vLLM load. It appears under its name once it is whole.

    Args:
        source: the model.
        target: the folder to make.
        options: the choices.

    Raises:
        UsageError: no family can express the model, its tokenizer cannot be written with the same ids, or the folder
            holds something else.
        DataError: a file of the checkpoint is damaged, or does not fit its model.
        WriteError: the folder cannot be written.
    """
    family = choose_family(source.model, options.family)
    check_target(target, options.force)
    dtype = options.dtype or Dtype(source.manifest.precision)
    tensors = hf_tensors(source.model)
    size = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.bytes
    check_room(target, size)
    tokenizer = source.run.tokenizer() if source.run is not None else None
    with WeightReader(source.path, source.manifest, masters=dtype is Dtype.FP32) as reader:
        _check_shapes(source, reader, tensors)
        streamed = [_streamed(reader, tensor, dtype.torch) for tensor in tensors]
        checked = sum(entry.bytes for entry in reader.files)
        with Progress("export", checked + size) as progress, new_folder(target) as folder:
            _write_descriptions(folder, source, family, dtype, tokenizer, target.absolute().name)
            reader.check(progress.advance)
            files = write_shards(folder, streamed, options.shard_bytes, progress.advance)
    return Exported(family, dtype, size // dtype.bytes, size, len(files))


def check_target(target: Path, force: bool) -> None:
    """Check that a folder can be made, or replaced: an empty one, or with `force` one that holds a model.

    Raises:
        UsageError: it is a file, holds something, or cannot be written.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file; give the name of a folder that does not exist yet")
    names = sorted(each.name for each in target.iterdir()) if target.exists() else []
    if names and not force:
        raise UsageError(f"{target}: holds {names[0]} already; give another folder, or replace it with --force")
    if names and (CONFIG not in names or not any(name.endswith(".safetensors") for name in names)):
        raise UsageError(f"{target}: holds {names[0]}, and no exported model: --force does not replace it; remove it")
    check_writable(target.absolute().parent, "give another folder")


def _check_shapes(source: ModelSource, reader: WeightReader, tensors: list[HfTensor]) -> None:
    wanted = {tensor.parameter: tensor.parameter_shape for tensor in tensors}
    for name in sorted({*wanted, *reader.shapes}):
        there, here = reader.shapes.get(name), wanted.get(name)
        if there != here:
            raise DataError(
                f"{source.path / MANIFEST}: {name} has {_shape(there)} in it, and {_shape(here)} in the model that it "
                "describes: it is damaged; take another checkpoint"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no place" if shape is None else f"shape {list(shape)}"


def _streamed(reader: WeightReader, tensor: HfTensor, dtype: torch.dtype) -> StreamedTensor:
    row = math.prod(tensor.parameter_shape[1:])

    def blocks() -> Iterator[torch.Tensor]:
        for block in reader.blocks(tensor.parameter, tensor.begin * row, tensor.end * row):
            yield block.to(dtype)

    return StreamedTensor(tensor.name, tensor.shape, dtype, blocks)


def _write_descriptions(
    folder: Path, source: ModelSource, family: Family, dtype: Dtype, tokenizer: Tokenizer | None, name: str
) -> None:
    """Write the files beside the weights; those of the tokenizer where the model has one."""
    generation = generation_config(tokenizer) if tokenizer else {"eos_token_id": None, "pad_token_id": None}
    eos, pad = generation["eos_token_id"], generation["pad_token_id"]
    torch_name = str(dtype.torch).removeprefix("torch.")
    values = hf_config(source.model, family, source.trained_length, torch_name, eos, pad)
    write_atomic(folder / CONFIG, (json.dumps(values, indent=2) + "\n").encode())
    write_atomic(folder / MODEL_CARD, model_card(source, family, dtype, name).encode())
    if tokenizer is not None:
        write_atomic(folder / GENERATION, (json.dumps(generation, indent=2) + "\n").encode())
        write_tokenizer_files(tokenizer, folder, family, source.trained_length)
