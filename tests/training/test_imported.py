"""Import: a run goes to a Hugging Face folder, back, and out again, byte for byte; foreign files are checked before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import decoder, small
from made_runs import make_run, write_recipe
from safetensors.torch import load_file, save_file
from saved_models import as_tensors, save_model

from megazh.errors import DataError, UsageError
from megazh.exchange.families import Family
from megazh.pipeline.precision import Dtype
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.imported import import_folder
from megazh.training.model_source import find_model
from megazh.training.weights import load_decoder

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"num_key_value_heads": 4},
    "untied, grouped, biases": {"tie_word_embeddings": False, "num_key_value_heads": 2, "qkv_bias": True},
    "yarn": {
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    },
}


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of all tensors in a folder, by name."""
    return {
        name: tensor.view(torch.uint8).numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def export(source: Path, target: Path, **options: Any) -> Path:
    """Export what a path names; returns the folder."""
    export_to_hf(find_model(source), target, ExportOptions(**options))
    return target


def test_the_family_stays(tmp_path: Path) -> None:
    model = decoder(small(num_key_value_heads=2))
    first = export(save_model(tmp_path, model), tmp_path / "hf", family=Family.MISTRAL)
    import_folder(first, tmp_path / "imported")
    again = export(tmp_path / "imported", tmp_path / "again")
    assert json.loads((again / "config.json").read_text()) == json.loads((first / "config.json").read_text())
    other = export(tmp_path / "imported", tmp_path / "other", family=Family.LLAMA)
    assert json.loads((other / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.FP32, Dtype.FP16])
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_again(tmp_path: Path, shape: str, dtype: Dtype) -> None:
    model = decoder(small(**SHAPES[shape]))
    first = export(save_model(tmp_path, model, (2, 2)), tmp_path / "hf", dtype=dtype, shard_bytes=9000)
    (first / "tokenizer.json").write_text("{}")
    import_folder(first, tmp_path / "imported")
    again = export(tmp_path / "imported", tmp_path / "again", shard_bytes=20_000)
    assert weights(again) == weights(first)
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((again / name).read_text()) == json.loads((first / name).read_text())
    assert weights(export(first, tmp_path / "direct")) == weights(first), "without an import"
    found = find_model(tmp_path / "imported")
    assert (found.model, found.trained_length) == (model.config, 64)


def test_a_model_is_loaded_from_all_three(tmp_path: Path) -> None:
    model = decoder(small(tie_word_embeddings=False, qkv_bias=True))
    checkpoint = save_model(tmp_path, model, precision="fp32")
    first = export(checkpoint, tmp_path / "hf", shard_bytes=9000)
    import_folder(first, tmp_path / "imported")
    for path in (checkpoint, first, tmp_path / "imported"):
        found = load_decoder(find_model(path), torch.device("cpu"))
        for name, tensor in model.named_parameters():
            assert torch.equal(found.get_parameter(name), tensor), (path, name)


def test_the_section_of_a_recipe(tmp_path: Path) -> None:
    import yaml

    first = export(save_model(tmp_path, decoder(small(num_key_value_heads=4))), tmp_path / "hf")
    import_folder(first, tmp_path / "imported")
    values = yaml.safe_load((tmp_path / "imported" / "model.yaml").read_text())
    assert values.keys() == {"model"}
    assert values["model"]["hidden_size"] == 32


def test_a_second_copy_of_tied_embeddings(tmp_path: Path) -> None:
    """Qwen1.5-0.5B's own file has one."""
    first = export(save_model(tmp_path, decoder(small())), tmp_path / "hf")
    tensors = load_file(first / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    import_folder(first, tmp_path / "imported")
    assert "lm_head.weight" not in weights(export(tmp_path / "imported", tmp_path / "again"))
    tensors["lm_head.weight"][3, 1] += 1
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        import_folder(first, tmp_path / "other")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named_and_leave_nothing(tmp_path: Path, number: float) -> None:
    first = export(save_model(tmp_path, decoder(small())), tmp_path / "hf")
    tensors = load_file(first / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 1] = number
    save_file(tensors, first / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"model.safetensors: model.layers.1.self_attn.k_proj.weight .*not finite"):
        import_folder(first, tmp_path / "imported")
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    first = export(save_model(tmp_path, decoder(small())), tmp_path / "hf")
    with pytest.raises(UsageError, match="hf: exists already"):
        import_folder(first, first)
    (tmp_path / "empty").mkdir()
    import_folder(first, tmp_path / "empty")


def test_an_imported_folder_inside_a_run_is_not_that_runs(tmp_path: Path, stories: Path) -> None:
    run = make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories))
    first = export(save_model(tmp_path, decoder(small())), tmp_path / "hf")
    import_folder(first, run.path / "models" / "small")
    assert find_model(run.path / "models" / "small").run is None


def test_an_imported_folder_keeps_its_hashes(tmp_path: Path) -> None:
    first = export(save_model(tmp_path, decoder(small())), tmp_path / "hf")
    import_folder(first, tmp_path / "imported")
    path = tmp_path / "imported" / "weights" / "norm.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(DataError, match=r"norm.safetensors: its content has changed"):
        export(tmp_path / "imported", tmp_path / "again")


def test_a_model_made_by_transformers(tmp_path: Path) -> None:
    """Saved in the form of transformers 5: `rope_parameters` and `dtype`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, initializer_range=0.2,
        max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    for name, weight in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    assert "rope_parameters" in json.loads((tmp_path / "hf" / "config.json").read_text())
    import_folder(tmp_path / "hf", tmp_path / "imported")
    model = load_decoder(find_model(tmp_path / "imported"), torch.device("cpu"))
    tokens = torch.randint(0, 97, (2, 256), generator=torch.Generator().manual_seed(1))
    positions, ends = torch.arange(256).expand(2, -1), torch.tensor([[0, 256]] * 2, dtype=torch.int32)
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = model.logits(model(tokens, model.attention(positions, ends)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5
    again = export(tmp_path / "imported", tmp_path / "again")
    assert weights(again) == {name: as_bytes(tensor) for name, tensor in theirs.state_dict().items()}
    assert as_tensors(model).keys() == theirs.state_dict().keys()


def as_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
