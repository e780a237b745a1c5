"""Costs of a model's parts in FLOPs."""

import pytest
from decoders import small

from megazh.model.backend import Backend
from megazh.model.counts import block_matrix, flops_per_token
from megazh.model.lora_config import LoraConfig, pair_parameters
from megazh.pipeline.costs import LayerCosts, costs_by_flops
from megazh.pipeline.precision import Dtype, Precision
from megazh.pipeline.work import Work

FP32 = Precision(Dtype.FP32, Dtype.FP32, Dtype.FP32)


def costs_of(checkpointing: bool) -> LayerCosts:
    """Costs of the small model, three samples of 64 tokens."""
    return costs_by_flops(Work(small(), 1, 1, 64, 3, 1, FP32, checkpointing, Backend.MASKED))


def test_costs_are_those_of_a_micro_batch() -> None:
    config = small()
    costs = costs_of(checkpointing=False)
    flops = flops_per_token(config, 64)
    assert costs.unit == "FLOPs"
    assert (costs.embedding, costs.block, costs.head) == (0, flops.block * 192, flops.head * 192)
    assert sum(costs.parts(config.num_hidden_layers)) == pytest.approx(flops.total * 192)


def test_checkpointing_runs_blocks_forward_twice() -> None:
    """A block costs 2/6 forward, 4/6 backward, and 2/6 if recomputed; embedding and head are not recomputed."""
    once = costs_of(checkpointing=False)
    twice = costs_of(checkpointing=True)
    assert twice.block == pytest.approx(once.block * 8 / 6)
    assert (twice.embedding, twice.head) == (once.embedding, once.head)


def test_frozen_matrices_have_no_weight_pass() -> None:
    config = small()
    found, wholes = [], {}
    for lora in (None, LoraConfig(rank=2), LoraConfig(rank=2, train_embed_norm=True)):
        work = Work(config, 1, 1, 64, 3, 1, FP32, False, Backend.MASKED, lora=lora)
        costs = costs_by_flops(work)
        found.append(costs.passes(0, 4, 2, split=True))
        assert sum(found[-1]) == pytest.approx(sum(costs.parts(2)))
        wholes[lora is None] = costs
    pairs = 6 * pair_parameters(config, LoraConfig(rank=2))
    assert wholes[True].block - wholes[False].block == 192 * (2 * block_matrix(config) - pairs)
    assert found[1][2] == pytest.approx(192 * 2 * pairs / 3)
    assert found[2][2] == pytest.approx(found[1][2] + wholes[True].head / 3), "the head is tied to the embedding"


def test_parts_are_embedding_blocks_head() -> None:
    assert LayerCosts(unit="seconds", embedding=1.0, block=2.0, head=3.0).parts(3) == [1.0, 2.0, 2.0, 2.0, 3.0]
