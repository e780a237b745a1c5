"""Muon: the steps of torch's own, bit for bit, for each setting."""

import pytest
import torch

from megazh.pipeline.update_rule import Shard
from megazh.training.optimizers.muon import Muon, orthogonalized

SHAPES = [(48, 32), (32, 48), (32, 32)]


@pytest.mark.parametrize("match_adamw", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_ten_steps_are_those_of_torch(nesterov: bool, match_adamw: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in SHAPES]
    begins = [0, 48 * 32, 2 * 48 * 32 + 256]  # with a gap before the last
    size = 2 * 48 * 32 + 256 + 32 * 32
    rule = Muon(0.9, nesterov, 5, match_adamw)
    own = Shard(torch.zeros(size), torch.zeros(size), rule.make_state(size, torch.device("cpu")), 0.1, [])
    own.matrices = list(zip(begins, SHAPES, strict=True))
    views = [slice(begin, begin + rows * columns) for begin, (rows, columns) in own.matrices]
    for view, start in zip(views, starts, strict=True):
        own.weights[view] = start.flatten()
    theirs = [torch.nn.Parameter(start.clone()) for start in starts]
    adjust = "match_rms_adamw" if match_adamw else "original"
    optimizer = torch.optim.Muon(theirs, 1e-3, 0.1, 0.9, nesterov, adjust_lr_fn=adjust)
    for number in range(1, 11):
        for view, other in zip(views, theirs, strict=True):
            other.grad = torch.randn(other.shape, generator=generator)
            own.gradient[view] = other.grad.flatten()
        rule.update(own, 1e-3, number)
        optimizer.step()
        for view, other in zip(views, theirs, strict=True):
            assert torch.equal(own.weights[view].view_as(other), other.detach())


def test_singular_values_come_near_one() -> None:
    matrix = torch.randn(64, 40, generator=torch.Generator().manual_seed(1)) * 1e-3
    values = torch.linalg.svdvals(orthogonalized(matrix, 5).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_gradient_of_zeros_moves_nothing() -> None:
    rule = Muon(0.95, True, 5, True)
    own = Shard(torch.ones(64), torch.zeros(64), rule.make_state(64, torch.device("cpu")), 0.0, [(0, (8, 8))])
    rule.update(own, 1e-3, 1)
    assert torch.equal(own.weights, torch.ones(64))
