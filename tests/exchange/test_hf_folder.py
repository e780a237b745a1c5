"""Folders that are refused before anything of them is used, each with what is wrong in one line."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import decoder, small
from safetensors.torch import load_file, save_file
from saved_models import as_tensors

from megazh.errors import DataError
from megazh.exchange.families import Family
from megazh.exchange.hf_config import hf_config
from megazh.exchange.hf_folder import HfFolder

INDEX = "model.safetensors.index.json"
Change = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a small Llama in two files."""
    model = decoder(small())
    values = hf_config(model.config, Family.LLAMA, 64, "float32", 0, None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = {name: tensor.clone() for name, tensor in as_tensors(model).items()}
    index = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tmp_path


def edit(name: str, key: str, value: Any) -> Change:
    """Set `key`, with dots between levels, in a JSON file."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        inner = values
        *above, last = key.split("/")
        for each in above:
            inner = inner[each]
        inner[last] = value
        (folder / name).write_text(json.dumps(values))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Change the tensors of the second file."""

    def changed(folder: Path) -> None:
        found = load_file(folder / "model-00002-of-00002.safetensors")
        change(found)
        save_file(found, folder / "model-00002-of-00002.safetensors")

    return changed


class Harmful:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("made"),)


def only_a_pickle(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))


KEYS = "model.layers.1.self_attn.k_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def test_a_good_folder(folder: Path) -> None:
    found = HfFolder(folder)
    assert found.model.hidden_size == 32
    assert found.places[NORM].file == "model-00002-of-00002.safetensors"
    before = found.digest()
    edit("config.json", "rope_theta", 5.0)(folder)
    assert HfFolder(folder).digest() != before


def test_numbers_that_follow_from_the_config_are_passed_over(folder: Path) -> None:
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    tensors(lambda found: found.update({name: torch.zeros(4)}))(folder)
    edit(INDEX, f"weight_map/{name}", "model-00002-of-00002.safetensors")(folder)
    assert name not in {tensor.name for tensor in HfFolder(folder).tensors}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no Hugging Face folder: config.json is missing"),
        (edit("config.json", "model_type", "gpt2"), "config.json: model_type is 'gpt2'"),
        (edit("config.json", "attn_logit_softcapping", 50.0), "may change the computation: attn_logit_softcapping"),
        (edit("config.json", "num_hidden_layers", 3), r"holds no model.layers.2.input_layernorm.weight, .* and 6 more"),
        (edit("config.json", "num_hidden_layers", 10**9), "20 tensors for num_hidden_layers=1000000000"),
        (edit("config.json", "num_hidden_layers", 1), "holds model.layers.1.input_layernorm.weight, .* says nothing"),
        (edit("config.json", "tie_word_embeddings", False), "holds no lm_head.weight"),
        (edit("config.json", "intermediate_size", 41), r"mlp.gate_proj.weight has shape \[40, 32\], .* \[41, 32\]"),
        (only_a_pickle, r"pytorch_model.bin: a Python pickle, .* transformers.AutoModelForCausalLM"),
        (edit(INDEX, f"weight_map/{NORM}", "../elsewhere.safetensors"), "names the file '../elsewhere.safetensors'"),
        (edit(INDEX, f"weight_map/{NORM}", "/etc/passwd"), "names the file '/etc/passwd'"),
        (edit(INDEX, f"weight_map/{NORM}", "model-3.safetensors"), "model-3.safetensors: missing, and .* names it"),
        (edit(INDEX, f"weight_map/{NORM}", "model-00001-of-00002.safetensors"), "says that .*, and it does not"),
        (edit(INDEX, "weight_map/x", "model-00001-of-00002.safetensors"), "says that .* holds x, and it does not"),
        (edit(INDEX, "weight_map", [1]), "weight_map is no object"),
        (edit(INDEX, "weight_map", {"a": 1}), "weight_map is no object"),
        (lambda folder: (folder / INDEX).write_text("{"), "index.json: missing or damaged"),
        (lambda folder: (folder / INDEX).unlink(), "holds neither model.safetensors nor"),
        (tensors(lambda found: found.pop(NORM)), f"holds {NORM}, and it does not"),
        (tensors(lambda found: found.update({"x": torch.zeros(2)})), "does not name x"),
        (
            tensors(lambda found: found.update({"model.norm.weight": torch.zeros(32)})),
            "holds model.norm.weight, .* too",
        ),
        (tensors(lambda found: found.update({NORM: torch.zeros(32).double()})), f"{NORM} is F64; expected BF16, F32"),
        (
            tensors(
                lambda found: found.update(
                    {NORM.replace("input_layernorm", "self_attn.k_proj"): torch.zeros(32, 32).half()}
                )
            ),
            "k_proj.weight is F16, and others of its layer are F32",
        ),
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").write_bytes(pickle.dumps(Harmful())),
            "not a file of tensors",
        ),
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").write_bytes(
                (folder / "model-00002-of-00002.safetensors").read_bytes()[:-1]
            ),
            "not a file of tensors",
        ),
    ],
)
def test_what_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Change, problem: str) -> None:
    monkeypatch.chdir(folder)
    change(folder)
    with pytest.raises(DataError, match=problem) as refusal:
        HfFolder(folder)
    assert "\n" not in str(refusal.value)
    assert not (folder / "made").exists()
