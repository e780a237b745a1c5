"""Parity: transformers, the installed version and 4.46.3, computes what megazh computes, and the other way round.

Weights are ten times as large as usual, since a wrong rotation of positions hides behind small ones.
"""

import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import alone, decoder, logits, small
from made_runs import make_run, write_recipe
from saved_models import save_model
from transformers_peer import VERSIONS, ask

from megazh.model.decoder import Decoder
from megazh.model.generate import cached_forward, generate
from megazh.model.sampling import SamplingOptions
from megazh.pipeline.precision import Dtype
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.imported import import_folder
from megazh.training.model_source import find_model
from megazh.training.text_model import open_model
from megazh.training.weights import load_decoder

LENGTH, PREFILL, TRAINED = 288, 256, 128
"""Tokens of a row, those of them that come at once, and tokens of the samples that the model was trained on."""
TOLERANCE = 1e-4

LINEAR = {"rope_scaling": {"type": "linear", "factor": 4.0}}
YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}}
QWEN = {"qkv_bias": True, "rope_theta": 1e6}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama, 2 of 4 heads for keys, head_dim 48": {"num_key_value_heads": 2, "head_dim": 48, "rope_theta": 5e5},
    "llama, linear scaling": LINEAR,
    "llama, yarn": {**YARN, "num_key_value_heads": 1},
    "qwen2": QWEN,
    "qwen2, 2 of 4 heads for keys": {**QWEN, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2, head_dim 48": {**QWEN, "hidden_size": 96, "num_attention_heads": 2, "initializer_range": 0.15},
    "qwen2, linear scaling": {**QWEN, **LINEAR, "num_key_value_heads": 2},
    "qwen2, yarn": {**QWEN, **YARN, "num_key_value_heads": 2},
    "mistral, head_dim 48": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 48, "rope_theta": 1e6},
}
"""Shapes by name; each is exported as the family that its name begins with."""
PROMPT = "从前，有一只小兔子。"


