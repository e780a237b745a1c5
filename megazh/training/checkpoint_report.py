"""What a person asks of a run's checkpoints: which there are, whether they are whole, which can go. Without torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megazh.errors import DataError, UsageError
from megazh.files import locked, sha256_file
from megazh.progress import Progress
from megazh.run.folder import RunFolder
from megazh.training.checkpoint_list import (
    CheckpointManifest,
    checkpoint_path,
    list_checkpoints,
    newest_good,
    read_manifest,
    unfinished_bytes,
)
from megazh.training.retention import KeepRule, prune, superfluous, validation_losses
from megazh.writing import size_text

_COLUMNS = f"{'checkpoint':<14} {'tokens':>16} {'size':>9}  {'layout':<12} {'optimizer':<10} {'validation':>10}  state"


def describe_checkpoints(run: Path) -> Iterator[str]:
    """A table of the checkpoints of a run, oldest first; sizes are compared, hashes are not. Raises UsageError."""
    folder = _folder(run)
    losses = validation_losses(run)
    if not list_checkpoints(folder):
        yield f"{run}: holds no checkpoint yet"
        return
    yield _COLUMNS
    total, newest = 0, list_checkpoints(folder)[-1]
    for path in list_checkpoints(folder):
        try:
            manifest = read_manifest(path)
        except DataError as error:
            yield f"{path.name:<14} damaged: {_fault(path, error)}"
            continue
        total += manifest.bytes
        layout = f"pp={manifest.stages} dp={manifest.replicas}"
        loss = f"{losses[manifest.step]:.4f}" if manifest.step in losses else "-"
        is_last = manifest.complete and path == newest  # of a run that was extended, earlier ones are, too
        state = "complete: the run's last step" if is_last else "whole"
        yield (
            f"{path.name:<14} {manifest.tokens:>16,} {size_text(manifest.bytes):>9}  {layout:<12} "
            f"{manifest.optimizer:<10} {loss:>10}  {state}"
        )
    yield f"{size_text(total)} in {folder}"
    if left := unfinished_bytes(folder):
        yield f"{size_text(left)} more are of a save that is under way or was interrupted; the next start removes these"


def verify(run: Path, names: Sequence[str]) -> Iterator[str]:
    """Read the files of checkpoints again, and compare their hashes; a line for each checkpoint.

    Args:
        run: the run folder.
        names: names of checkpoints. Default: all.

    Raises:
        UsageError: there is no such checkpoint.
        DataError: one is damaged; raised after all were read.
    """
    folder = _folder(run)
    paths = [chosen(run, name) for name in names] or list_checkpoints(folder)
    faults: dict[Path, str] = {}
    manifests: dict[Path, CheckpointManifest] = {}
    for path in paths:
        try:
            manifests[path] = read_manifest(path)
        except DataError as error:
            faults[path] = _fault(path, error)
    with Progress("verify", sum(manifest.bytes for manifest in manifests.values())) as progress:
        for path in paths:
            if path in manifests and (fault := _wrong_hash(path, manifests[path], progress)):
                faults[path] = fault
            yield f"{path.name}: {'damaged: ' + faults[path] if path in faults else 'whole'}"
    if faults:
        word = "checkpoint is" if len(faults) == 1 else "checkpoints are"
        raise DataError(
            f"{folder}: {len(faults)} of {len(paths)} {word} damaged: {', '.join(path.name for path in faults)}; a "
            "resume passes over these, and removing them frees their space"
        )


def check_last(run: Path) -> None:
    """Check the hashes of the newest checkpoint of a complete run.

    Raises:
        DataError: a file has changed since it was written; names the remedy.
    """
    path = chosen(run, None)
    manifest = read_manifest(path)
    with Progress("verify", manifest.bytes) as progress:
        fault = _wrong_hash(path, manifest, progress)
    if fault:
        raise DataError(
            f"{path}: {fault}: the run is complete, and its last checkpoint is damaged; remove it, and the same "
            "command trains the steps since the one before it again"
        )


def pruned(run: Path, rule: KeepRule, dry_run: bool) -> Iterator[str]:
    """Remove the checkpoints that a rule does not keep; yields a line for each.

    Raises:
        UsageError: the folder holds no run.
        BusyError: the run is training.
    """
    folder = _folder(run)
    losses = validation_losses(run)
    with locked(RunFolder(run).lock, f"{run}: a job is training in this folder, and removes checkpoints itself"):
        gone = superfluous(folder, rule, losses)
        sizes = {step: read_manifest(checkpoint_path(folder, step)).bytes for step in gone}
        failures = [] if dry_run else prune(folder, rule, losses)
    for step in gone:
        path = checkpoint_path(folder, step)
        if dry_run or not path.exists():
            yield f"{'would remove' if dry_run else 'removed'} {path.name}, {size_text(sizes[step])}"
    yield from failures
    words = "would free" if dry_run else "freed"
    yield f"{words} {size_text(sum(sizes.values()))}; kept: {_names(folder, gone, dry_run)}"


def chosen(run: Path, name: str | None) -> Path:
    """The checkpoint of this name in a run, by default the newest whole one.

    Raises:
        UsageError: the folder holds no run, or no such checkpoint.
    """
    folder = _folder(run)
    there = list_checkpoints(folder)
    if name is None:
        newest = newest_good(folder)
        if newest is None:
            raise UsageError(f"{run}: holds no checkpoint that is whole")
        return newest[0]
    if folder / name not in there:
        raise UsageError(f"{run}: no checkpoint '{name}'; there are {', '.join(path.name for path in there) or 'none'}")
    return folder / name


def _folder(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    folder = RunFolder(run)
    if not folder.exists:
        raise UsageError(f"{run}: not the folder of a run: {folder.config.name} is missing")
    return folder.checkpoints


def _names(folder: Path, gone: Sequence[int], dry_run: bool) -> str:
    paths = list_checkpoints(folder)
    if dry_run:
        paths = [path for path in paths if path not in {checkpoint_path(folder, step) for step in gone}]
    return ", ".join(path.name for path in paths) or "none"


def _wrong_hash(path: Path, manifest: CheckpointManifest, progress: Progress) -> str:
    for entry in manifest.files:
        try:
            if sha256_file(path / entry.name, progress.advance) != entry.sha256:
                return f"the content of {entry.name} has changed since it was written"
        except OSError as error:
            return f"{entry.name} cannot be read: {error.strerror}"
    return ""


def _fault(path: Path, error: DataError) -> str:
    return str(error).partition("; ")[0].removeprefix(f"{path}/").removeprefix(f"{path}: ")
