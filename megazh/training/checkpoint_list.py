"""The checkpoints of a run and their manifests; without torch, so that listing them is quick."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Literal

from megazh.config import Config, from_mapping
from megazh.errors import DataError, UsageError

MANIFEST = "manifest.json"
STATE = "state"
"""Folder inside a checkpoint that holds DeepSpeed's files."""
_UNFINISHED = ".step_*.unfinished"


class FileEntry(Config):
    """One file of a checkpoint."""

    name: str
    """Path relative to the checkpoint."""
    bytes: int
    sha256: str


class CheckpointManifest(Config):
    """The contents of `manifest.json`."""

    format_version: Literal[1] = 1
    step: int
    """Optimizer steps done."""
    samples: int
    """Training samples consumed; a resumed run continues behind them."""
    tokens: int
    stages: int
    replicas: int
    bounds: list[int]
    """Stage bounds; see `megazh.pipeline.split`."""
    precision: str
    """Dtype of weights and activations."""
    run_id: str = ""
    """Identity of the run, as in its run.json; empty in checkpoints of versions before there was one."""
    versions: dict[str, str]
    data: dict[str, str] | None = None
    """Fingerprint of the data (see `megazh.index.fingerprint`); None in checkpoints of versions that recorded none."""
    complete: bool | None = None
    """Whether the run has validated and sampled after its last step, and is done. None in checkpoints of versions that
    saved only after that."""
    files: list[FileEntry]


def checkpoint_path(folder: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return folder / f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """All finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d{8}", path.name))


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read the manifest of a checkpoint, and check that its files are there and have the right size.

    Raises:
        DataError: the manifest or a file is missing or damaged; names the file and the remedy.
    """
    remedy = f"remove {checkpoint} to resume from the checkpoint before it"
    try:
        values = json.loads((checkpoint / MANIFEST).read_bytes())
        manifest = from_mapping(values, CheckpointManifest, str(checkpoint / MANIFEST))
    except (OSError, ValueError, TypeError, UsageError) as error:
        raise DataError(f"{checkpoint / MANIFEST}: missing or damaged ({error}); {remedy}") from None
    for entry in manifest.files:
        path = checkpoint / entry.name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            found = "missing" if size is None else f"{size} bytes instead of {entry.bytes}"
            raise DataError(f"{path}: {found}; {remedy}")
    return manifest


def check_identity(checkpoint: Path, manifest: CheckpointManifest, run_id: str) -> None:
    """Check that a checkpoint belongs to the run with this identity; where either has none, it is taken to.

    Raises:
        DataError: it was copied here from another run.
    """
    if manifest.run_id and run_id and manifest.run_id != run_id:
        raise DataError(
            f"{checkpoint}: belongs to another run (its run_id is {manifest.run_id}, that of this run {run_id}); move "
            "it away to resume from the checkpoint before it, or give the folder of its own run with -r"
        )


def remove_unfinished(folder: Path) -> None:
    """Remove the files of checkpoints that were interrupted, whose space a start may need."""
    for path in folder.glob(_UNFINISHED):
        with contextlib.suppress(OSError):
            shutil.rmtree(path)


def unfinished_bytes(folder: Path) -> int:
    """The space of what `remove_unfinished` removes."""
    size = 0
    for path in folder.glob(_UNFINISHED):
        for file in path.rglob("*"):
            with contextlib.suppress(OSError):  # another job is saving there, and has just renamed it
                size += file.lstat().st_blocks * 512
    return size
