"""Gradient of an embedding, added to an fp32 buffer."""

import pytest
import torch


@pytest.mark.parametrize("width", [70, 256, 300])
def test_adds_the_rows_of_equal_tokens(width: int) -> None:
    from megazh.kernels.embedding import add_embedding_gradient_

    generator = torch.Generator().manual_seed(8)
    sums = torch.randn(50, width, generator=generator)
    tokens = torch.randint(0, 50, (300,), generator=generator).int()
    tokens[:40] = 7
    tokens[tokens == 9] = 8
    gradients = torch.randn(300, width, generator=generator)
    before = sums.clone()
    add_embedding_gradient_(sums, tokens, gradients)
    wanted = before.index_add(0, tokens.long(), gradients)
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(sums[9], before[9])
