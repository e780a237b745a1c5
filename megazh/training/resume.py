"""Which checkpoint a start resumes from: rank 0 chooses it, and all ranks make sure that they see it undamaged."""

import hashlib
import socket
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megazh.errors import DataError, MegazhError, WorkerError
from megazh.exchange.hf_config import CONFIG
from megazh.exchange.hf_folder import HfFolder
from megazh.training.checkpoint_list import (
    MANIFEST,
    CheckpointManifest,
    OldFormatError,
    check_identity,
    gone_on_since,
    list_checkpoints,
    named_checkpoint,
    read_manifest,
    remove_checkpoint,
    step_of,
)
from megazh.training.checkpoint_read import find_damage
from megazh.training.collect import gather, of_rank_0
from megazh.training.imported import hf_manifest

_SECONDS = 75.0  # NFS clients may show another's files a minute late (acdirmax)
_POLL_SECONDS = 0.5

Found = tuple[Path, CheckpointManifest]
_Choice = tuple[str, str]
"""Name of a checkpoint in its folder, or path of one elsewhere; and digest of its manifest."""


def agree_on_checkpoint(
    folder: Path,
    run_id: str,
    log: Callable[[str], None] = print,
    named: str | None = None,
    seconds: float = _SECONDS,
    only: int | None = None,
) -> Found | None:
    """The checkpoint that the run goes on from; None if there is none. All ranks call it.

    It is the newest that is whole. Damaged ones are named; where all are damaged, that is an error, unless `only` is
    given. Checkpoints of later steps than that of one that is named get another name; those of later steps than `only`
    are removed.

    Args:
        folder: the folder of the run's checkpoints.
        run_id: identity of the run.
        log: prints a line once, on rank 0.
        named: a checkpoint to resume from in place of the newest, as the recipe names it. Once the run has saved
            later checkpoints since, they count: the same command may be repeated.
        seconds: how long a rank waits for files that rank 0 sees.
        only: the step of the one that counts; None: all count.

    Raises:
        DataError: all checkpoints are damaged, the newest belongs to another run or to another version, or the one that
            is named cannot be used.
        WorkerError: a rank does not see what rank 0 sees; names its host. All ranks raise the same error.
    """
    damaged: list[str] = []
    notes: list[str] = []
    while True:
        mine = _choice(folder, run_id, named, damaged, notes, only) if dist.get_rank() == 0 else None
        choice = of_rank_0(mine)
        for note in notes:
            log(note)
        notes.clear()
        if isinstance(choice, MegazhError):
            raise choice
        if choice is None:
            return None
        path, manifest = _seen_by_all(folder, choice, seconds)
        is_named = named is not None and named_checkpoint(folder, named).resolve() == path.resolve()
        fault = find_damage(path, manifest)
        if not fault:
            if is_named:
                _set_aside(folder, manifest.step, log)
            elif only is not None:
                _remove_later(folder, manifest.step, log)
            return path, manifest
        if is_named:
            raise DataError(f"{fault}; name another checkpoint with checkpoint.resume")
        log(f"warning: {fault}; {path.name} is passed over")
        damaged.append(path.name)


def agree_on_initial(path: Path, seconds: float = _SECONDS) -> Found:
    """The checkpoint of any run, or the Hugging Face folder, that a new run takes its first weights from.

    All ranks call it.

    Raises:
        DataError: it is missing or damaged.
        WorkerError: a rank does not see what rank 0 sees.
    """
    choice = of_rank_0(_tried(lambda: _initial(path)) if dist.get_rank() == 0 else None)
    if isinstance(choice, MegazhError):
        raise choice
    found = _seen_by_all(path.parent, choice, seconds)
    if fault := find_damage(*found):
        raise DataError(f"{fault}; name another checkpoint with checkpoint.initial_checkpoint")
    return found


def _initial(path: Path) -> _Choice:
    if _is_foreign(path):
        HfFolder(path).check_head()
    return _chosen(path.parent, path)


