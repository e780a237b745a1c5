"""Parity: transformers, the installed version and 4.46.3, computes what megazh computes, and the other way round.

Weights are ten times as large as usual, since a wrong rotation of positions hides behind small ones.
"""

import functools
import json
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
from megazh.model.generate import SamplingOptions, cached_forward
from megazh.pipeline.precision import Dtype
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.model_source import find_model
from megazh.training.text_model import open_model

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
    "qwen2, head_dim 48": {**QWEN, "hidden_size": 96, "num_attention_heads": 2},
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
        answers = ask(version, folder, questions)
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
    ask("installed", tmp_path, [{"what": "logits", **question, "output": str(tmp_path / "logits.npy")}])
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
        made = make_run(root / family, write_recipe(root / f"{family}.yaml", stories, model=shape))
        export_to_hf(find_model(made.path), root / f"hf-{family}", ExportOptions())
        found[family] = (made.path, root / f"hf-{family}")
    return found


def greedy(path: Path, count: int = 60) -> str:
    """What `megazh sample PATH PROMPT --temperature 0` writes."""
    return PROMPT + "".join(open_model(path).stream(PROMPT, count, SamplingOptions(temperature=0.0), 0))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_greedy_text(run: dict[str, tuple[Path, Path]], tmp_path: Path, version: str) -> None:
    questions = [{"what": "generated", "folder": str(hf), "prompt": PROMPT, "count": 60} for _, hf in run.values()]
    for (path, _), answer in zip(run.values(), ask(version, tmp_path, questions), strict=True):
        assert answer["text"] == greedy(path)
        assert answer["tokens"] == 60
        assert answer["drawing"] == [True, 0.8, 50, 0.95]
        assert answer["eos"] == open_model(path).tokenizer.eod_id
