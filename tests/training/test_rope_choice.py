"""Rotary positions of a model that is trained on at a longer length: the factor, what it adds to, exports, refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from decoders import decoder, small
from recipes import in_sections
from saved_models import save_model

from megazh.errors import UsageError
from megazh.exchange.families import choose_family
from megazh.exchange.hf_config import hf_config, model_config
from megazh.model.config import ModelConfig
from megazh.model.rope import Rotary
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.model_source import find_model, read_shape
from megazh.training.recipe import Recipe, read_recipe
from megazh.training.rope_choice import context_length, rotations

QWEN: dict[str, Any] = {"qkv_bias": True, "rope_theta": 1e6}
KEYS = {"manifest": "m.yaml", "micro_batch_size": 1, "global_batch_size": 1, "learning_rate": 1e-3, "steps": 1}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"type": "linear", "factor": 4.0}


def trained(folder: Path, seq_len: int = 64, **shape: Any) -> Path:
    """A checkpoint of a small model that was trained on `seq_len` tokens at a time."""
    return save_model(folder, decoder(small(**QWEN, **shape)), seq_len=seq_len)


def read(folder: Path, seq_len: int, model: dict[str, Any], *settings: str) -> Recipe:
    """Read a recipe with this section `model`."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**in_sections({**KEYS, "seq_len": seq_len}), "model": model}))
    return read_recipe(path, settings)[0]


def chosen(folder: Path, source: Path, seq_len: int, choice: Any) -> ModelConfig:
    """The model of a recipe that takes its shape from a folder."""
    return read(folder, seq_len, {"from": str(source), "rope_scaling": choice}).model


def written(model: ModelConfig) -> dict[str, Any] | None:
    return model.rope_scaling and model.rope_scaling.model_dump(mode="json", exclude_defaults=True)


def test_the_four_choices(tmp_path: Path) -> None:
    source = trained(tmp_path)
    same = {"original_max_position_embeddings": 64}
    for choice in ("linear", {"type": "linear", "factor": "auto"}):
        assert written(chosen(tmp_path, source, 256, choice)) == {"type": "linear", "factor": 4.0, **same}
    assert written(chosen(tmp_path, source, 193, "yarn")) == {"type": "yarn", "factor": 4.0, **same}, "rounded up"
    own = chosen(tmp_path, source, 256, {"type": "yarn", "factor": "auto", "beta_fast": 16.0, "attention_factor": 1.5})
    assert written(own) == {**YARN, "beta_fast": 16.0, "attention_factor": 1.5}
    for choice in ("theta", {"type": "theta"}, {"type": "theta", "factor": 4}):
        raised = chosen(tmp_path, source, 256, choice)
        assert raised.rope_scaling is None
        assert raised.rope_theta == pytest.approx(1e6 * 4 ** (8 / 6))
    lowest = [model.rope_theta ** (-6 / 8) for model in (chosen(tmp_path, source, 256, "none"), raised)]
    assert lowest[0] == pytest.approx(4 * lowest[1]), "the lowest frequency of 8 dimensions is divided by the factor"
    for choice in ("none", "linear", "yarn", "theta"):
        assert chosen(tmp_path, source, 64, choice) == find_model(source).model, "nothing to extend"


def test_the_weights_count_where_both_are_given(tmp_path: Path) -> None:
    short, long = trained(tmp_path / "short", 32), trained(tmp_path / "long", 64)
    shape = small(**QWEN).model_dump(mode="json", exclude_none=True)
    weights = f"initial_checkpoint={long}"
    for model in (shape, {"from": str(short)}):
        recipe = read(tmp_path, 256, {**model, "rope_scaling": "yarn"}, weights)
        assert written(recipe.model) == YARN
        assert recipe == read_recipe(_saved(tmp_path, recipe))[0], "the run's config.yaml has numbers"
    assert written(read(tmp_path, 256, shape, weights, "model.rope_scaling={type: yarn, factor: auto}").model) == YARN


def _saved(folder: Path, recipe: Recipe) -> Path:
    path = folder / "config.yaml"
    path.write_text(recipe.to_yaml())
    return path


def test_on_top_of_a_scaling(tmp_path: Path) -> None:
    yarn = trained(tmp_path / "yarn", 256, rope_scaling={**YARN, "beta_fast": 16.0})
    assert written(chosen(tmp_path, yarn, 512, "yarn")) == {**YARN, "factor": 8.0, "beta_fast": 16.0}
    linear = trained(tmp_path / "linear", 256, rope_scaling={**LINEAR, "original_max_position_embeddings": 64})
    twice = chosen(tmp_path, linear, 512, "linear")
    assert written(twice) == {**LINEAR, "factor": 8.0, "original_max_position_embeddings": 64}
    raised = chosen(tmp_path, linear, 512, "theta")
    assert (raised.rope_theta, written(raised)) == (
        pytest.approx(1e6 * 2 ** (8 / 6)),
        written(find_model(linear).model),
    )
    for source, choice, there in ((linear, "yarn", "linear"), (yarn, "linear", "yarn"), (yarn, "theta", "yarn")):
        with pytest.raises(UsageError, match=rf"the model has {there} scaling by 4 already, and {choice} cannot"):
            chosen(tmp_path, source, 512, choice)
        assert chosen(tmp_path, source, 512, "none") == find_model(source).model
    own = trained(tmp_path / "own", 256, rope_scaling={**YARN, "attention_factor": 1.5})
    with pytest.raises(UsageError, match=r"yarn scaling by 4 and attention_factor 1.5 already"):
        chosen(tmp_path, own, 512, "yarn")


