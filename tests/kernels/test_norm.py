"""RMS norm, alone and of the sum of two tensors, against torch's."""

import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("shape", [(37, 48), (3, 1024)])
def test_value_and_gradients(shape: tuple[int, int], adds: bool) -> None:
    from megazh.kernels.norm import add_norm, norm_backward

    generator = torch.Generator().manual_seed(3)
    residual, delta, grad_normed, grad_total = (torch.randn(shape, generator=generator) for _ in range(4))
    weight = torch.randn(shape[1], generator=generator, requires_grad=True)
    total = (residual + delta if adds else residual).requires_grad_()
    normed = F.rms_norm(total, shape[1:], weight, 1e-6)
    outputs = (normed * grad_normed).sum() + ((total * grad_total).sum() if adds else 0)
    wanted = torch.autograd.grad(outputs, (total, weight))

    found_total, found_normed, rstd = add_norm(residual, delta if adds else None, weight.detach(), 1e-6)
    torch.testing.assert_close(found_total, total.detach())
    torch.testing.assert_close(found_normed, normed.detach())
    found = norm_backward(grad_normed, found_total, rstd, weight.detach(), grad_total if adds else None)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=5e-6)
    frozen = norm_backward(grad_normed, found_total, rstd, weight.detach(), grad_total if adds else None, False)
    assert frozen[1] is None
    assert torch.equal(frozen[0], found[0])


def test_in_bf16_what_is_normed_is_what_is_stored() -> None:
    from megazh.kernels.norm import add_norm

    generator = torch.Generator().manual_seed(4)
    residual, delta = (torch.randn(5, 64, generator=generator).bfloat16() for _ in range(2))
    total, normed, _ = add_norm(residual, delta, torch.ones(64, dtype=torch.bfloat16), 1e-6)
    # Triton's interpreter truncates to bf16, where a GPU rounds.
    torch.testing.assert_close(total.float(), residual.float() + delta.float(), rtol=2**-7, atol=0)
    torch.testing.assert_close(normed.float(), F.rms_norm(total.float(), (64,), None, 1e-6), rtol=2**-7, atol=0)
