"""A Hugging Face folder as a checkpoint: read in place by any layout, or imported into a folder of its own."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml

from megazh import __version__
from megazh.errors import DataError, UsageError
from megazh.exchange.hf_folder import HfFolder, copy_beside
from megazh.exchange.shards import StreamedTensor, write_streamed
from megazh.files import fsync_directory, new_folder, write_atomic
from megazh.pipeline.precision import Dtype
from megazh.pipeline.sharded_optimizer import layer_of
from megazh.pipeline.state import WEIGHT
from megazh.progress import Progress
from megazh.training.checkpoint_list import (
    MANIFEST,
    WEIGHTS,
    CheckpointManifest,
    FileEntry,
    PieceEntry,
    TensorEntry,
    manifest_text,
)
from megazh.training.model_source import HF_FILES
from megazh.training.weight_reader import WeightReader
from megazh.writing import check_room, check_writable

MODEL_FILE = "model.yaml"
"""File, in an imported folder, of the section `model` of a recipe."""
_DTYPES = {"F32": Dtype.FP32, "BF16": Dtype.BF16, "F16": Dtype.FP16}


def hf_manifest(folder: HfFolder) -> CheckpointManifest:
    """The manifest that makes a checkpoint of step 0 of a folder as it lies there; without hashes, which it lacks."""
    entries: dict[str, TensorEntry] = {}
    for tensor in folder.tensors:
        place, row = folder.places[tensor.name], math.prod(tensor.parameter_shape[1:])
        piece = PieceEntry(file=place.file, key=tensor.name, begin=tensor.begin * row, end=tensor.end * row)
        before = entries.get(tensor.parameter)
        entries[tensor.parameter] = TensorEntry(
            parameter=tensor.parameter,
            kind=WEIGHT,
            dtype=place.dtype,
            shape=list(tensor.parameter_shape),
            pieces=[*(before.pieces if before else []), piece],
        )
    dtypes = {_DTYPES[entry.dtype] for entry in entries.values()}
    return CheckpointManifest(
        run_id=folder.digest()[:16],
        step=0,
        samples=0,
        tokens=0,
        stages=1,
        replicas=1,
        bounds=[0, folder.model.num_hidden_layers + 2],
        precision=dtypes.pop() if len(dtypes) == 1 else Dtype.FP32,
        recipe={
            "model": folder.model.model_dump(mode="json", exclude_none=True),
            "batch": {"seq_len": folder.trained_length},
        },
        data={},
        versions={"megazh": __version__},
        tensors=list(entries.values()),
    )


def import_folder(source: Path, target: Path) -> HfFolder:
    """Import a Hugging Face folder: weights with their hashes, the model as YAML, and the files of its tokenizer.

    The new folder is a checkpoint of step 0, which `checkpoint.initial_checkpoint`, `megazh sample` and `megazh export`
    take. It appears under its name once it is whole.

    Raises:
        UsageError: the target exists, or cannot be written.
        DataError: the source cannot be used; a weight that is not finite is named.
        WriteError: the target cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target}: exists already; give another folder with --to, or remove it")
    check_writable(target.absolute().parent, "give another folder with --to")
    folder = HfFolder(source)
    folder.check_head()
    manifest = hf_manifest(folder)
    with WeightReader(source, manifest, WEIGHT) as reader:
        layers: dict[str, list[StreamedTensor]] = {}
        for entry in manifest.tensors:
            layers.setdefault(layer_of(entry.parameter), []).append(_streamed(folder, reader, entry.parameter))
        size = sum(tensor.bytes for tensors in layers.values() for tensor in tensors)
        check_room(target, size)
        with Progress("import", size) as progress, new_folder(target) as new:
            files = _write_layers(new, layers, progress.advance)
            _write_manifest(new, manifest, files)
            _write_rest(new, folder)
    return folder


def _streamed(folder: HfFolder, reader: WeightReader, parameter: str) -> StreamedTensor:
    shape = reader.shapes[parameter]
    row = math.prod(shape[1:])

    def blocks() -> Iterator[torch.Tensor]:
        for tensor in folder.tensors:
            if tensor.parameter != parameter:
                continue
            for block in reader.blocks(parameter, tensor.begin * row, tensor.end * row):
                if not block.isfinite().all():
                    file = folder.path / folder.places[tensor.name].file
                    raise DataError(f"{file}: {tensor.name} has numbers that are not finite: it is of no use")
                yield block

    return StreamedTensor(parameter, shape, reader.dtype(parameter), blocks)


def _write_layers(
    new: Path, layers: dict[str, list[StreamedTensor]], on_bytes: Callable[[int], None]
) -> list[FileEntry]:
    (new / WEIGHTS).mkdir()
    files = []
    for layer, tensors in layers.items():
        wide_first = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
        written = write_streamed(new / WEIGHTS / f"{layer}.safetensors", wide_first, on_bytes)
        files.append(FileEntry(name=f"{WEIGHTS}/{written.name}", bytes=written.bytes, sha256=written.sha256))
    fsync_directory(new / WEIGHTS)
    return files


def _write_manifest(new: Path, manifest: CheckpointManifest, files: list[FileEntry]) -> None:
    tensors = []
    for entry in manifest.tensors:
        file = f"{WEIGHTS}/{layer_of(entry.parameter)}.safetensors"
        piece = PieceEntry(file=file, key=entry.parameter, begin=0, end=entry.pieces[-1].end)
        tensors.append(entry.model_copy(update={"pieces": [piece]}))
    whole = manifest.model_copy(update={"files": files, "tensors": tensors})
    write_atomic(new / MANIFEST, manifest_text(whole).encode())


def _write_rest(new: Path, folder: HfFolder) -> None:
    """Write the recipe's section, and copy what stands beside the weights."""
    model = folder.model.model_dump(mode="json", exclude_none=True)
    text = yaml.safe_dump({"model": model}, sort_keys=False)
    write_atomic(new / MODEL_FILE, f"# The model of {folder.path}, for `include` in a recipe.\n{text}".encode())
    (new / HF_FILES).mkdir()
    copy_beside(folder.path, new / HF_FILES)
