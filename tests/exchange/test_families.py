"""Families: each model goes to one that computes the same, or every key in the way is named."""

from typing import Any

import pytest
from decoders import small

from megazh.errors import UsageError
from megazh.exchange.families import Family, choose_family, inexpressible

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, Family.LLAMA),
        ({"head_dim": 12, "num_key_value_heads": 2}, Family.LLAMA),
        ({"qkv_bias": True}, Family.QWEN2),
        ({"qkv_bias": True, "rope_scaling": YARN, "tie_word_embeddings": False}, Family.QWEN2),
        # transformers 5 refuses a Llama whose width the heads do not divide, whatever head_dim says.
        ({"num_attention_heads": 3, "head_dim": 12}, Family.MISTRAL),
        ({"residual_dropout": 0.1, "scale_residual_init": True}, Family.LLAMA),
    ],
)
def test_the_family_that_computes_the_same(changes: dict[str, Any], family: Family) -> None:
    assert choose_family(small(**changes)) is family
    assert inexpressible(small(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"norm": "layernorm", "mlp": "gelu"}, ["model.norm=layernorm", "model.mlp=gelu"]),
        ({"parallel_residual": True}, ["model.parallel_residual=true"]),
        ({"partial_rotary_factor": 0.5, "head_dim": 12}, ["model.partial_rotary_factor=0.5"]),
        ({"embedding_scale": 4.0}, ["model.embedding_scale=4"]),
        ({"qkv_bias": True, "head_dim": 12}, ["model.head_dim=12"]),
        (
            {"num_attention_heads": 3, "head_dim": 12, "rope_scaling": YARN},
            ["model.num_attention_heads=3", "model.rope_scaling=yarn"],
        ),
    ],
)
def test_every_key_in_the_way_is_named(changes: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(UsageError) as refusal:
        choose_family(small(**changes))
    named = inexpressible(small(**changes))
    assert [reason.split(" ")[0] for reason in named] == keys
    assert all(reason in str(refusal.value) for reason in named)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "wanted", "problem"),
    [
        ({"qkv_bias": True}, Family.LLAMA, "--family llama: .*model.qkv_bias=true .*o_proj"),
        ({}, Family.QWEN2, "--family qwen2: .*model.qkv_bias=false"),
        ({"rope_scaling": YARN}, Family.MISTRAL, "--family mistral: .*model.rope_scaling=yarn"),
    ],
)
def test_a_family_that_is_wanted_and_cannot(changes: dict[str, Any], wanted: Family, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        choose_family(small(**changes), wanted)


def test_a_family_that_is_wanted_and_can() -> None:
    assert choose_family(small(), Family.MISTRAL) is Family.MISTRAL
