"""SwiGLU and its gradient, over one block of columns and over several."""

import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize("width", [24, 1024, 1100])
def test_value_and_gradient(width: int) -> None:
    from megazh.kernels.swiglu import swiglu, swiglu_backward_

    generator = torch.Generator().manual_seed(6)
    gate_up = torch.randn(5, 2 * width, generator=generator, requires_grad=True)
    gradient = torch.randn(5, width, generator=generator)
    gate, up = gate_up.chunk(2, -1)
    wanted = F.silu(gate) * up
    (grad,) = torch.autograd.grad(wanted, gate_up, gradient)
    states = gate_up.detach().clone()
    torch.testing.assert_close(swiglu(states), wanted.detach())
    found = swiglu_backward_(states, gradient)
    assert found is states, "written over its input"
    torch.testing.assert_close(found, grad, rtol=1e-5, atol=2e-6)
