"""Export: from any layout the tensors are those that were saved, transformers computes the same, in little memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import decoder, small
from safetensors.torch import load_file
from saved_models import as_tensors, save_model

from megazh.errors import DataError, UsageError
from megazh.exchange.families import Family
from megazh.pipeline.precision import Dtype
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.model_source import find_model

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, grouped, biases": {"tie_word_embeddings": False, "num_key_value_heads": 2, "qkv_bias": True},
    "head_dim": {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": False},
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def export(checkpoint: Path, target: Path, **options: Any) -> Path:
    """Export a checkpoint; returns the folder."""
    export_to_hf(find_model(checkpoint), target, ExportOptions(**options))
    return target


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.FP32])
@pytest.mark.parametrize(
    ("shape", "layout"), [("tied", (2, 2)), ("untied, grouped, biases", (2, 2)), ("head_dim", (1, 3))]
)
def test_tensors_are_those_that_were_saved(tmp_path: Path, shape: str, layout: tuple[int, int], dtype: Dtype) -> None:
    model = decoder(small(**SHAPES[shape]))
    target = export(save_model(tmp_path, model, layout), tmp_path / "hf", dtype=dtype, shard_bytes=20_000)
    found, expected = tensors_of(target), as_tensors(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype.torch
        assert torch.equal(found[name], tensor.to(dtype.torch)), name
    assert len(list(target.glob("*.safetensors"))) > 1
    config = json.loads((target / "config.json").read_text())
    assert (config["torch_dtype"], config["max_position_embeddings"]) == (str(dtype.torch)[6:], 64)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_usual_dtype_is_that_of_the_weights(tmp_path: Path) -> None:
    model = decoder(small())
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        target = export(save_model(tmp_path / precision, model, precision=precision), tmp_path / precision / "hf")
        assert {tensor.dtype for tensor in tensors_of(target).values()} == {dtype}


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same(tmp_path: Path, shape: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = small(**SHAPES[shape], rope_theta=1e6)
    model = decoder(config)
    target = export(save_model(tmp_path, model, (2, 2), seq_len=256), tmp_path / "hf", dtype=Dtype.FP32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tokens = torch.randint(0, config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(256).expand(2, -1)
    with torch.no_grad():
        expected = theirs(tokens).logits
        hidden = model(tokens, model.attention(positions, torch.tensor([[0, 256]] * 2, dtype=torch.int32)))
        torch.testing.assert_close(model.logits(hidden), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5, "with small weights a wrong rotation would hide"


def test_a_damaged_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = save_model(tmp_path, decoder(small()))
    path = checkpoint / "weights" / "norm.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"norm.safetensors: its content has changed .*; take another checkpoint"):
        export(checkpoint, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_a_checkpoint_that_does_not_fit_its_own_model(tmp_path: Path) -> None:
    checkpoint = save_model(tmp_path, decoder(small()))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["recipe"]["model"]["qkv_bias"] = True
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"blocks.0.attention.qkv_proj.bias has no place in it, and shape \[96\]"):
        export(checkpoint, tmp_path / "hf")
    manifest["recipe"] = {}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="recipe: does not describe a model"):
        export(checkpoint, tmp_path / "hf")


def test_a_model_that_no_family_can_express(tmp_path: Path) -> None:
    checkpoint = save_model(tmp_path, decoder(small(norm="layernorm", mlp="gelu")))
    with pytest.raises(UsageError, match=r"no family .*model.norm=layernorm .*model.mlp=gelu"):
        export(checkpoint, tmp_path / "hf")
    with pytest.raises(UsageError, match=r"--family mistral: .*model.mlp=gelu"):
        export(checkpoint, tmp_path / "hf", family=Family.MISTRAL)


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    one, other = save_model(tmp_path / "1", decoder(small())), save_model(tmp_path / "2", decoder(small(), seed=4))
    target = tmp_path / "hf"
    target.mkdir()
    export(one, target)
    with pytest.raises(UsageError, match=r"hf: holds README.md already; .*--force"):
        export(other, target)
    (target / "model-00001-of-00002.safetensors").write_text("")
    export(other, target, force=True)
    assert not (target / "model-00001-of-00002.safetensors").exists()
    wanted = as_tensors(decoder(small(), seed=4))
    assert all(torch.equal(found, wanted[name].bfloat16()) for name, found in tensors_of(target).items())
    with pytest.raises(UsageError, match=r"holds manifest.json, and no export alone: --force does not"):
        export(other, one, force=True)
    with pytest.raises(UsageError, match=r"manifest.json: is a file"):
        export(other, one / "manifest.json", force=True)
    (target / "optimizer").mkdir()  # as in a checkpoint of -t hf, which has weights and config.json, too
    with pytest.raises(UsageError, match=r"holds optimizer, and no export alone: --force does not"):
        export(other, target, force=True)
    (target / "optimizer").rmdir()
    with pytest.raises(UsageError, match=r"is the model that is read"):
        export(target, target, force=True)
    link = tmp_path / "link"
    link.symlink_to(target)
    export(one, link, force=True)
    assert link.is_symlink()
    assert target.is_dir()


MEMORY = """
import sys, threading
from pathlib import Path
import torch
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.model_source import find_model
from megazh.pipeline.precision import Dtype

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

before, most, done = private(), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.002):
        most = max(most, private())
watcher = threading.Thread(target=watch)
watcher.start()
export_to_hf(find_model(Path(sys.argv[1])), Path(sys.argv[2]), ExportOptions(Dtype.BF16))
done.set()
watcher.join()
print((most - before) // 1024)
"""


def test_memory_is_that_of_a_block_and_not_of_the_model(tmp_path: Path) -> None:
    """The model takes 98 MiB in fp32, most of it the embedding. Files are mapped, which is no memory of its own."""
    config = small(vocab_size=48_000, hidden_size=512, num_attention_heads=8, intermediate_size=64)
    checkpoint = save_model(tmp_path, decoder(config), precision="fp32")
    finished = subprocess.run(
        [sys.executable, "-c", MEMORY, checkpoint, tmp_path / "hf"], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 45 * 2**20
    assert 4 < int(finished.stdout) < 40, "a block of 4 million numbers in bf16 takes 8 MiB"
