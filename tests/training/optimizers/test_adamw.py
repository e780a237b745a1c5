"""AdamW: the steps of torch's own, bit for bit, and those of the paper's formula."""

import pytest
import torch

from megazh.pipeline.update_rule import Shard
from megazh.training.optimizers.adamw import AdamW


def shard(rule: AdamW, weights: torch.Tensor, decay: float) -> Shard:
    return Shard(weights.clone(), torch.zeros_like(weights), rule.make_state(len(weights), torch.device("cpu")), decay)


def test_ten_steps_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1000, generator=generator)
    rule = AdamW((0.9, 0.95), 1e-8)
    own, other = shard(rule, weights, 0.1), torch.nn.Parameter(weights.clone())
    theirs = torch.optim.AdamW([other], 1e-3, (0.9, 0.95), 1e-8, 0.1, fused=True)
    for number in range(1, 11):
        gradient = torch.randn(1000, generator=generator)
        own.gradient.copy_(gradient)
        rule.update(own, 1e-3, number)
        other.grad = gradient
        theirs.step()
        assert torch.equal(own.weights, other.detach())


def test_two_steps_are_those_of_the_paper() -> None:
    rule = AdamW((0.8, 0.9), 1e-3)
    for decay in (0.5, 0.0):
        own, expected, first, second = shard(rule, torch.full((1,), 2.0), decay), 2.0, 0.0, 0.0
        for number, gradient in enumerate((0.3, -0.7), start=1):
            own.gradient.fill_(gradient)
            rule.update(own, 0.01, number)
            first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
            change = first / (1 - 0.8**number) / ((second / (1 - 0.9**number)) ** 0.5 + 1e-3)
            expected -= 0.01 * (change + decay * expected)
        assert own.weights.item() == pytest.approx(expected, rel=1e-6)
