"""Which checkpoint a start resumes from: rank 0 chooses it, once, and all ranks make sure that they see the same."""

import hashlib
import socket
import time
from pathlib import Path

import torch.distributed as dist

from megazh.errors import DataError, MegazhError, WorkerError
from megazh.training.checkpoint_list import (
    MANIFEST,
    CheckpointManifest,
    check_identity,
    list_checkpoints,
    read_manifest,
)
from megazh.training.collect import gather, of_rank_0

_SECONDS = 75.0  # NFS clients may show another's files a minute late (acdirmax)
_POLL_SECONDS = 0.5


def agree_on_checkpoint(
    folder: Path, run_id: str, seconds: float = _SECONDS
) -> tuple[Path, CheckpointManifest] | tuple[None, None]:
    """The newest checkpoint in `folder` with its manifest; (None, None) if there is none. All ranks call it.

    Args:
        folder: the folder of the run's checkpoints.
        run_id: identity of the run.
        seconds: how long a rank waits for files that rank 0 sees.

    Raises:
        DataError: the checkpoint is damaged or belongs to another run.
        WorkerError: a rank does not see what rank 0 sees; names its host. All ranks raise the same error.
    """
    choice = of_rank_0(_choice(folder, run_id) if dist.get_rank() == 0 else None)
    if isinstance(choice, MegazhError):
        raise choice
    if choice is None:
        return None, None
    path, digest = folder / choice[0], choice[1]
    manifest, fault = _await(path, digest, seconds)
    gathered = gather((fault, socket.gethostname()))
    for rank, (fault, host) in enumerate(gathered):
        if fault:
            raise WorkerError(
                f"{path}: rank {rank} on {host} does not see what rank 0 on {gathered[0][1]} sees: {fault}; all hosts "
                "need the same run folder: check that it lies on a shared file system, then run the same command again"
            )
    assert manifest is not None
    return path, manifest


def _choice(folder: Path, run_id: str) -> tuple[str, str] | MegazhError | None:
    """Name of the newest checkpoint and digest of its manifest, or why it cannot be used."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return None
    try:
        check_identity(checkpoints[-1], read_manifest(checkpoints[-1]), run_id)
        return checkpoints[-1].name, _digest(checkpoints[-1])
    except MegazhError as error:
        return error
    except OSError as error:
        return DataError(f"{checkpoints[-1]}: cannot be read: {error.strerror}")


def _await(path: Path, digest: str, seconds: float) -> tuple[CheckpointManifest | None, str]:
    """The manifest of a checkpoint once this host sees the one of this digest, or what it sees instead."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            manifest = read_manifest(path)
            if _digest(path) == digest:
                return manifest, ""
            fault = f"{path / MANIFEST} has other content"
        except (MegazhError, OSError) as error:
            fault = str(error).partition("; ")[0]
        if time.monotonic() >= deadline:
            return None, fault
        time.sleep(_POLL_SECONDS)


def _digest(path: Path) -> str:
    return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