def test_a_long_model_that_was_tuned_on_short_texts_stays_long(tmp_path: Path) -> None:
    tuned = trained(tmp_path, 128, rope_scaling=YARN)
    assert context_length(find_model(tuned).model, 128) == 256
    assert chosen(tmp_path, tuned, 256, "yarn") == find_model(tuned).model


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ("ntk", "expected one of none, linear, yarn, theta, or a mapping of type and factor; found 'ntk'"),
        ({"type": "theta", "factor": 0.5}, "factor: expected auto or a number of at least 1, found 0.5"),
        ({"type": "linear", "factor": "auto", "beta_fast": 1.0}, "linear takes no beta_fast"),
        ({**YARN, "factor": "auto"}, "original_max_position_embeddings follows from the model"),
        ({"type": "yarn", "factor": "auto", "beta": 1.0}, "unknown key 'model.rope_scaling.beta'"),
        ({"type": "yarn", "factor": "double"}, "'model.rope_scaling.factor'"),
    ],
)
def test_refusals(tmp_path: Path, choice: Any, problem: str) -> None:
    with pytest.raises(UsageError, match=re.escape(problem)):
        chosen(tmp_path, trained(tmp_path), 256, choice)


def test_refusals_without_a_model_and_of_two_thetas(tmp_path: Path) -> None:
    shape = small(**QWEN).model_dump(mode="json", exclude_none=True)
    with pytest.raises(
        UsageError, match=r"recipe.yaml:\d+: model.rope_scaling: yarn goes on from a trained model; set"
    ):
        read(tmp_path, 256, {**shape, "rope_scaling": "yarn"})
    assert read(tmp_path, 256, {**shape, "rope_scaling": "none"}).model == small(**QWEN)
    assert read(tmp_path, 256, {**shape, "rope_scaling": "none"}, "initial_checkpoint=later").model == small(**QWEN)
    with pytest.raises(UsageError, match=r"model.rope_scaling: nowhere: no run"):
        read(tmp_path, 256, {**shape, "rope_scaling": "yarn"}, "initial_checkpoint=nowhere")
    source = trained(tmp_path)
    with pytest.raises(UsageError, match=r"theta sets model.rope_theta, which is 5.0; leave one of them out"):
        read(tmp_path, 256, {"from": str(source), "rope_scaling": "theta", "rope_theta": 5.0})
    narrow = trained(tmp_path / "narrow", head_dim=2)
    with pytest.raises(UsageError, match="of 2 rotated dimensions, theta changes no frequency"):
        chosen(tmp_path, narrow, 256, "theta")


@pytest.mark.parametrize("choice", ["none", "linear", "yarn", "theta"])
def test_transformers_rotates_an_export_alike(tmp_path: Path, choice: str) -> None:
    """Cosines and sines, yarn's temperature included, far behind the 64 trained tokens; both forms of config.json."""
    from transformers import AutoConfig
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    model = chosen(tmp_path, trained(tmp_path, head_dim=None), 256, choice)
    values = hf_config(model, choose_family(model), 256, "float32", None, None)
    positions = torch.arange(256)[None]
    ours = torch.stack(Rotary(model)(positions))[..., 0, :]
    for form in (values, _as_version_5(values)):
        config = AutoConfig.for_model(**form)
        theirs = torch.stack(Qwen2RotaryEmbedding(config)(torch.zeros(1), positions))
        torch.testing.assert_close(torch.cat((ours, ours), -1), theirs, rtol=0, atol=2e-5)
        assert model_config(form, "config.json").rope_theta == model.rope_theta
    plain = torch.stack(Rotary(small(**QWEN))(positions))[..., 0, :]
    assert torch.equal(plain, ours) == (choice == "none")


def _as_version_5(values: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 5 saves it."""
    rest = {key: value for key, value in values.items() if key not in ("rope_theta", "rope_scaling")}
    scaling = values["rope_scaling"] or {"rope_type": "default"}
    return {**rest, "rope_parameters": {**scaling, "rope_theta": values["rope_theta"]}}


@pytest.mark.parametrize(("choice", "context"), [("linear", 256), ("yarn", 64), ("theta", 256)])
def test_a_folder_has_the_context_that_was_trained(tmp_path: Path, choice: str, context: int) -> None:
    """yarn's max_position_embeddings is the length before the scaling, from which transformers 4 takes the ramp."""
    model = chosen(tmp_path, trained(tmp_path), 256, choice)
    checkpoint = save_model(tmp_path / "long", decoder(model), seq_len=256)
    export_to_hf(find_model(checkpoint), tmp_path / "hf", ExportOptions())
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["max_position_embeddings"] == context
    assert values["rope_theta"] == model.rope_theta, "beside a scaling, too"
    if choice == "yarn":
        assert (values["rope_scaling"]["factor"], values["rope_scaling"]["original_max_position_embeddings"]) == (4, 64)
    again, length = read_shape(tmp_path / "hf")
    assert length == 256
    assert rotations(again) == rotations(model)
