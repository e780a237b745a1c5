"""Defaults that follow from other keys; refusals that name key and numbers; a description of every key."""

from typing import Any

import pytest
from decoders import small

from megazh.config import Config, from_mapping
from megazh.errors import UsageError
from megazh.model.config import ModelConfig, RopeScaling

SHAPE = {
    "vocab_size": 10,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 8,
}


def test_what_follows_from_other_keys() -> None:
    config = from_mapping(SHAPE, ModelConfig, "model")
    assert (config.head_size, config.kv_heads, config.rotary_dim, config.attention_width) == (8, 4, 8, 32)
    config = small(head_dim=48, num_key_value_heads=2, partial_rotary_factor=0.25)
    assert (config.head_size, config.kv_heads, config.rotary_dim, config.attention_width) == (48, 2, 12, 192)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_attention_heads": 5}, ["hidden_size 32", "num_attention_heads 5", "head_dim"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
        ({"num_key_value_heads": 8}, ["num_attention_heads 4", "num_key_value_heads 8"]),
        ({"partial_rotary_factor": 0.4}, ["partial_rotary_factor 0.4", "3 dimensions", "even"]),
        ({"partial_rotary_factor": 0.1}, ["0 dimensions", "at least 2"]),
        ({"head_dim": 7}, ["7 dimensions", "even"]),
        ({"vocab_size": 0}, ["'vocab_size'", "0"]),
        ({"hidden_size": 32.0}, ["'hidden_size'"]),
        ({"residual_dropout": 1.0}, ["'residual_dropout'", "1.0"]),
        ({"attention_dropout": -0.1}, ["'attention_dropout'"]),
        ({"norm_eps": 0.0}, ["'norm_eps'"]),
        ({"norm": "batchnorm"}, ["'norm'", "batchnorm", "rmsnorm"]),
        ({"mlp": "relu"}, ["'mlp'", "swiglu"]),
        ({"rope_theta": float("inf")}, ["'rope_theta'"]),
        ({"hiden_size": 3}, ["'hiden_size'", "'hidden_size'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["'rope_scaling'", "original_max_position_embeddings"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["'rope_scaling.factor'"]),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, ["'rope_scaling.type'", "linear"]),
    ],
)
def test_refusals_name_key_and_numbers(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        from_mapping({**SHAPE, **changes}, ModelConfig, "model")
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("config", [ModelConfig, RopeScaling])
def test_every_key_has_a_description(config: type[Config]) -> None:
    """`megazh recipe show` prints it."""
    for name, field in config.model_fields.items():
        assert field.description, name
        assert field.description[0].isupper(), name
        assert field.description.endswith("."), name
