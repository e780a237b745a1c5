"""Which checkpoints a run has, and what their manifests say; without torch, so that it is quick."""

import json
import re
from pathlib import Path
from typing import Literal

from megazh.config import Config, from_mapping
from megazh.errors import DataError, UsageError

MANIFEST = "manifest.json"
STATE = "state"
"""The folder in a checkpoint that DeepSpeed's files lie in."""


class FileEntry(Config):
    """One file of a checkpoint."""

    name: str
    """Relative to the checkpoint."""
    bytes: int
    sha256: str


class CheckpointManifest(Config):
    """The contents of `manifest.json`."""

    format_version: Literal[1] = 1
    step: int
    """Optimizer steps done."""
    samples: int
    """Consumed; the data goes on from there."""
    tokens: int
    stages: int
    replicas: int
    bounds: list[int]
    """Of the stages; see `megazh.pipeline.split`."""
    precision: str
    versions: dict[str, str]
    files: list[FileEntry]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first; unfinished ones are none."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d{8}", path.name))


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a checkpoint, its files present and of the right size.

    Raises:
        DataError: it is damaged; names the file, and the way back.
    """
    remedy = f"remove {checkpoint} to go on from the checkpoint before it"
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
