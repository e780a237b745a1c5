"""Weights of a checkpoint loaded in one process: equal to those saved, and files with anything else are refused."""

import hashlib
import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import add_checkpoint, make_run, write_recipe
from pieces import SHAPES, in_layout, whole_state, write_checkpoint
from safetensors.torch import load_file

from megazh.errors import DataError
from megazh.model.decoder import Decoder
from megazh.run.folder import RunFolder
from megazh.training.checkpoint_list import DIGEST, MANIFEST
from megazh.training.model_source import find_model
from megazh.training.recipe import run_recipe
from megazh.training.weights import export_weights, load_decoder

CPU = torch.device("cpu")


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A run with a checkpoint of step 6."""
    return make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories))


@pytest.fixture
def checkpoint(run: RunFolder) -> Path:
    return run.checkpoints / "step_00000006"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_the_one_that_was_saved(run: RunFolder, tied: bool, dtype: torch.dtype) -> None:
    recipe = run_recipe(run)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"tie_word_embeddings": tied})})
    found = load_decoder(find_model(add_checkpoint(run, recipe, 9, dtype)), CPU)
    expected = Decoder(recipe.model, seed=9).to(dtype)
    tensors = dict(found.named_parameters())
    assert tensors.keys() == dict(expected.named_parameters()).keys()
    for name, tensor in expected.named_parameters():
        assert tensors[name].dtype == dtype
        assert torch.equal(tensors[name], tensor), name
    assert (found.head.weight is found.embedding.weight) == tied
    assert not found.training


def test_a_file_that_has_changed(checkpoint: Path) -> None:
    path = checkpoint / "weights" / "blocks.0.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path}: wrong content"):
        load_decoder(find_model(checkpoint), CPU)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": 64}, r"blocks.0.attention.o_proj.weight has shape \[32, 32\] in it, and shape \["),
        ({"intermediate_size": 96}, r"blocks.0.mlp.down_proj.weight has shape \[32, 64\] in it, and shape \[32, 96\]"),
        ({"qkv_bias": True}, r"blocks.0.attention.qkv_proj.bias has no place in it, and shape"),
        ({"num_hidden_layers": 1}, r"blocks.1.attention.o_proj.weight has shape \[32, 32\] in it, and no place"),
    ],
)
def test_weights_of_another_model(checkpoint: Path, change: dict[str, object], problem: str) -> None:
    source = find_model(checkpoint)
    other = replace(source, model=source.model.model_copy(update=change))
    with pytest.raises(DataError, match=problem) as refusal:
        load_decoder(other, CPU)
    assert "in the model that it describes: it is damaged; remove" in str(refusal.value)
    assert "\n" not in str(refusal.value)


class Harmful:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self._folder,)


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_file_is_not_run(checkpoint: Path, tmp_path: Path, legacy: bool) -> None:
    path, made = checkpoint / "weights" / "embedding.safetensors", tmp_path / "made"
    if legacy:
        path.write_bytes(pickle.dumps({"weight": Harmful(made)}, protocol=2))
    else:
        torch.save({"weight": Harmful(made)}, path)
    manifest = read_manifest_unchecked(checkpoint)
    for entry in manifest["files"]:
        data = (checkpoint / entry["name"]).read_bytes()
        entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"{path}: not a file of tensors: ") as refusal:
        load_decoder(find_model(checkpoint), CPU)
    assert "\n" not in str(refusal.value)
    assert not made.exists()


def read_manifest_unchecked(checkpoint: Path) -> Any:
    """The values of a manifest, whatever its files hold."""
    values = json.loads((checkpoint / MANIFEST).read_text())
    del values[DIGEST]
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_takes_masters_where_it_can(tmp_path: Path, dtype: torch.dtype) -> None:
    state = whole_state(4)
    checkpoint = write_checkpoint(tmp_path, in_layout(state, 2, 2), 3)
    target = tmp_path / "model.safetensors"
    assert export_weights(checkpoint, target, dtype) == sum(map(math.prod, SHAPES.values()))
    found = load_file(target)
    assert found.keys() == SHAPES.keys()
    for name, shape in SHAPES.items():
        kind = "master" if dtype is torch.float32 else "weight"
        assert torch.equal(found[name], state[name, kind].view(shape))
        assert found[name].dtype == dtype
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, in_layout(whole_state(4), 1, 1), 3)
    with pytest.raises(FileNotFoundError):
        export_weights(checkpoint, tmp_path / "nowhere" / "model.safetensors", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
