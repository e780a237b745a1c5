"""Checkpoints: folders `step_NNNNNNNN` that appear by rename once everything is on disk, each with a manifest.

DeepSpeed lays out the files: one per layer, and one per rank for its optimizer shard. They are flushed to disk, hashed,
and read back without unpickling anything but tensors and plain values.
"""

import contextlib
import os
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from megazh import __version__
from megazh.errors import DataError, MegazhError, WorkerError
from megazh.files import fsync_directory, sha256_file, write_atomic
from megazh.pipeline.engine import quiet
from megazh.training.checkpoint_list import MANIFEST, STATE, CheckpointManifest, FileEntry, checkpoint_path
from megazh.training.weights import load_tensors


class _SafeCheckpointEngine(TorchCheckpointEngine):
    """Flushes and hashes the files that it writes; reads tensors and plain values only."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[str, int, str]] = []

    def save(self, state_dict: Any, path: str) -> None:
        with open(path, "wb") as file:
            torch.save(_plain(state_dict), file)
            file.flush()
            os.fsync(file.fileno())
        self.written.append((path, os.path.getsize(path), sha256_file(Path(path))))

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_tensors(Path(path), map_location, _allowed())


def _allowed() -> list[Any]:
    """DeepSpeed's own types in its files, which are records of numbers."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, fragment_address, set]


def _plain(value: Any) -> Any:
    """Replace members of enumerations by their values: some versions of Python pickle members as function calls."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _plain(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(inner) for inner in value)
    return value


def save_checkpoint(
    engine: Any, folder: Path, step: int, samples: int, tokens: int, bounds: list[int], precision: str
) -> Path:
    """Write the checkpoint of `step` and return its path. All ranks call it.

    Args:
        engine: the engine whose weights and optimizer state are saved.
        folder: the folder of the run's checkpoints.
        step: optimizer steps done.
        samples: training samples consumed by all replicas together.
        tokens: training tokens consumed, padding included.
        bounds: (stages + 1,) stage bounds; see `megazh.pipeline.split`.
        precision: name of the dtype of the weights, such as bf16.

    Raises:
        WorkerError: the disk is full or gone, on any rank; earlier checkpoints are untouched.
    """
    target = checkpoint_path(folder, step)
    temporary = folder / f".{target.name}.unfinished"
    rank = dist.get_rank()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
    files = _SafeCheckpointEngine()
    engine.checkpoint_engine = files
    try:
        engine.save_checkpoint(str(temporary), tag=STATE, save_latest=False)
    except (torch.OutOfMemoryError, dist.DistError):
        raise
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        raise WorkerError(
            f"{target}: cannot be written ({str(error).splitlines()[0]}); is the disk full? earlier checkpoints are "
            "whole: make room and run the same command again"
        ) from error
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, files.written)
    if rank == 0:
        entries = {
            os.path.relpath(path, temporary): FileEntry(
                name=os.path.relpath(path, temporary), bytes=size, sha256=digest
            )
            for written in gathered
            for path, size, digest in written
        }
        grid = engine.grid
        manifest = CheckpointManifest(
            step=step,
            samples=samples,
            tokens=tokens,
            stages=grid.pipe_parallel_size,
            replicas=grid.data_parallel_size,
            bounds=bounds,
            precision=precision,
            versions=_versions(),
            files=[entries[name] for name in sorted(entries)],
        )
        for script in temporary.glob("*.py"):  # DeepSpeed's own tools, which unpickle and are covered by no hash
            script.unlink()
        write_atomic(temporary / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
        fsync_directory(temporary / STATE)
        shutil.rmtree(target, ignore_errors=True)  # left by an earlier attempt that was rolled back past this step
        os.rename(temporary, target)
        fsync_directory(folder)
    dist.barrier()
    return target


def load_checkpoint(engine: Any, checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Restore weights and optimizer state. All ranks call it.

    Raises:
        DataError: a file's content differs from the manifest, on any rank.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = [entry.name for entry in manifest.files[rank::ranks] if sha256_file(checkpoint / entry.name) != entry.sha256]
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, mine)
    if wrong := [name for names in gathered for name in names]:
        raise DataError(
            f"{checkpoint / wrong[0]}: its content has changed since it was written; remove {checkpoint} to resume "
            "from the checkpoint before it"
        )
    # DeepSpeed restores these from the checkpoint, but the recipe decides, and it may have changed since.
    clip, decays = engine.optimizer.clip_grad, [group["weight_decay"] for group in engine.optimizer.param_groups]
    engine.checkpoint_engine = _SafeCheckpointEngine()
    try:
        with quiet():
            loaded, _ = engine.load_checkpoint(str(checkpoint), tag=STATE, load_lr_scheduler_states=False)
    except MegazhError:
        raise
    except Exception as error:
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


def _versions() -> dict[str, str]:
    import deepspeed

    return {"megazh": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def remove_unfinished(folder: Path) -> None:
    """Remove the files of checkpoints that were interrupted."""
    if folder.is_dir():
        for path in folder.glob(".step_*.unfinished"):
            with contextlib.suppress(OSError):
                shutil.rmtree(path)
