"""Weights of a checkpoint loaded in one process: equal to those saved, and files with anything else are refused."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from made_runs import add_checkpoint, make_run, write_manifest, write_recipe

from megazh.errors import DataError
from megazh.model.decoder import Decoder
from megazh.run.folder import RunFolder
from megazh.training.checkpoint_list import STATE
from megazh.training.recipe import Recipe, run_recipe
from megazh.training.weights import load_decoder, load_tensors

CPU = torch.device("cpu")


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A run with a checkpoint of step 6."""
    return make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories))


@pytest.fixture
def checkpoint(run: RunFolder) -> Path:
    return run.checkpoints / "step_00000006"


def layer(checkpoint: Path, number: int) -> Path:
    return checkpoint / STATE / f"layer_{number:02d}-model_states.pt"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_the_one_that_was_saved(run: RunFolder, tied: bool, dtype: torch.dtype) -> None:
    recipe = run_recipe(run)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"tie_word_embeddings": tied})})
    found = load_decoder(add_checkpoint(run, recipe, 9, dtype), recipe, CPU)
    expected = Decoder(recipe.model, seed=9).to(dtype)
    tensors = dict(found.named_parameters())
    assert tensors.keys() == dict(expected.named_parameters()).keys()
    for name, tensor in expected.named_parameters():
        assert tensors[name].dtype == dtype
        assert torch.equal(tensors[name], tensor), name
    assert (found.head.weight is found.embedding.weight) == tied
    assert not found.training


def test_a_layer_that_the_manifest_does_not_name(checkpoint: Path, run: RunFolder) -> None:
    layer(checkpoint, 2).unlink()
    write_manifest(checkpoint, 6, run_recipe(run))
    with pytest.raises(
        DataError, match=r"layer_02-model_states\.pt: missing in .*: the checkpoint belongs to another model"
    ):
        load_decoder(checkpoint, run_recipe(run), CPU)


def test_a_file_that_has_changed(checkpoint: Path, run: RunFolder) -> None:
    path = layer(checkpoint, 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path}: wrong content"):
        load_decoder(checkpoint, run_recipe(run), CPU)


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"intermediate_size": 96}, {"qkv_bias": True}])
def test_weights_of_another_shape(checkpoint: Path, run: RunFolder, change: dict[str, object]) -> None:
    recipe = run_recipe(run)
    other: Recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=change)})
    with pytest.raises(DataError, match=r"layer_0\d-model_states\.pt: does not fit the model: ") as refusal:
        load_decoder(checkpoint, other, CPU)
    assert "\n" not in str(refusal.value)


class Harmful:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self._folder,)


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_file_is_not_run(checkpoint: Path, run: RunFolder, tmp_path: Path, legacy: bool) -> None:
    path, made = layer(checkpoint, 0), tmp_path / "made"
    if legacy:
        path.write_bytes(pickle.dumps({"weight": Harmful(made)}, protocol=2))
    else:
        torch.save({"weight": Harmful(made)}, path)
    write_manifest(checkpoint, 6, run_recipe(run))
    with pytest.raises(DataError, match=rf"{path}: not a checkpoint file: ") as refusal:
        load_decoder(checkpoint, run_recipe(run), CPU)
    assert "\n" not in str(refusal.value)
    assert not made.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x80\x02."])
def test_what_is_no_checkpoint_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "layer.pt"
    path.write_bytes(content)
    with pytest.raises(DataError) as refusal:
        load_tensors(path)
    assert str(refusal.value).startswith(f"{path}: not a checkpoint file: ")
    assert "\n" not in str(refusal.value)
