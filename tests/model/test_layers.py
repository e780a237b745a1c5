"""Initial weights: determined by seed and layer number alone, with the configured standard deviation."""

import hashlib
import math
from typing import Any

import pytest
import torch
from decoders import small
from torch import nn

from megazh.model.decoder import Decoder
from megazh.model.layers import layer_count, load_unpadded, make_layer

OPTIONS: list[dict[str, Any]] = [
    {"tie_word_embeddings": False},
    {"norm": "layernorm", "mlp": "gelu", "qkv_bias": True, "tie_word_embeddings": False},
]


def weights(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in layer.named_parameters()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("changes", OPTIONS)
def test_weights_follow_from_seed_and_number_alone(changes: dict[str, Any]) -> None:
    config = small(**changes)
    numbers = range(layer_count(config))
    first = [weights(make_layer(config, number, 7)) for number in numbers]
    torch.manual_seed(99)
    torch.randn(5)
    again = {number: weights(make_layer(config, number, 7)) for number in reversed(numbers)}
    assert all(equal(first[number], again[number]) for number in numbers)
    model = Decoder(config, 7)
    for number, layer in enumerate([model.embedding, *model.blocks, model.norm, model.head]):
        assert equal(first[number], weights(layer))


@pytest.mark.parametrize("changes", OPTIONS)
def test_another_seed_or_number_gives_other_weights(changes: dict[str, Any]) -> None:
    config = small(**changes)
    first = weights(make_layer(config, 1, 7))
    for other in (weights(make_layer(config, 2, 7)), weights(make_layer(config, 1, 8))):
        matrices = [name for name in first if first[name].dim() == 2]
        assert len(matrices) == 4
        assert not any((first[name] == other[name]).any() for name in matrices)
    embedding, head = (weights(make_layer(config, number, 7))["weight"][:97] for number in (0, layer_count(config) - 1))
    assert embedding.shape == head.shape
    assert not (embedding == head).any()


@pytest.mark.parametrize("changes", OPTIONS)
def test_the_random_numbers_of_the_process_are_left_alone(changes: dict[str, Any]) -> None:
    config = small(**changes)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Decoder(config, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_spread_of_initial_weights(mlp: str, scaled: bool) -> None:
    config = small(
        vocab_size=500,
        hidden_size=128,
        intermediate_size=300,
        num_hidden_layers=8,
        initializer_range=0.03,
        scale_residual_init=scaled,
        mlp=mlp,
        tie_word_embeddings=False,
        num_key_value_heads=2,
    )
    for number in (0, 1, 8, layer_count(config) - 1):
        for name, weight in weights(make_layer(config, number, 1)).items():
            if weight.dim() != 2:
                continue
            weight = weight[: getattr(weight, "rows", len(weight))]
            adds = name in ("attention.o_proj.weight", "mlp.down_proj.weight")
            expected = 0.03 / math.sqrt(2 * 8) if adds and scaled else 0.03
            assert weight.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel()), name
            assert weight.abs().max() > 3 * expected, "normal, not uniform"


def test_biases_are_zero_and_norms_one() -> None:
    config = small(norm="layernorm", qkv_bias=True)
    for number in (1, 2, 3):
        for name, weight in weights(make_layer(config, number, 1)).items():
            if weight.dim() == 1:
                assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)), name
    assert torch.equal(weights(make_layer(small(), 3, 1))["weight"], torch.ones(32))


def test_layers_are_fp32_on_the_cpu_and_without_a_seed_take_no_memory() -> None:
    for number in range(layer_count(small())):
        for weight in weights(make_layer(small(), number, 1)).values():
            assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
        assert all(weight.is_meta for weight in weights(make_layer(small(), number, None)).values())


def test_rows_that_pad_are_zero_and_change_no_other() -> None:
    config, full = small(vocab_size=1003, tie_word_embeddings=False), small(vocab_size=1024, tie_word_embeddings=False)
    assert (config.padded_vocab_size, full.padded_vocab_size) == (1024, 1024)
    for number in (0, layer_count(config) - 1):
        weight: Any = make_layer(config, number, 7).get_parameter("weight")
        assert (weight.rows, weight.shape) == (1003, (1024, 32))
        assert (weight[1003:] == 0).all()
        digest = hashlib.sha256(f"megazh layer {number} of seed 7".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        assert torch.equal(weight[:1003], torch.empty(1003, 32).normal_(0.0, 0.2, generator=generator))
    assert not hasattr(make_layer(config, 1, 7).get_parameter("mlp.up_proj.weight"), "rows")


@pytest.mark.parametrize("number", [0, 1, 4])
def test_weights_read_without_padding(number: int) -> None:
    config = small(tie_word_embeddings=False)
    saved = make_layer(config, number, 7)
    files = {name: each.detach()[: getattr(each, "rows", None)].bfloat16() for name, each in saved.named_parameters()}
    layer = make_layer(config, number, None)
    load_unpadded(layer, files)
    for name, expected in saved.named_parameters():
        found = layer.get_parameter(name)
        assert torch.equal(found, expected.bfloat16())
        assert getattr(found, "rows", None) == getattr(expected, "rows", None)


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_read_without_padding(tied: bool) -> None:
    config = small(tie_word_embeddings=tied)
    saved, model = Decoder(config, 7), Decoder(config, None)
    load_unpadded(model, {name: each[:97] if len(each) == 128 else each for name, each in saved.state_dict().items()})
    assert equal(weights(model), weights(saved))
    assert (model.head.weight is model.embedding.weight) == tied
    assert model.head.weight.rows == model.embedding.weight.rows == 97


def test_weights_of_another_shape_or_name_are_refused() -> None:
    layer = make_layer(small(), 0, None)
    with pytest.raises(RuntimeError, match=r"weight is \(128, 32\), expected \(97, 32\)"):
        load_unpadded(layer, {"weight": torch.zeros(128, 32)})
    with pytest.raises(RuntimeError, match="Missing key"):
        load_unpadded(layer, {"weights": torch.zeros(97, 32)})