def _choice(
    folder: Path,
    run_id: str,
    named: str | None,
    damaged: Collection[str],
    notes: list[str],
    only: int | None,
) -> _Choice | MegazhError | None:
    """The checkpoint to resume from, or why none can be used; what is to be said of it is added to `notes`."""
    checkpoints = [
        path
        for path in list_checkpoints(folder)
        if path.name not in damaged and (only is None or step_of(path) == only)
    ]
    passed: list[str] = []
    for path in reversed(checkpoints):
        found = _tried(partial(read_manifest, path))
        if isinstance(found, OldFormatError):
            return found
        if isinstance(found, MegazhError):
            passed.append(str(found).partition("; ")[0])
            continue
        if named is not None and not gone_on_since(found, named):
            break
        notes += [f"warning: {fault}; {path.name}, the one before, is taken" for fault in passed]
        return _tried(partial(_checked, folder, path, found, run_id))
    if named is not None:
        path = named_checkpoint(folder, named)
        return _tried(lambda: _checked(folder, path, read_manifest(path), run_id))
    if only is None and (passed or damaged):
        first = passed[0] if passed else f"{folder / next(iter(damaged))}: its content has changed since it was written"
        return DataError(f"{first}; no checkpoint is whole: remove them all to begin the run anew")
    return None


def _checked(folder: Path, path: Path, manifest: CheckpointManifest, run_id: str) -> _Choice:
    check_identity(path, manifest, run_id)
    return _chosen(folder, path)


def _chosen(folder: Path, path: Path) -> _Choice:
    return (path.name if path.parent == folder else str(path)), _digest(path)


def _set_aside(folder: Path, step: int, log: Callable[[str], None]) -> None:
    """Give another name to the checkpoints of later steps, which a run that goes on from an earlier one leaves."""
    if dist.get_rank() == 0:
        for later in list_checkpoints(folder):
            if step_of(later) > step:
                aside = later.with_name(f"{later.name}.left_{time.strftime('%Y%m%d_%H%M%S')}")
                later.rename(aside)
                log(f"{later.name} is of a later step than the one that the run goes on from: now {aside.name}")


def _remove_later(folder: Path, step: int, log: Callable[[str], None]) -> None:
    """Remove the checkpoints of later steps, which a run undoes that goes back by itself."""
    if dist.get_rank() == 0:
        for later in list_checkpoints(folder):
            if step_of(later) > step:
                remove_checkpoint(later)
                log(f"{later.name} is removed: the run goes back to step {step}")


def _tried(action: Callable[[], Any]) -> Any:
    """What an action returns, or its error."""
    try:
        return action()
    except MegazhError as error:
        return error
    except OSError as error:
        return DataError(f"{error.filename}: cannot be read: {error.strerror}")


def _seen_by_all(folder: Path, choice: _Choice, seconds: float) -> Found:
    """The checkpoint of this path and digest, once all ranks see it. Raises WorkerError, on all, if one does not."""
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


def _await(path: Path, digest: str, seconds: float) -> tuple[CheckpointManifest | None, str]:
    """The manifest of a checkpoint once this host sees the one of this digest, or what it sees instead."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            manifest = hf_manifest(HfFolder(path)) if _is_foreign(path) else read_manifest(path)
            if _digest(path) == digest:
                return manifest, ""
            fault = f"{path / MANIFEST} has other content"
        except (MegazhError, OSError) as error:
            fault = str(error).partition("; ")[0]
        if time.monotonic() >= deadline:
            return None, fault
        time.sleep(_POLL_SECONDS)


def _digest(path: Path) -> str:
    return HfFolder(path).digest() if _is_foreign(path) else hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()


def _is_foreign(path: Path) -> bool:
    """Whether a path is a Hugging Face folder."""
    return (path / CONFIG).is_file() and not (path / MANIFEST).is_file()
