"""Checkpoints: folders `step_NNNNNNNN` that appear by rename once everything is on disk, each with a manifest.

DeepSpeed lays out the files: one per layer, and one per rank for its optimizer shard. They are flushed to disk, hashed,
and read back without unpickling anything but tensors and plain values.
"""

import contextlib
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megazh import __version__
from megazh.errors import DataError, MegazhError, WriteError
from megazh.files import fsync_directory, sha256_file, write_atomic
from megazh.pipeline.engine import quiet
from megazh.training.checkpoint_files import SafeCheckpointEngine
from megazh.training.checkpoint_list import (
    MANIFEST,
    STATE,
    CheckpointManifest,
    FileEntry,
    checkpoint_path,
    list_checkpoints,
    read_manifest,
)
from megazh.training.collect import gather, of_rank_0
from megazh.training.weights import is_of_device
from megazh.writing import check_room, free_bytes, write_error, writing

_KEPT = "earlier checkpoints are whole"


def save_checkpoint(
    engine: Any,
    folder: Path,
    step: int,
    samples: int,
    tokens: int,
    bounds: list[int],
    precision: str,
    run_id: str = "",
    data: dict[str, str] | None = None,
) -> Path:
    """Write the checkpoint of `step` and return its path. All ranks call it.

    Where it fails on any rank, nothing of it is left, and all ranks raise the same error.

    Args:
        engine: the engine whose weights and optimizer state are saved.
        folder: the folder of the run's checkpoints.
        step: optimizer steps done.
        samples: training samples consumed by all replicas together.
        tokens: training tokens consumed, padding included.
        bounds: (stages + 1,) stage bounds; see `megazh.pipeline.split`.
        precision: name of the dtype of the weights, such as bf16.
        run_id: identity of the run, which its other checkpoints share.
        data: fingerprint of the data; see `megazh.index.fingerprint`.

    Raises:
        WriteError: the disk is full, too small or gone, on any rank; earlier checkpoints are untouched.
    """
    check_disk(engine, folder)
    target = checkpoint_path(folder, step)
    temporary = folder / f".{target.name}.unfinished"
    rank = dist.get_rank()
    free = free_bytes(folder)
    files = SafeCheckpointEngine()
    if rank == 0:
        with files.remembered():
            folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda path: None  # DeepSpeed's own tools, which unpickle and which no hash covers
    engine.save_checkpoint(str(temporary), tag=STATE, save_latest=False)
    gathered = gather((files.written, files.needed, files.failure is not None))
    if any(failed for _, _, failed in gathered):
        _remove_everywhere(temporary)
        message = None
        if files.failure is not None:
            needed, own = sum(size for _, size, _ in gathered), f"rank {rank} on {socket.gethostname()}"
            message = str(write_error(target, files.failure, needed, free, _KEPT, by=own))
        raise WriteError(next(filter(None, gather(message))))
    error: WriteError | None = None
    if rank == 0:
        grid = engine.grid
        entries = {
            os.path.relpath(path, temporary): FileEntry(
                name=os.path.relpath(path, temporary), bytes=size, sha256=digest
            )
            for written, _, _ in gathered
            for path, size, digest in written
        }
        manifest = CheckpointManifest(
            step=step,
            samples=samples,
            tokens=tokens,
            stages=grid.pipe_parallel_size,
            replicas=grid.data_parallel_size,
            bounds=bounds,
            precision=precision,
            run_id=run_id,
            versions=_versions(),
            data=data,
            complete=False,
            files=[entries[name] for name in sorted(entries)],
        )
        try:
            with writing(target, kept=_KEPT):
                _finish(temporary, target, manifest)
        except WriteError as failure:
            shutil.rmtree(temporary, ignore_errors=True)
            error = failure
    _raise_together(error)
    return target


