"""`config.json`: what is written is read back as the same model, and what cannot be computed is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from decoders import small

from megazh.errors import DataError
from megazh.exchange.families import Family, choose_family
from megazh.exchange.hf_config import hf_config, model_config, read_hf_config, trained_length

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

QWEN15 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 2816,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""The config.json of Qwen1.5-0.5B."""


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, None),
        ({"tie_word_embeddings": False, "num_key_value_heads": 2, "rope_theta": 1e6, "norm_eps": 1e-5}, None),
        ({"head_dim": 12, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"qkv_bias": True, "rope_scaling": {**YARN, "beta_fast": 16.0, "attention_factor": 1.5}}, None),
        ({"num_attention_heads": 3, "head_dim": 12}, None),
        ({}, Family.MISTRAL),
    ],
)
def test_what_is_written_is_read_back(changes: dict[str, Any], wanted: Family | None) -> None:
    written = small(**{"num_key_value_heads": small(**changes).kv_heads, **changes})
    values = json.loads(json.dumps(hf_config(written, choose_family(written, wanted), 256, "bfloat16", 0, None)))
    assert model_config(values, "config.json") == written
    assert trained_length(values, "config.json") == 256


def test_the_form_is_that_of_transformers_4() -> None:
    values = hf_config(small(rope_theta=5e5), Family.LLAMA, 512, "bfloat16", eos_id=7, pad_id=8)
    assert (values["rope_theta"], values["rope_scaling"], values["torch_dtype"]) == (5e5, None, "bfloat16")
    assert (values["max_position_embeddings"], values["bos_token_id"], values["eos_token_id"]) == (512, None, 7)
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert "rope_parameters" not in values
    qwen2 = hf_config(small(qkv_bias=True, rope_scaling=YARN), Family.QWEN2, 256, "float32", 7, 8)
    assert (qwen2["use_sliding_window"], qwen2["sliding_window"], "head_dim" in qwen2) == (False, None, False)
    assert (qwen2["max_position_embeddings"], qwen2["rope_scaling"]["original_max_position_embeddings"]) == (64, 64)


def test_the_config_of_qwen_1_5() -> None:
    found = model_config(QWEN15, "config.json")
    assert (found.qkv_bias, found.tie_word_embeddings, found.rope_theta, found.kv_heads) == (True, True, 1e6, 16)
    assert (found.vocab_size, found.hidden_size, found.head_size, found.rope_scaling) == (151936, 1024, 64, None)
    assert trained_length(QWEN15, "config.json") == 32768


def test_the_form_of_transformers_5() -> None:
    new = {key: value for key, value in QWEN15.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"dtype": "bfloat16", "layer_types": ["full_attention"] * 24, "sliding_window": None, "pad_token_id": None}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert model_config(new, "config.json") == model_config(QWEN15, "config.json")
    new |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    found = model_config(new, "config.json")
    assert found.rope_scaling is not None
    assert (found.rope_theta, found.rope_scaling.type, found.rope_scaling.factor) == (1e4, "linear", 2.0)
    assert model_config({**new, "rope_scaling": {"type": "linear", "factor": 2.0}}, "config.json") == found


LLAMA = hf_config(small(), Family.LLAMA, 256, "bfloat16", 0, None)
MISTRAL = hf_config(small(), Family.MISTRAL, 256, "bfloat16", 0, None)
TYPE = "rope_type"


@pytest.mark.parametrize(
    ("base", "change", "problem"),
    [
        (LLAMA, {"model_type": "gpt2"}, "model_type is 'gpt2': only llama, qwen2, mistral"),
        (LLAMA, {"model_type": None}, "model_type is None"),
        (LLAMA, {"attention_bias": True, "mlp_bias": True}, "attention_bias=True cannot be .*; mlp_bias=True"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu' cannot be computed"),
        (LLAMA, {"hidden_size": None}, "has no hidden_size"),
        (LLAMA, {"hidden_size": "32"}, "key 'hidden_size': .*'32'"),
        (LLAMA, {"hidden_size": 0}, "key 'hidden_size'"),
        (LLAMA, {"rope_theta": float("nan")}, "key 'rope_theta'"),
        (LLAMA, {"logit_softcap": 30.0, "auto_map": {}}, "does not know, .*: logit_softcap, auto_map"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"rope_scaling": {TYPE: "llama3", "factor": 8.0}}, "rope_scaling.rope_type=llama3: only linear, yarn"),
        (LLAMA, {"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor without a rope_type"),
        (LLAMA, {"rope_scaling": [1]}, "expected an object or null"),
        (LLAMA, {"rope_scaling": {TYPE: "linear", "factor": 0.5}}, "key 'rope_scaling.factor'"),
        (LLAMA, {"rope_scaling": {TYPE: "linear", "factor": 2.0, "low": 1}}, "rope_scaling.low is not known"),
        (LLAMA, {"rope_parameters": {TYPE: "default", "rope_theta": 5.0}}, "contradict each other"),
        (
            LLAMA,
            {"rope_parameters": {TYPE: "default", "rope_theta": 1e4}, "rope_scaling": {TYPE: "linear", "factor": 2.0}},
            "rope_parameters and rope_scaling contradict each other",
        ),
        (LLAMA, {"rope_scaling": {**YARN, "mscale": 2.0}}, "rope_scaling.mscale=2.0 cannot be computed"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 2}, "layer_types: only full_attention"),
        (LLAMA, {"layer_types": [{}], "architectures": {}, "model_type": "llama"}, "layer_types: only full_attention"),
        (MISTRAL, {"sliding_window": 128}, "sliding_window=128 is shorter than max_position_embeddings=256"),
        (MISTRAL, {"num_key_value_heads": None}, "has no num_key_value_heads"),
        (MISTRAL, {"rope_scaling": {TYPE: "linear", "factor": 2.0}}, "4.46.3 ignores it for mistral"),
        (QWEN15, {"use_sliding_window": True}, "use_sliding_window=True cannot be computed"),
        (QWEN15, {"head_dim": 128}, "in qwen2 the heads fill hidden_size"),
    ],
)
def test_what_cannot_be_computed(base: dict[str, Any], change: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem) as refusal:
        model_config({**base, **change}, "config.json")
    assert str(refusal.value).startswith("config.json: ")
    assert "\n" not in str(refusal.value)


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert model_config({**MISTRAL, "sliding_window": 256}, "x") == model_config(MISTRAL, "x")
    without = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert model_config(without, "x") == model_config(MISTRAL, "x"), "transformers takes 4096"


@pytest.mark.parametrize(("content", "problem"), [(b"{", "not valid JSON"), (b"[]", "an object"), (None, "is missing")])
def test_files_that_are_no_config(tmp_path: Path, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read_hf_config(tmp_path)
