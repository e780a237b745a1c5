"""Where a trained model comes from: a run, a checkpoint, or an imported folder. Without torch."""

from dataclasses import dataclass
from pathlib import Path

from megazh.config import from_mapping
from megazh.errors import DataError, UsageError
from megazh.model.config import ModelConfig
from megazh.run.folder import DESCRIPTION, RunFolder
from megazh.training.checkpoint_list import (
    MANIFEST,
    CheckpointManifest,
    check_identity,
    list_checkpoints,
    named_checkpoint,
    newest_good,
    read_manifest,
)


@dataclass(frozen=True)
class ModelSource:
    """A trained model that can be read."""

    path: Path
    """Folder of its weights: a checkpoint."""
    manifest: CheckpointManifest
    model: ModelConfig
    trained_length: int
    """Tokens per sample that it was last trained on."""
    run: RunFolder | None
    """Run that it belongs to, which holds its tokenizer; None for a checkpoint that lies elsewhere."""


def find_model(path: Path, checkpoint: str | None = None) -> ModelSource:
    """Find the model that a path names.

    Args:
        path: a run folder, or the folder of one checkpoint.
        checkpoint: of a run, the name of one of its checkpoints, or the path of one. Default: the newest that is whole.

    Raises:
        UsageError: there is no model, or no such checkpoint.
        DataError: a file is missing, damaged, or belongs to another run.
    """
    if (path / MANIFEST).is_file():
        if checkpoint is not None:
            raise UsageError(f"{path} is one checkpoint; give the folder of its run to choose among its checkpoints")
        return _of_checkpoint(path, _run_of(path))
    run = RunFolder(path)
    if not run.exists:
        raise UsageError(f"{path}: no run ({run.config.name} is missing) and no checkpoint ({MANIFEST} is missing)")
    return _of_checkpoint(_checkpoint_of(run, checkpoint), run)


def _checkpoint_of(run: RunFolder, wanted: str | None) -> Path:
    there = list_checkpoints(run.checkpoints)
    if wanted is not None:
        path = named_checkpoint(run.checkpoints, wanted)
        if not (path / MANIFEST).is_file():
            names = ", ".join(each.name for each in there) or "none"
            raise UsageError(f"{run.path}: no checkpoint '{wanted}'; there are {names}")
        return path
    newest = newest_good(run.checkpoints)
    if newest is not None:
        return newest[0]
    if not there:
        raise UsageError(f"{run.path}: holds no checkpoint yet")
    read_manifest(there[-1])  # raises, with what is wrong
    raise DataError(f"{there[-1]}: damaged")


def _run_of(checkpoint: Path) -> RunFolder | None:
    """The run in whose folder a checkpoint lies."""
    run = RunFolder(checkpoint.absolute().parent.parent)
    return run if run.exists and (run.path / DESCRIPTION).is_file() else None


def _of_checkpoint(path: Path, run: RunFolder | None) -> ModelSource:
    manifest = read_manifest(path)
    if run is not None:
        check_identity(path, manifest, run.info().run_id)
    source = f"{path / MANIFEST}: recipe"
    try:
        model = from_mapping(manifest.recipe["model"], ModelConfig, source)
        length = manifest.recipe["batch"]["seq_len"]
        if type(length) is not int or length < 1:
            raise ValueError(f"seq_len {length!r}")
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise DataError(f"{source}: does not describe a model: {error}") from None
    return ModelSource(path, manifest, model, length, run)