def _finish(temporary: Path, target: Path, manifest: CheckpointManifest) -> None:
    """Add the manifest to a checkpoint whose files are written, and give it its name."""
    write_atomic(temporary / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    fsync_directory(temporary / STATE)
    shutil.rmtree(target, ignore_errors=True)  # left by an earlier attempt that was rolled back past this step
    os.rename(temporary, target)
    fsync_directory(target.parent)


def _remove_everywhere(temporary: Path) -> None:
    """Remove an unfinished checkpoint, so that its space is free again before anyone reports the failure."""
    dist.barrier()  # no rank writes any longer
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()


def _raise_together(error: WriteError | None) -> None:
    """Raise the error of rank 0, if it has one, on all ranks."""
    message = of_rank_0(error and str(error))
    if message:
        raise WriteError(message)


def check_disk(engine: Any, folder: Path) -> None:
    """Check that there is room for a checkpoint. All ranks call it; all raise the same error.

    Its size is that of the newest checkpoint or, before there is one, that of the tensors of weights and optimizer.

    Raises:
        WriteError: there is too little; names both sizes.
    """
    needed = sum(gather(state_bytes(engine)))
    error: WriteError | None = None
    if dist.get_rank() == 0:
        for checkpoint in list_checkpoints(folder)[-1:]:
            with contextlib.suppress(DataError):
                needed = sum(entry.bytes for entry in read_manifest(checkpoint).files)
        try:
            check_room(folder, needed, _KEPT)
        except WriteError as failure:
            error = failure
    _raise_together(error)


def state_bytes(engine: Any) -> int:
    """Bytes of the tensors that this rank puts into a checkpoint; its files are larger by some kilobytes."""
    return sum(piece.values.nbytes for piece in engine.optimizer.pieces_to_save())


def mark_complete(checkpoint: Path) -> None:
    """Note in the manifest of the last step's checkpoint that the run is done. All ranks call it.

    Raises:
        WriteError: the manifest cannot be written.
    """
    error: WriteError | None = None
    if dist.get_rank() == 0:
        manifest = read_manifest(checkpoint).model_copy(update={"complete": True})
        try:
            with writing(checkpoint / MANIFEST, kept=_KEPT):
                write_atomic(checkpoint / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
        except WriteError as failure:
            error = failure
    _raise_together(error)


def load_checkpoint(engine: Any, checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Restore weights and optimizer state. All ranks call it.

    Raises:
        DataError: a file cannot be read, or its content differs from the manifest, on any rank.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = [_fault(checkpoint, entry) for entry in manifest.files[rank::ranks]]
    if wrong := [fault for faults in gather(mine) for fault in faults if fault]:
        raise DataError(f"{wrong[0]}; remove {checkpoint} to resume from the checkpoint before it")
    # DeepSpeed restores these from the checkpoint, but the recipe decides, and it may have changed since.
    clip, decays = engine.optimizer.clip_grad, [group["weight_decay"] for group in engine.optimizer.param_groups]
    engine.checkpoint_engine = SafeCheckpointEngine()
    try:
        with quiet():
            loaded, _ = engine.load_checkpoint(str(checkpoint), tag=STATE, load_lr_scheduler_states=False)
    except (MegazhError, torch.OutOfMemoryError, dist.DistError, OSError):
        raise
    except Exception as error:
        if is_of_device(error):
            raise
        raise DataError(
            f"{checkpoint}: cannot be loaded ({str(error).splitlines()[0]}); remove it to resume from the checkpoint "
            "before it"
        ) from error
    engine.optimizer.clip_grad = clip
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    if loaded is None:
        raise DataError(
            f"{checkpoint}: DeepSpeed finds no checkpoint in it; remove it to resume from the checkpoint before it"
        )


def _fault(checkpoint: Path, entry: FileEntry) -> str:
    """What is wrong with a file of a checkpoint; empty if nothing is."""
    path = checkpoint / entry.name
    try:
        found = sha256_file(path)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return "" if found == entry.sha256 else f"{path}: its content has changed since it was written"


def _versions() -> dict[str, str]:
    import deepspeed

    return {"megazh": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}
