"""Costs of the parts of a model by operations."""

import pytest
from decoders import small

from megazh.model.counts import flops_per_token
from megazh.pipeline.costs import LayerCosts, costs_by_flops


def test_costs_are_those_of_a_micro_batch() -> None:
    config = small()
    costs = costs_by_flops(config, 64, 3, checkpointing=False)
    flops = flops_per_token(config, 64)
    assert costs.unit == "FLOPs"
    assert (costs.embedding, costs.block, costs.head) == (0, flops.block * 192, flops.head * 192)
    assert sum(costs.units(config.num_hidden_layers)) == pytest.approx(flops.total * 192)


def test_checkpointing_runs_blocks_forward_twice() -> None:
    """Two parts forward, four backward, and two once more: 8 / 6; embedding and head are not computed again."""
    once = costs_by_flops(small(), 64, 3, checkpointing=False)
    twice = costs_by_flops(small(), 64, 3, checkpointing=True)
    assert twice.block == pytest.approx(once.block * 8 / 6)
    assert (twice.embedding, twice.head) == (once.embedding, once.head)


def test_units_are_embedding_blocks_head() -> None:
    assert LayerCosts(unit="seconds", embedding=1.0, block=2.0, head=3.0).units(3) == [1.0, 2.0, 2.0, 2.0, 3.0]
