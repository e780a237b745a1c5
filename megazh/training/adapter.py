"""Adapters of LoRA runs: exported from a checkpoint, and merged with their base.

An adapter names its base by the SHA-256 over the base's frozen weights, rounded to bf16: the same whether the base is a
checkpoint or a Hugging Face folder, in fp32 or in bf16. What `train_embed_norm` trains is whole in the adapter and does
not count.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megazh.config import from_mapping
from megazh.errors import DataError, UsageError
from megazh.exchange.adapter import (
    ADAPTER,
    ADAPTER_CONFIG,
    METADATA,
    AdapterFile,
    AdapterInfo,
    AdapterTensor,
    adapter_tensors,
    peft_config,
    read_adapter,
)
from megazh.exchange.families import choose_family
from megazh.exchange.shards import StreamedTensor, write_streamed
from megazh.files import new_folder, write_atomic
from megazh.model.lora_config import PART, LoraConfig, trains_with_embedding
from megazh.pipeline.precision import Dtype
from megazh.pipeline.state import MASTER, WEIGHT
from megazh.progress import Progress
from megazh.tensor_file import TensorReader, bytes_of
from megazh.training.checkpoint_list import MANIFEST, PieceEntry, TensorEntry
from megazh.training.export import check_target
from megazh.training.model_from import COMPUTED_WITH, FREE, POSITIONS, differences
from megazh.training.model_source import ModelSource
from megazh.training.weight_reader import WeightReader
from megazh.writing import check_room

_BLOCK = 1 << 22  # numbers that are checked at a time


def export_adapter(source: ModelSource, target: Path, dtype: Dtype | None = None, force: bool = False) -> AdapterInfo:
    """Write the trained weights of a LoRA run as a folder that PEFT loads. It appears under its name once it is whole.

    Args:
        source: a checkpoint of a LoRA run.
        target: the folder to make.
        dtype: dtype of the weights; fp32 takes the fp32 masters where there are any. Default: the dtype that the model
            computes in.
        force: whether a folder of an earlier export is replaced.

    Returns:
        The metadata of the adapter.

    Raises:
        UsageError: the model has no low-rank pairs, no family can express it, or the folder holds something else.
        DataError: a file of the checkpoint is damaged.
        WriteError: the folder cannot be written.
    """
    info = _info(source)
    choose_family(source.model, None)
    check_target(target, force, (ADAPTER_CONFIG,), (ADAPTER_CONFIG,))
    dtype = dtype or Dtype(source.manifest.precision)
    tensors = adapter_tensors(source.model, info.lora)
    kinds = (MASTER, WEIGHT) if dtype is Dtype.FP32 else (WEIGHT,)
    with WeightReader(source.path, source.manifest, *kinds) as reader:
        streamed = [_streamed(reader, tensor, dtype.torch) for tensor in tensors]
        size = sum(tensor.bytes for tensor in streamed)
        check_room(target, size)
        total = sum(entry.bytes for entry in reader.files) + _bytes(source, info.lora) + 2 * size
        with Progress("export", total) as progress, new_folder(target) as folder:
            reader.check(progress.advance)
            base, own = fingerprint(source, info.lora, progress.advance), _digest(streamed, progress.advance)
            info = info.model_copy(update={"fingerprint": base, "sha256": own})
            metadata = {METADATA: info.model_dump_json(exclude_none=True)}
            write_streamed(folder / ADAPTER, streamed, progress.advance, metadata)
            text = json.dumps(peft_config(info), indent=2) + "\n"
            write_atomic(folder / ADAPTER_CONFIG, text.encode())
    return info


def _info(source: ModelSource) -> AdapterInfo:
    """The metadata, without fingerprint and hash."""
    if not has_pairs(source):
        raise UsageError(
            f"{source.path}: has no low-rank pairs: its run trained all weights; export it as a whole with --to hf"
        )
    recipe = source.manifest.recipe
    try:
        lora = from_mapping(recipe["lora"], LoraConfig, "lora")
        base = str(recipe["checkpoint"]["initial_checkpoint"])
    except (KeyError, TypeError, UsageError) as error:
        raise DataError(f"{source.path / MANIFEST}: does not describe its low-rank pairs: {error}") from None
    return AdapterInfo(
        base=base,
        fingerprint="",
        sha256="",
        lora=lora,
        model=source.model,
        trained_length=source.trained_length,
        template=source.manifest.template,
    )


def has_pairs(source: ModelSource) -> bool:
    """Whether a model has low-rank pairs beside its weights."""
    return any(PART in entry.parameter for entry in source.manifest.tensors)


def _streamed(reader: WeightReader, tensor: AdapterTensor, dtype: torch.dtype) -> StreamedTensor:
    def blocks() -> Iterator[torch.Tensor]:
        yield from reader.blocks(tensor.parameter, dtype=dtype)

    return StreamedTensor(tensor.name, tensor.shape, dtype, blocks)


def _digest(tensors: Iterable[StreamedTensor], on_bytes: Callable[[int], None]) -> str:
    """SHA-256, as hex, of the bytes of some tensors: it stands in the header, in front of them."""
    digest = hashlib.sha256()
    for tensor in tensors:
        for block in tensor.blocks():
            digest.update(bytes_of(block))
            on_bytes(block.nbytes)
    return digest.hexdigest()


def fingerprint(source: ModelSource, lora: LoraConfig, on_bytes: Callable[[int], None]) -> str:
    """SHA-256, as hex, of the weights that LoRA freezes, rounded to bf16; low-rank pairs beside them do not count.

    Args:
        source: the base, or a checkpoint of a LoRA run from it.
        lora: the settings.
        on_bytes: called with the size of each block read.

    Raises:
        DataError: a file is damaged.
    """
    digest = hashlib.sha256()
    with WeightReader(source.path, source.manifest, WEIGHT) as reader:
        for name, shape in sorted(reader.shapes.items()):
            if lora.train_embed_norm and trains_with_embedding(name):
                continue
            digest.update(f"{name} {list(shape)}\n".encode())
            for block in reader.stored(name):
                digest.update(bytes_of(block.to(torch.bfloat16)))
                on_bytes(block.nbytes)
    return digest.hexdigest()


def _bytes(source: ModelSource, lora: LoraConfig) -> int:
    """Bytes that `fingerprint` reads."""
    with WeightReader(source.path, source.manifest, WEIGHT) as reader:
        return sum(
            math.prod(shape) * reader.dtype(name).itemsize
            for name, shape in reader.shapes.items()
            if not (lora.train_embed_norm and trains_with_embedding(name))
        )


def with_adapter(base: ModelSource, path: Path) -> ModelSource:
    """A model whose weights are read with those of an adapter merged into them.

    Args:
        base: the base that the adapter was trained on, in any dtype.
        path: file or folder of the adapter.

    Raises:
        UsageError: the adapter belongs to another base.
        DataError: the adapter is damaged, or not finite.
    """
    adapter = read_adapter(path)
    info = adapter.info
    if has_pairs(base):
        raise UsageError(
            f"{base.path}: is a LoRA run itself, and not the base of {path}, which is {info.base}; merge its own pairs "
            "with 'megazh export --to hf'"
        )
    other = [
        f"{key} {there} instead of {here}"
        for key, here, there in differences(info.model, base.model)
        if key not in FREE | COMPUTED_WITH | POSITIONS
    ]
    if other:
        raise UsageError(f"{path}: is for another base, {info.base}: {base.path} has {', '.join(other)}")
    with Progress("check", _bytes(base, info.lora)) as progress:
        if (found := fingerprint(base, info.lora, progress.advance)) != info.fingerprint:
            raise UsageError(
                f"{path}: is for another base, {info.base} (fingerprint {info.fingerprint[:12]}): the weights of "
                f"{base.path} are others ({found[:12]})"
            )
    _check_numbers(adapter)
    entries = _entries(adapter)
    replaced = {entry.parameter for entry in entries}
    kept = [entry for entry in base.manifest.tensors if entry.parameter not in replaced]
    recipe = {**base.manifest.recipe, "lora": info.lora.model_dump(mode="json")}
    recipe["model"] = info.model.model_dump(mode="json", exclude_none=True)
    template = info.template or base.manifest.template
    manifest = base.manifest.model_copy(update={"recipe": recipe, "tensors": [*kept, *entries], "template": template})
    return replace(base, manifest=manifest, model=info.model, trained_length=info.trained_length, adapter=adapter.path)


def _entries(adapter: AdapterFile) -> list[TensorEntry]:
    """The tensors of an adapter as those of a checkpoint."""
    file = str(adapter.path.absolute())
    found = {}
    for tensor in adapter_tensors(adapter.info.model, adapter.info.lora):
        piece = PieceEntry(file=file, key=tensor.name, begin=0, end=math.prod(tensor.shape))
        found[tensor.parameter] = TensorEntry(
            parameter=tensor.parameter,
            kind=WEIGHT,
            dtype=adapter.dtypes[tensor.name],
            shape=list(tensor.shape),
            pieces=[piece],
        )
    return list(found.values())


def _check_numbers(adapter: AdapterFile) -> None:
    """Check that all numbers are finite and as they were written, and both copies of a tied embedding equal.

    Raises:
        DataError: they are not.
    """
    first: dict[str, str] = {}
    digest = hashlib.sha256()
    with TensorReader(adapter.path) as reader:

        def blocks(name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
            count = math.prod(shape)
            for begin in range(0, count, _BLOCK):
                yield reader.read(name, adapter.dtypes[name], shape, begin, min(begin + _BLOCK, count))

        for tensor in adapter_tensors(adapter.info.model, adapter.info.lora):
            for block in blocks(tensor.name, tensor.shape):
                if not block.isfinite().all():
                    raise DataError(f"{adapter.path}: {tensor.name} has numbers that are not finite: it is of no use")
                digest.update(bytes_of(block))
            one = first.setdefault(tensor.parameter, tensor.name)
            pairs = zip(blocks(one, tensor.shape), blocks(tensor.name, tensor.shape), strict=True)
            if one != tensor.name and not all(torch.equal(here, there) for here, there in pairs):
                raise DataError(
                    f"{adapter.path}: {tensor.name} differs from {one}, which is tied to it: a folder with one matrix "
                    "for both cannot be made of it"
                )
    if digest.hexdigest() != adapter.info.sha256:
        raise DataError(f"{adapter.path}: its numbers have changed since it was written; copy or export it again")
