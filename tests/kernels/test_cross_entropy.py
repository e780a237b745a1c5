"""Cross entropy of rows of logits, and gradients written over the logits."""

import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize(("vocab", "stored"), [(50, 50), (9000, 9000), (50, 64), (8190, 8256), (8193, 16500)])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_losses_and_gradient(vocab: int, stored: int, z_loss: float) -> None:
    from megazh.kernels.cross_entropy import cross_entropy_

    generator = torch.Generator().manual_seed(7)
    logits = (3 * torch.randn(11, vocab, generator=generator)).requires_grad_()
    labels = torch.randint(0, vocab, (11,), generator=generator).int()
    labels[3], labels[4], labels[5] = -100, 0, vocab - 1
    losses = F.cross_entropy(logits, labels.long(), ignore_index=-100, reduction="none")
    losses = losses + torch.where(labels >= 0, z_loss * logits.logsumexp(1).square(), 0.0)
    (gradient,) = torch.autograd.grad(losses.sum() * 0.5, logits)
    own = F.pad(logits.detach(), (0, stored - vocab), value=50.0)  # larger than any that counts
    before = own.clone()
    found = cross_entropy_(own, labels, z_loss, None, vocab)
    torch.testing.assert_close(found, losses.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(own, before), "without a scale the logits do not change"
    assert torch.equal(cross_entropy_(own, labels, z_loss, torch.tensor(0.5), vocab), found)
    torch.testing.assert_close(own[:, :vocab], gradient, rtol=1e-5, atol=1e-6)
    assert (own[3] == 0).all()
    assert (own[:, vocab:] == 0).all(), "padding gets no gradient"
