"""The checkpoints of a run and their manifests; without torch, so that listing them is quick."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megazh.config import Config, from_mapping
from megazh.errors import DataError, UsageError
from megazh.index.metadata import TemplateInfo
from megazh.training.guard_state import GuardState

MANIFEST = "manifest.json"
DIGEST = "sha256"
"""Key of a manifest with the SHA-256 of its other values; missing in manifests of versions that wrote none."""
WEIGHTS, OPTIMIZER = "weights", "optimizer"
"""Folders inside a checkpoint: a file for each layer, and a file for each rank. With `-t hf`, weights are in a file
`model.safetensors` beside them."""
_HIDDEN = (".step_*.unfinished", ".step_*.removed")
_FILE = re.compile(rf"(({WEIGHTS}|{OPTIMIZER})/[A-Za-z0-9_][A-Za-z0-9_.]*|model)\.safetensors")

Whole = Annotated[int, Field(ge=0)]


class FileEntry(Config):
    """One file of a checkpoint."""

    name: str
    """Path relative to the checkpoint."""
    bytes: Whole
    sha256: str


class PieceEntry(Config):
    """A range of a tensor in a file."""

    file: str
    key: str
    """Name in the file."""
    begin: Whole
    """First element, counted in the flattened tensor."""
    end: Whole
    """Element behind the last."""


class TensorEntry(Config):
    """A parameter, or the optimizer's state for it, from pieces that together are the whole of it."""

    parameter: str
    """Name of the parameter, the same in every layout."""
    kind: str
    """`weight`, `master`, or the optimizer's name of the state."""
    dtype: str
    """Name of the dtype in the safetensors format."""
    shape: list[Whole]
    """Shape of the whole parameter."""
    block: Annotated[int, Field(ge=1)] = 1
    """Elements of the parameter per stored number."""
    pieces: list[PieceEntry]


class CheckpointManifest(Config):
    """The contents of `manifest.json`."""

    format_version: Literal[2] = 2
    run_id: str
    """Identity of the run, as in its run.json."""
    step: Whole
    """Optimizer steps done."""
    samples: Whole
    """Training samples consumed, those that rollbacks passed over included; a resumed run continues behind them."""
    tokens: Whole
    stages: int
    replicas: int
    bounds: list[int]
    """Stage bounds; see `megazh.pipeline.split`."""
    precision: str
    """Dtype of weights and activations."""
    engine: str = "ds_pp"
    """Engine of the run, as `megazh pretrain -t` names it."""
    optimizer: str = ""
    """Name of the optimizer."""
    updates: Whole = 0
    """Updates of the weights since the optimizer's state began."""
    recipe: dict[str, Any]
    """The recipe, by section and key."""
    data: dict[str, str]
    """Fingerprint of the data (see `megazh.index.fingerprint`)."""
    versions: dict[str, str]
    template: TemplateInfo | None = None
    """Chat template of the data; None where that is plain text."""
    guard: GuardState | None = None
    """What the guard remembers; None in checkpoints of versions that had none."""
    complete: bool = False
    """Whether the run has validated and sampled after its last step, and is done."""
    files: list[FileEntry] = Field(default_factory=list)
    tensors: list[TensorEntry] = Field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(entry.bytes for entry in self.files)


