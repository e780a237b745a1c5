"""`model.from`: a recipe takes its model from a folder, and nothing beside it may contradict that."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from decoders import decoder, small
from made_runs import make_run, write_recipe
from recipes import in_sections
from saved_models import save_model

from megazh.errors import DataError, SeveralErrors, UsageError
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.imported import import_folder
from megazh.training.model_from import differences
from megazh.training.model_source import find_model
from megazh.training.recipe import Recipe, read_recipe, run_recipe

SHAPE: dict[str, Any] = {"qkv_bias": True, "num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": False}
KEYS = {
    "manifest": "m.yaml",
    "seq_len": 16,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "learning_rate": 1e-3,
    "steps": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The Hugging Face folder of a small model."""
    target = tmp_path / "hf"
    export_to_hf(find_model(save_model(tmp_path, decoder(small(**SHAPE)))), target, ExportOptions())
    return target


def read(tmp_path: Path, model: dict[str, Any], *settings: str) -> Recipe:
    """Read a recipe with this section `model`."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**in_sections(KEYS), "model": model}))
    return read_recipe(path, settings)[0]


def test_a_hugging_face_folder_an_import_and_a_checkpoint(tmp_path: Path, folder: Path) -> None:
    import_folder(folder, tmp_path / "imported")
    for path in (folder, tmp_path / "imported", tmp_path / "step_00000003"):
        assert list(differences(read(tmp_path, {"from": str(path)}).model, small(**SHAPE))) == []
        assert list(differences(read(tmp_path, {}, f"model.from={path}").model, small(**SHAPE))) == []


def test_a_run(tmp_path: Path, stories: Path) -> None:
    run = make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories))
    assert read(tmp_path, {"from": str(run.path)}).model == run_recipe(run).model


def test_weights_are_not_looked_at_for_a_shape(tmp_path: Path, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert read(tmp_path, {"from": str(folder)}).model.hidden_size == 32


def test_keys_beside_it(tmp_path: Path, folder: Path) -> None:
    beside = {"residual_dropout": 0.1, "rope_theta": 1e4, "hidden_size": 32, "head_dim": 8}
    recipe = read(tmp_path, {"from": str(folder), **beside}, "rope_scaling={type: linear, factor: 2.0}")
    assert (recipe.model.residual_dropout, recipe.model.rope_theta, recipe.model.head_dim) == (0.1, 1e4, 8)
    assert recipe.model.rope_scaling is not None
    again = yaml.safe_load(recipe.to_yaml())
    assert "from" not in again["model"], "the folder may be gone when the run goes on"


def test_keys_that_contradict_it(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(SeveralErrors) as refusal:
        read(tmp_path, {"from": str(folder), "hidden_size": 64, "qkv_bias": False})
    first, second = str(refusal.value).splitlines()
    said = f"model.hidden_size=64, and model.from={folder} has 32; leave one of them out"
    assert re.fullmatch(rf".*recipe.yaml:\d+: {said}", first)
    assert "model.qkv_bias=False" in second
    with pytest.raises(UsageError, match=r"command line: model.num_hidden_layers=1, and "):
        read(tmp_path, {"from": str(folder)}, "num_hidden_layers=1")


@pytest.mark.parametrize(
    ("value", "problem"),
    [(3, "recipe.yaml:.*model.from: expected the path"), ("nowhere", "nowhere: no run"), ("", "expected the path")],
)
def test_what_is_no_folder(tmp_path: Path, value: Any, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        read(tmp_path, {"from": value})


def test_a_model_that_cannot_be_computed(tmp_path: Path, folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"qwen2"', '"gpt2"'))
    with pytest.raises(DataError, match="model_type is 'gpt2'"):
        read(tmp_path, {"from": str(folder)})
