"""Parameters and FLOPs by formula, against known numbers for the recipes and against counting for small models."""

import pytest
import torch
from decoders import SHAPES, small
from torch.utils.flop_counter import FlopCounterMode

from megazh.model.config import ModelConfig
from megazh.model.counts import flops_per_token, parameter_counts, trained_counts
from megazh.model.decoder import Decoder
from megazh.model.layers import layer_count, make_layer
from megazh.model.lora_config import LoraConfig, Target
from megazh.training.recipe import load_recipe
from megazh.training.recipe_files import recipe_path

RECIPES = {
    "qwen0.5b_6x3090": 463_987_712,
    "qwen0.5b_6x3090_dp": 463_987_712,
    "microstories_44m": 43_915_776,
    "llama_40x512": 415_532_544,
    "llama_28x704": 442_457_664,
    "llama_16x1024": 445_598_720,
    "minillm_1.4b": 1_431_996_416,
}


def counted(config: ModelConfig) -> int:
    """Count the parameters of all layers, built on the meta device."""
    last = layer_count(config) - 1
    numbers = range(last if config.tie_word_embeddings else last + 1)
    layers = [make_layer(config, number, None) for number in numbers]
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())
    return sum(numbers_of(layer) for layer in layers)


def numbers_of(layer: torch.nn.Module) -> int:
    """Count a layer's parameters, without rows that only pad a matrix."""
    return sum(getattr(each, "rows", len(each)) * each[0].numel() for each in layer.parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_of_the_recipes(name: str) -> None:
    config = load_recipe(recipe_path(name)).model
    assert parameter_counts(config).total == RECIPES[name]
    assert counted(config) == RECIPES[name]


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_each_kind_of_layer(name: str) -> None:
    config = small(**SHAPES[name])
    model = Decoder(config)
    counts = parameter_counts(config)
    assert counts.total == numbers_of(model)
    assert counts.embedding == numbers_of(model.embedding) == 97 * 32
    assert {counts.block} == {numbers_of(block) for block in model.blocks}
    assert counts.norm == numbers_of(model.norm)
    assert counts.head == (0 if config.tie_word_embeddings else numbers_of(model.head))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["plain", "head_dim 48", "neox"])
def test_parameters_that_lora_trains(name: str, whole: bool) -> None:
    config, lora = small(**SHAPES[name]), LoraConfig(rank=3, train_embed_norm=whole)
    model, counts = Decoder(config, lora=lora), trained_counts(config, lora)
    trained = [each for each in model.parameters() if each.requires_grad]
    assert counts.total == sum(getattr(each, "rows", len(each)) * each[0].numel() for each in trained)
    assert trained_counts(config) == parameter_counts(config)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=3), LoraConfig(rank=2, targets=[Target.DOWN])])
@pytest.mark.parametrize("name", ["plain", "grouped", "head_dim 48", "neox"])
def test_operations_are_those_that_torch_counts(name: str, lora: LoraConfig | None) -> None:
    """Torch counts all pairs of tokens, of which causal attention needs half."""
    config = small(**SHAPES[name], vocab_size=128)
    seq_len = 24
    model = Decoder(config, lora=lora)
    tokens = torch.zeros(1, seq_len, dtype=torch.int32)

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        groups = query.shape[2] // key.shape[2]
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(groups, 2))
        return torch.einsum("bhqk,bkhd->bqhd", scores, value.repeat_interleave(groups, 2))

    attend.cos, attend.sin = torch.ones(1, seq_len, 1, 2), torch.zeros(1, seq_len, 1, 2)  # type: ignore[attr-defined]
    attend.dropout = None  # type: ignore[attr-defined]
    hidden = model.embedding(tokens).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        states = hidden
        for block in model.blocks:
            states = block(states, attend)
        model.logits(model.norm(states)).sum().backward()
    all_pairs = 12 * config.attention_width * seq_len * seq_len * config.num_hidden_layers
    assert flops_per_token(config, seq_len, lora=lora).total * seq_len == counter.get_total_flops() - all_pairs / 2


def test_operations_of_the_0_5b_model() -> None:
    flops = flops_per_token(load_recipe(recipe_path("qwen0.5b_6x3090")).model, 1024)
    block = 6 * (4 * 1024 * 1024 + 3 * 1024 * 2816) + 6 * 1024 * 1024
    assert (flops.embedding, flops.block, flops.head) == (0, block, 6 * 151_936 * 1024)
    assert flops.total == 24 * block + flops.head