class OldFormatError(DataError):
    """A checkpoint of a version of megazh that wrote another format."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return folder / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its path."""
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """All finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d{8}", path.name))


def newest_good(folder: Path) -> tuple[Path, CheckpointManifest] | None:
    """The newest checkpoint whose manifest can be read and whose files have the right sizes; None without one.

    Raises:
        OldFormatError: it has a format of another version.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_manifest(path)
        except OldFormatError:
            raise
        except DataError:
            continue
    return None


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read the manifest of a checkpoint, and check that its files are there and have the right size.

    Raises:
        OldFormatError: the checkpoint has a format of another version.
        DataError: the manifest or a file is missing or damaged; names the file and the remedy.
    """
    remedy = f"remove {checkpoint} to resume from the checkpoint before it"
    path = checkpoint / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        if isinstance(values, dict):
            digest = values.pop(DIGEST, None)
            if digest not in (None, _digest(values)):
                raise ValueError("it is not as it was written")
        _check_format(checkpoint, values)
        manifest = from_mapping(values, CheckpointManifest, str(path))
        for fault in _faults(manifest):
            raise ValueError(fault)
    except (OSError, ValueError, TypeError, RecursionError, UsageError) as error:
        raise DataError(f"{path}: missing or damaged ({error}); {remedy}") from None
    for entry in manifest.files:
        path = checkpoint / entry.name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            found = "missing" if size is None else f"{size} bytes instead of {entry.bytes}"
            raise DataError(f"{path}: {found}; {remedy}")
    return manifest


def manifest_text(manifest: CheckpointManifest) -> str:
    """The text of `manifest.json`: the manifest, and the hash by which a damaged one is known."""
    values = manifest.model_dump(mode="json")
    return json.dumps({**values, DIGEST: _digest(values)}) + "\n"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _check_format(checkpoint: Path, values: Any) -> None:
    version = values.get("format_version") if isinstance(values, dict) else None
    if version == 1:
        raise OldFormatError(
            f"{checkpoint}: was written by an older megazh, in a format that is no longer read; finish the run with "
            "that version, or start another run with -r"
        )
    if isinstance(version, int) and version > 2:
        raise OldFormatError(
            f"{checkpoint}: was written by a later megazh (format_version {version}); resume with that version, or "
            "start another run with -r"
        )


def _faults(manifest: CheckpointManifest) -> Iterator[str]:
    """What in a manifest contradicts itself."""
    files = [entry.name for entry in manifest.files]
    for name in files:
        if not _FILE.fullmatch(name):
            yield f"{name!r} is no name of a file in it"
    if len(set(files)) < len(files):
        yield "a file is named twice"
    known, keys, names = set(files), set(), set()
    for tensor in manifest.tensors:
        what = f"{tensor.kind} of {tensor.parameter}"
        if (tensor.parameter, tensor.kind) in names:
            yield f"{what} is named twice"
        names.add((tensor.parameter, tensor.kind))
        for piece in tensor.pieces:
            if piece.file not in known:
                yield f"{what}: {piece.file!r} is not among its files"
            if (piece.file, piece.key) in keys:
                yield f"{what}: {piece.key!r} of {piece.file} is named twice"
            keys.add((piece.file, piece.key))
        yield from (f"{what}: {fault}" for fault in _faults_of_pieces(tensor))


def _faults_of_pieces(tensor: TensorEntry) -> Iterator[str]:
    size = math.prod(tensor.shape)
    ranges = sorted((piece.begin, piece.end) for piece in tensor.pieces)
    if not ranges or ranges[0][0] != 0 or ranges[-1][1] != size:
        yield f"its pieces do not begin at 0 and end at {size}"
    for begin, end in ranges:
        if begin >= end or begin % tensor.block or (end % tensor.block and end != size):
            yield f"a piece of elements {begin} up to {end}"
    for (_, end), (begin, _) in itertools.pairwise(ranges):
        if begin != end:
            yield f"pieces {'overlap' if begin < end else 'leave a gap'} between elements {begin} and {end}"


def check_identity(checkpoint: Path, manifest: CheckpointManifest, run_id: str) -> None:
    """Check that a checkpoint belongs to the run with this identity.

    Raises:
        DataError: it was copied here from another run.
    """
    if manifest.run_id != run_id:
        raise DataError(
            f"{checkpoint}: belongs to another run (its run_id is {manifest.run_id}, that of this run {run_id}); move "
            "it away, give the folder of its own run with -r, or begin another run from its weights with "
            f"checkpoint.initial_checkpoint={checkpoint}"
        )


def named_checkpoint(folder: Path, named: str) -> Path:
    """Path of the checkpoint that `checkpoint.resume` names: a path, or the name of one in the run's `folder`."""
    return folder / named if "/" not in named and (folder / named).is_dir() else Path(named)


def gone_on_since(newest: CheckpointManifest, named: str) -> bool:
    """Whether a run's newest checkpoint was saved after the run had been resumed from the one that is named."""
    return newest.recipe.get("checkpoint", {}).get("resume") == named


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint, at no moment leaving half of it under its name. Raises OSError."""
    hidden = checkpoint.parent / f".{checkpoint.name}.removed"
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden)


def remove_unfinished(folder: Path) -> None:
    """Remove what interrupted saves and removals left, whose space a start may need."""
    for path in _hidden(folder):
        with contextlib.suppress(OSError):
            shutil.rmtree(path)


def unfinished_bytes(folder: Path) -> int:
    """The space of what `remove_unfinished` removes."""
    size = 0
    for path in _hidden(folder):
        for file in path.rglob("*"):
            with contextlib.suppress(OSError):  # another job is saving there, and has just renamed it
                size += file.lstat().st_blocks * 512
    return size


def _hidden(folder: Path) -> list[Path]:
    return [path for pattern in _HIDDEN for path in folder.glob(pattern)]