def rows() -> torch.Tensor:
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def own_logits(model: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, seq, vocab) of all tokens at once, and of those behind the first with a cache."""
    positions, boundaries = alone(LENGTH)
    tokens = rows()
    with torch.no_grad():
        whole = torch.cat([logits(model, row[None], positions, boundaries) for row in tokens])
    cached = []
    for row in tokens.tolist():
        forward = cached_forward(model, LENGTH)
        pieces = [forward(row[:PREFILL])] + [forward([token]) for token in row[PREFILL:]]
        cached.append(torch.stack(pieces))
    return whole, torch.stack(cached)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Decoder, Path]]:
    """Models and the folders that they were exported to, in fp32."""
    root, found = tmp_path_factory.mktemp("exported"), {}
    for number, (name, changes) in enumerate(CASES.items()):
        model = decoder(small(**changes)).eval()
        source = find_model(save_model(root / f"{number}", model, precision="fp32", seq_len=TRAINED))
        done = export_to_hf(source, root / f"hf{number}", ExportOptions(dtype=Dtype.FP32))
        assert name.startswith(done.family)
        found[name] = (model, root / f"hf{number}")
    return found


@pytest.fixture(scope="module")
def theirs(
    exported: dict[str, tuple[Decoder, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, tuple[torch.Tensor, dict[str, Any]]]]:
    """Logits (2, rows, seq, vocab) of a version of transformers, without and with a cache, and its remarks."""

    @functools.cache
    def of(version: str) -> dict[str, tuple[torch.Tensor, dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("asked")
        files = [folder / f"{number}.npy" for number in range(len(exported))]
        questions = [
            {"what": "logits", "folder": str(path), "tokens": rows().tolist(), "prefill": PREFILL, "output": str(file)}
            for (_, path), file in zip(exported.values(), files, strict=True)
        ]
        answers = ask(version, questions)
        return {
            name: (torch.from_numpy(np.load(file)), answer)
            for name, file, answer in zip(exported, files, answers, strict=True)
        }

    return of


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_logits(
    exported: dict[str, tuple[Decoder, Path]], theirs: Callable[[str], Any], name: str, version: str
) -> None:
    (whole, cached), remarks = theirs(version)[name]
    own_whole, own_cached = own_logits(exported[name][0])
    assert remarks["dtype"] == "torch.float32"
    assert whole.std() > 0.5, "with small weights a wrong rotation would hide"
    assert (own_whole - whole).abs().max() < TOLERANCE
    assert (own_cached - cached[:, PREFILL - 1 :]).abs().max() < TOLERANCE


@pytest.mark.parametrize("change", [{"rope_theta": 10000.0}, {"rope_scaling": None}])
def test_another_rotation_is_noticed(
    exported: dict[str, tuple[Decoder, Path]], tmp_path: Path, change: dict[str, Any]
) -> None:
    model, folder = exported["qwen2, linear scaling"]
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "config.json").write_text(json.dumps({**values, **change}))
    (tmp_path / "wrong" / "model.safetensors").symlink_to(folder / "model.safetensors")
    question = {"folder": str(tmp_path / "wrong"), "tokens": rows().tolist(), "prefill": LENGTH}
    ask("installed", [{"what": "logits", **question, "output": str(tmp_path / "logits.npy")}])
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))[0]
    assert (own_logits(model)[0] - found).abs().max() > 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> dict[str, tuple[Path, Path]]:
    """Runs with a tokenizer and large weights, by family, and the folders that they were exported to.

    The model has no row that no token has: megazh never draws such a one, and transformers knows of none.
    """
    root, found = tmp_path_factory.mktemp("runs"), {}
    for family in ("llama", "qwen2"):
        shape = {"vocab_size": 400, "num_key_value_heads": 2, "qkv_bias": family == "qwen2", "initializer_range": 0.2}
        shape["rope_theta"] = 5e5
        made = make_run(root / family, write_recipe(root / f"{family}.yaml", stories, model=shape))
        export_to_hf(find_model(made.path), root / f"hf-{family}", ExportOptions())
        found[family] = (made.path, root / f"hf-{family}")
    return found


def greedy(path: Path, count: int = 60) -> str:
    """What `megazh sample PATH PROMPT --temperature 0` writes."""
    return PROMPT + "".join(open_model(path).stream(PROMPT, count, SamplingOptions(temperature=0.0), 0))


def test_run_checkpoint_folder_and_import_write_the_same(run: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    path, hf = run["qwen2"]
    (checkpoint,) = (path / "checkpoints").iterdir()
    import_folder(hf, tmp_path / "imported")
    assert greedy(path) == greedy(checkpoint) == greedy(hf) == greedy(tmp_path / "imported")


@pytest.mark.parametrize("version", VERSIONS)
def test_texts_end_where_the_folder_says(run: dict[str, tuple[Path, Path]], tmp_path: Path, version: str) -> None:
    """As a chat model's end at the end of a turn: here at the second new token."""
    path, hf = run["llama"]
    model = open_model(path)
    ids = model.tokenizer.encode(PROMPT)
    first, second = itertools.islice(
        generate(cached_forward(model.model, 99), ids, 9, SamplingOptions(temperature=0.0), 400, (), 0), 2
    )
    assert first != second
    shutil.copytree(hf, tmp_path / "hf")
    config = {"eos_token_id": [second, model.tokenizer.eod_id], "pad_token_id": 0}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(config))
    (answer,) = ask(version, [{"what": "generated", "folder": str(tmp_path / "hf"), "prompt": PROMPT, "count": 60}])
    assert answer["tokens"] == 2, "with the token that ends it"
    assert len(greedy(tmp_path / "hf")) < len(greedy(path))
    assert list(open_model(tmp_path / "hf").stream(PROMPT, 60, SamplingOptions(temperature=0.0), 0))[1:] == [""]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_transformers_saves_is_read_back(run: dict[str, tuple[Path, Path]], tmp_path: Path, version: str) -> None:
    """transformers 5 saves rope_parameters and dtype, and a class of tokenizers that version 4 does not know."""
    saved = [(path, hf, tmp_path / family) for family, (path, hf) in run.items()]
    ask(version, [{"what": "resaved", "folder": str(hf), "output": str(out)} for _, hf, out in saved])
    for path, _, out in saved:
        values = json.loads((out / "config.json").read_text())
        assert ("rope_parameters" in values) == (version == "installed")
        assert find_model(out).model.rope_theta == 5e5
        assert greedy(out) == greedy(path)


@pytest.mark.parametrize("version", VERSIONS)
def test_logits_of_models_that_transformers_made(tmp_path: Path, version: str) -> None:
    shape = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
        "initializer_range": 0.2, "max_position_embeddings": TRAINED, "num_key_value_heads": 2, "rope_theta": 5e5,
    }  # fmt: skip
    if version == "installed":
        shape["rope_parameters"] = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
    cases = {
        "llama": {"head_dim": 48},
        "qwen2": {"tie_word_embeddings": True},
        "mistral": {"head_dim": 48, "sliding_window": None},
    }
    questions = []
    for family, more in cases.items():
        out = str(tmp_path / family)
        questions += [
            {"what": "made", "model_type": family, "config": {**shape, **more}, "output": out},
            {"what": "logits", "folder": out, "tokens": rows().tolist(), "prefill": LENGTH, "output": f"{out}.npy"},
        ]
    ask(version, questions)
    for family in cases:
        expected = torch.from_numpy(np.load(tmp_path / f"{family}.npy"))[0]
        model = load_decoder(find_model(tmp_path / family), torch.device("cpu"))
        assert expected.std() > 0.5
        assert (own_logits(model)[0] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_greedy_text(run: dict[str, tuple[Path, Path]], tmp_path: Path, version: str) -> None:
    questions = [{"what": "generated", "folder": str(hf), "prompt": PROMPT, "count": 60} for _, hf in run.values()]
    for (path, _), answer in zip(run.values(), ask(version, questions), strict=True):
        assert answer["text"] == greedy(path)
        assert answer["tokens"] == 60
        assert answer["drawing"] == [True, 0.8, 50, 0.95]
        assert answer["eos"] == open_model(path).tokenizer.eod_id
