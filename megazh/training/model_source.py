"""Where a trained model comes from: a run, a checkpoint, an imported folder or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from megazh.config import from_mapping
from megazh.errors import DataError, UsageError
from megazh.exchange.hf_config import CONFIG, model_config, read_hf_config, trained_length
from megazh.model.config import ModelConfig
from megazh.run.folder import DESCRIPTION, RunFolder
from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.training.checkpoint_list import (
    MANIFEST,
    CheckpointManifest,
    check_identity,
    list_checkpoints,
    named_checkpoint,
    newest_good,
    read_manifest,
)

HF_FILES = "hf"
"""Folder, in an imported folder, of the files that stood beside the weights."""


@dataclass(frozen=True)
class ModelSource:
    """A trained model that can be read."""

    path: Path
    """Folder of its weights: a checkpoint, or a Hugging Face folder."""
    manifest: CheckpointManifest
    model: ModelConfig
    trained_length: int
    """Tokens per sample that it was last trained on."""
    run: RunFolder | None
    """Run that it belongs to, which holds its tokenizer; None for one that lies elsewhere."""
    hf_files: Path | None = None
    """Folder of the tokenizer files of a model that comes from a Hugging Face folder."""
    adapter: Path | None = None
    """File of the low-rank pairs that are merged into the weights as they are read."""

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer of the model.

        Raises:
            UsageError: it has none, as a checkpoint that was copied out of its run.
            DataError: it is damaged.
        """
        if self.run is not None:
            return self.run.tokenizer()
        if self.hf_files is None:
            raise UsageError(
                f"{self.path}: lies in no run folder, so that its tokenizer is not known; give the folder of its run"
            )
        return load_tokenizer(self.hf_files)


def find_model(path: Path, checkpoint: str | None = None) -> ModelSource:
    """Find the model that a path names.

    Args:
        path: a run folder, the folder of one checkpoint, an imported folder, or a Hugging Face folder.
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
    if not run.exists and (path / CONFIG).is_file():
        return _of_hf_folder(path, checkpoint)
    if not run.exists:
        raise UsageError(
            f"{path}: no run ({run.config.name} is missing), no checkpoint ({MANIFEST} is missing) and no Hugging Face "
            f"folder ({CONFIG} is missing)"
        )
    return _of_checkpoint(_checkpoint_of(run, checkpoint), run)


def read_shape(path: Path) -> tuple[ModelConfig, int]:
    """The model in a folder that `find_model` takes, and its trained length; weights are not looked at.

    Raises:
        UsageError: there is no model.
        DataError: a file is damaged, or the model cannot be computed.
    """
    if (path / CONFIG).is_file() and not (path / MANIFEST).is_file():
        values, name = read_hf_config(path), str(path / CONFIG)
        return model_config(values, name), trained_length(values, name)
    source = find_model(path)
    return source.model, source.trained_length


def _of_hf_folder(path: Path, checkpoint: str | None) -> ModelSource:
    from megazh.exchange.hf_folder import HfFolder  # it and the other need torch
    from megazh.training.imported import hf_manifest

    if checkpoint is not None:
        raise UsageError(f"{path} is a Hugging Face folder, which has no checkpoints")
    folder = HfFolder(path)
    folder.check_head()
    return ModelSource(path, hf_manifest(folder), folder.model, folder.trained_length, None, path)


def _checkpoint_of(run: RunFolder, wanted: str | None) -> Path:
    there = list_checkpoints(run.checkpoints)
    if wanted is not None:
        path = named_checkpoint(run.checkpoints, wanted)
        if path not in there and not (path / MANIFEST).is_file():
            names = ", ".join(each.name for each in there) or "none"
            raise UsageError(f"{run.path}: no checkpoint '{wanted}'; there are {names}")
        return path
    if not there:
        raise UsageError(f"{run.path}: holds no checkpoint yet")
    newest = newest_good(run.checkpoints)
    return newest[0] if newest else there[-1]


def _run_of(checkpoint: Path) -> RunFolder | None:
    """The run in whose folder a checkpoint lies."""
    run = RunFolder(checkpoint.absolute().parent.parent)
    there = run.exists and (run.path / DESCRIPTION).is_file()
    return run if there and run.checkpoints == checkpoint.absolute().parent else None


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
    hf_files = path / HF_FILES
    return ModelSource(path, manifest, model, length, run, hf_files if hf_files.is_dir() else None)
