"""Exports a trained model as a Hugging Face folder, parameter by parameter: no model is in memory as a whole."""

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megazh.errors import UsageError
from megazh.exchange.chat_template import write_chat_template
from megazh.exchange.families import Family, choose_family
from megazh.exchange.generation_config import GENERATION, generation_config
from megazh.exchange.hf_config import CONFIG, hf_config, read_hf_config
from megazh.exchange.hf_folder import BESIDE, copy_beside
from megazh.exchange.shards import INDEX, StreamedTensor, write_shards
from megazh.exchange.tensor_names import HfTensor, hf_tensors
from megazh.exchange.tokenizer_files import write_tokenizer_files
from megazh.files import new_folder, write_atomic
from megazh.pipeline.precision import Dtype
from megazh.pipeline.state import MASTER, WEIGHT
from megazh.progress import Progress
from megazh.training.model_card import MODEL_CARD, model_card
from megazh.training.model_source import ModelSource
from megazh.training.weight_reader import WeightReader
from megazh.training.weights import check_shapes
from megazh.writing import check_room, check_writable

SHARD_BYTES = 5 * 10**9
"""Usual size of a file of weights."""
_WEIGHTS = ".safetensors"
_WRITTEN = {CONFIG, INDEX, MODEL_CARD, *BESIDE}
"""Names of what an export writes beside the files of weights."""


@dataclass(frozen=True)
class ExportOptions:
    """Choices of an export."""

    dtype: Dtype | None = None
    """Dtype of the weights in the folder; fp32 takes the fp32 masters where there are any. Default: the dtype that the
    model computes in."""
    shard_bytes: int = SHARD_BYTES
    """Largest size of a file of weights."""
    family: Family | None = None
    """Family of the exported model. Default: the one that it was imported as, else the first that can express it."""
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
    family = choose_family(source.model, options.family or _family_of(source))
    check_target(target, options.force)
    if source.path.resolve() == target.resolve():
        raise UsageError(f"{target}: is the model that is read; give another folder")
    dtype = options.dtype or Dtype(source.manifest.precision)
    tensors = hf_tensors(source.model)
    size = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.bytes
    check_room(target, size)
    check_shapes(source, {tensor.parameter: tensor.parameter_shape for tensor in tensors})
    kinds = (MASTER, WEIGHT) if dtype is Dtype.FP32 else (WEIGHT,)
    with WeightReader(source.path, source.manifest, *kinds) as reader:
        streamed = [_streamed(reader, tensor, dtype.torch) for tensor in tensors]
        checked = sum(entry.bytes for entry in reader.files)
        with Progress("export", checked + size) as progress, new_folder(target) as folder:
            _write_descriptions(folder, source, family, dtype)
            write_atomic(folder / MODEL_CARD, model_card(source, family, dtype, target.absolute().name).encode())
            reader.check(progress.advance)
            files = write_shards(folder, streamed, options.shard_bytes, progress.advance)
    return Exported(family, dtype, size // dtype.bytes, size, len(files))


def check_target(
    target: Path, force: bool, written: Collection[str] = _WRITTEN, needed: Collection[str] = (CONFIG, MODEL_CARD)
) -> None:
    """Check that a folder can be made, or replaced: an empty one, or with `force` one that holds an export alone.

    Args:
        target: the folder.
        force: whether it may be replaced.
        written: names of what an export writes beside files of weights.
        needed: those of them that every export has.

    Raises:
        UsageError: it is a file, holds something, or cannot be written.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file; give the name of a folder that does not exist yet")
    names = sorted(each.name for each in target.iterdir()) if target.exists() else []
    if names and not force:
        raise UsageError(f"{target}: holds {names[0]} already; give another folder, or replace it with --force")
    whole = {*needed} <= {*names} and any(name.endswith(_WEIGHTS) for name in names)
    foreign = [name for name in names if name not in written and not name.endswith(_WEIGHTS)]
    if names and (foreign or not whole):
        raise UsageError(
            f"{target}: holds {(foreign or names)[0]}, and no export alone: --force does not replace it; give another "
            "folder, or remove it"
        )
    check_writable(target.absolute().parent, "give another folder")


def _family_of(source: ModelSource) -> Family | None:
    """Family of a model that comes from a Hugging Face folder; None for others."""
    return None if source.hf_files is None else Family(read_hf_config(source.hf_files)["model_type"])


def _streamed(reader: WeightReader, tensor: HfTensor, dtype: torch.dtype) -> StreamedTensor:
    row = math.prod(tensor.parameter_shape[1:])

    def blocks() -> Iterator[torch.Tensor]:
        yield from reader.blocks(tensor.parameter, tensor.begin * row, tensor.end * row, dtype)

    return StreamedTensor(tensor.name, tensor.shape, dtype, blocks)


def _write_descriptions(folder: Path, source: ModelSource, family: Family, dtype: Dtype) -> None:
    """Write the files beside the weights: those of a Hugging Face folder as they were there, else new ones."""
    ids: dict[str, Any] = {"eos_token_id": None, "pad_token_id": None, "bos_token_id": None}
    template = source.manifest.template
    if source.hf_files is not None:
        copy_beside(source.hf_files, folder)
        before = read_hf_config(source.hf_files)
        ids = {name: before.get(name) for name in ids}
        if template is not None:  # that of an adapter
            write_chat_template(folder, template.jinja)
    elif source.run is not None:
        write_tokenizer_files(
            source.tokenizer(), folder, family, source.trained_length, None if template is None else template.jinja
        )
    if source.run is not None or (source.hf_files is not None and template is not None):
        generation = generation_config(source.tokenizer(), None if template is None else template.stop)
        write_atomic(folder / GENERATION, (json.dumps(generation, indent=2) + "\n").encode())
        ids |= {name: generation.get(name) for name in ids}
    values = hf_config(
        source.model,
        family,
        source.trained_length,
        str(dtype.torch).removeprefix("torch."),
        ids["eos_token_id"],
        ids["pad_token_id"],
        ids["bos_token_id"],
    )
    write_atomic(folder / CONFIG, (json.dumps(values, indent=2) + "\n").encode())
