"""Rotation in place, its inverse, and the sum that the inverse takes."""

import pytest
import torch

from megazh.model.rope import rotate


@pytest.mark.parametrize(("head_dim", "rotary", "heads", "others"), [(16, 16, 4, 1), (24, 12, 4, 2), (10, 4, 3, 3)])
def test_there_and_back(head_dim: int, rotary: int, heads: int, others: int) -> None:
    from megazh.kernels.rotary import rotate_, rotate_back_

    generator = torch.Generator().manual_seed(5)
    states = torch.randn(9, (heads + others) * head_dim, generator=generator)
    angles = torch.randn(9, rotary // 2, generator=generator)
    cos, sin = angles.cos(), angles.sin()

    def wanted(sine: torch.Tensor) -> torch.Tensor:
        split = states.view(1, 9, -1, head_dim)
        turned = rotate(split[:, :, :heads], cos[None, :, None], sine[None, :, None])
        return torch.cat((turned, split[:, :, heads:]), 2).view(9, -1)

    there = states.clone()
    rotate_(there, cos, sin, heads, head_dim)
    torch.testing.assert_close(there, wanted(sin))
    for with_sum in (False, True):
        back = states.clone()
        summed = rotate_back_(back, cos, sin, heads, head_dim, with_sum)
        torch.testing.assert_close(back, wanted(-sin))
        if with_sum:
            torch.testing.assert_close(summed, back.sum(0), rtol=1e-5, atol=1e-5)
        else:
            assert summed is None
