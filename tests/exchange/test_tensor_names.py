"""Names of tensors: together they are every row of every parameter, once."""

from typing import Any

import pytest
from decoders import small

from megazh.exchange.tensor_names import hf_tensors
from megazh.model.decoder import Decoder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True, "num_key_value_heads": 2, "tie_word_embeddings": False},
        {"head_dim": 12, "num_key_value_heads": 1, "vocab_size": 65},
    ],
)
def test_every_row_of_every_parameter_once(changes: dict[str, Any]) -> None:
    config = small(**changes)
    expected = {
        name: (getattr(weight, "rows", len(weight)), *weight.shape[1:])
        for name, weight in Decoder(config, seed=None).named_parameters()
    }
    rows: dict[str, int] = {}
    for tensor in hf_tensors(config):
        assert tensor.parameter_shape == expected[tensor.parameter], tensor
        assert tensor.begin == rows.get(tensor.parameter, 0)
        assert tensor.shape == (tensor.end - tensor.begin, *tensor.parameter_shape[1:])
        rows[tensor.parameter] = tensor.end
    assert rows == {name: shape[0] for name, shape in expected.items()}


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 2}])
def test_names_and_shapes_are_those_of_transformers(changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    from megazh.exchange.families import choose_family
    from megazh.exchange.hf_config import hf_config

    config = small(**changes)
    values = hf_config(config, choose_family(config), 64, "float32", 0, 0)
    kinds = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(kinds[values["model_type"]].from_dict(values))
    found = {name: tuple(weight.shape) for name, weight in theirs.named_parameters()}
    assert found == {tensor.name: tensor.shape for tensor in hf_tensors(config)}
