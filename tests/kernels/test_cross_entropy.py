"""Cross entropy of rows of logits, and gradients written over the logits."""

import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize("vocab", [50, 9000])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_losses_and_gradient(vocab: int, z_loss: float) -> None:
    from megazh.kernels.cross_entropy import cross_entropy_

    generator = torch.Generator().manual_seed(7)
    logits = (3 * torch.randn(11, vocab, generator=generator)).requires_grad_()
    labels = torch.randint(0, vocab, (11,), generator=generator).int()
    labels[3], labels[4], labels[5] = -100, 0, vocab - 1
    losses = F.cross_entropy(logits, labels.long(), ignore_index=-100, reduction="none")
    losses = losses + torch.where(labels >= 0, z_loss * logits.logsumexp(1).square(), 0.0)
    (gradient,) = torch.autograd.grad(losses.sum() * 0.5, logits)
    own = logits.detach().clone()
    found = cross_entropy_(own, labels, z_loss, None)
    torch.testing.assert_close(found, losses.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(own, logits), "without a scale the logits do not change"
    assert torch.equal(cross_entropy_(own, labels, z_loss, torch.tensor(0.5)), found)
    torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-6)
    assert (own[3] == 0).all()
