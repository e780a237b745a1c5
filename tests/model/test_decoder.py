"""The whole decoder against a slow one in float64, in all its shapes; recomputation, dropout, dtypes."""

from typing import Any

import numpy as np
import pytest
import torch
from decoders import SHAPES, alone, decoder, logits, packed, reference_logits, small
from torch.nn import functional as F

from megazh.model.decoder import Decoder
from megazh.model.layers import Block

ROWS = [[5, 7, 4], [16], [9]]
"""Lengths of documents in rows of 16 tokens; the last row ends with 7 tokens of padding."""


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_a_slow_decoder_in_float64(name: str) -> None:
    model = decoder(small(**SHAPES[name]))
    tokens, _, positions, cu_seqlens = packed(ROWS, 16)
    with torch.no_grad():
        found = logits(model, tokens, positions, cu_seqlens)
    expected = reference_logits(model, tokens, positions, ROWS)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_running_positions_reach_the_rotation() -> None:
    """A document continued from another sample: its positions do not start at 0, and the logits depend on them."""
    model = decoder(small())
    tokens, _, positions, cu_seqlens = packed([[8, 8]], 16)
    positions[0, 8:] = torch.arange(100, 108)
    positions[0, 9:] += 3  # a gap changes distances
    with torch.no_grad():
        found = logits(model, tokens, positions, cu_seqlens)
    np.testing.assert_allclose(found, reference_logits(model, tokens, positions, [[8, 8]]), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("name", ["plain", "head_dim 48"])
def test_loss_is_cross_entropy_of_the_logits_summed(name: str, z_loss: float) -> None:
    model = decoder(small(**SHAPES[name]))
    tokens, labels, positions, cu_seqlens = packed(ROWS, 16)
    model.loss(tokens, labels, positions, cu_seqlens, z_loss).backward()
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    every = logits(model, tokens, positions, cu_seqlens).flatten(0, 1)
    wanted = labels.flatten().long()
    expected = F.cross_entropy(every, wanted, reduction="sum")
    expected = expected + z_loss * every.logsumexp(1)[wanted >= 0].square().sum()
    assert model.loss(tokens, labels, positions, cu_seqlens, z_loss).item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_is_padded_trains_as_one_that_is_not(tied: bool) -> None:
    """Losses and gradients are those of plain torch on matrices of 1,003 rows."""
    model = decoder(small(vocab_size=1003, tie_word_embeddings=tied))
    tokens, labels, positions, cu_seqlens = packed(ROWS, 16, vocab=1003)
    loss = model.loss(tokens, labels, positions, cu_seqlens, 0.01)
    loss.backward()
    found = {name: each.grad for name, each in model.named_parameters()}
    matrix = model.embedding.weight.detach()[:1003].clone().requires_grad_()
    head = matrix if tied else model.head.weight.detach()[:1003].clone().requires_grad_()
    attend, states = model.attention(positions, cu_seqlens), F.embedding(tokens, matrix)
    model.zero_grad()
    for block in model.blocks:
        states = block(states, attend)
    every, wanted = (model.norm(states) @ head.T).flatten(0, 1), labels.flatten().long()
    expected = F.cross_entropy(every, wanted, reduction="sum")
    expected = expected + 0.01 * every.logsumexp(1)[wanted >= 0].square().sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, weight in (("embedding.weight", matrix), ("head.weight", head)):
        if name in found:
            torch.testing.assert_close(found[name][:1003], weight.grad, rtol=1e-5, atol=2e-6)
            assert (found[name][1003:] == 0).all()
    for name, parameter in model.blocks.named_parameters():
        torch.testing.assert_close(found[f"blocks.{name}"], parameter.grad, rtol=1e-5, atol=2e-5)
    with torch.no_grad():
        assert logits(model, tokens, positions, cu_seqlens).shape == (3, 16, 1003)


@pytest.mark.parametrize("changes", [{}, {"residual_dropout": 0.2, "attention_dropout": 0.1}], ids=["plain", "dropout"])
def test_activation_checkpointing_changes_nothing_but_the_work(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = []
    plain = Block.forward

    def counted(self: Block, *arguments: Any) -> torch.Tensor:
        forwards.append(self)
        return plain(self, *arguments)

    monkeypatch.setattr(Block, "forward", counted)
    batch = packed(ROWS, 16)
    results = []
    for checkpointing in (False, True):
        model = decoder(small(**changes), activation_checkpointing=checkpointing)
        forwards.clear()
        loss = model.loss(*batch, sample_numbers=torch.arange(3))
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()], len(forwards)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(left, right) for left, right in zip(results[0][1], results[1][1], strict=True))
    assert [result[2] for result in results] == [2, 4]


def test_dropout_is_for_training_alone() -> None:
    tokens, _, positions, cu_seqlens = packed(ROWS, 16)
    for changes in ({"residual_dropout": 0.3}, {"attention_dropout": 0.3}):
        model = decoder(small(**changes))
        plain = decoder(small())
        with torch.no_grad():
            dropped = model.logits(model(tokens, model.attention(positions, cu_seqlens, torch.arange(3))))
        assert not torch.equal(dropped, logits(plain, tokens, positions, cu_seqlens))
        model.eval()
        assert torch.equal(logits(model, tokens, positions, cu_seqlens), logits(plain, tokens, positions, cu_seqlens))


def test_residual_dropout_is_on_the_embedding_and_on_what_blocks_add() -> None:
    model = decoder(small(residual_dropout=0.5))
    tokens, _, positions, cu_seqlens = packed([[1000]], 1000)
    attend = model.attention(positions, cu_seqlens, torch.tensor([4]))
    dropped = model.embedding(tokens, attend.dropout)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * F.embedding(tokens, model.embedding.weight)[kept])
    block = model.blocks[0]
    hidden = torch.zeros(1, 1000, 32)
    with torch.no_grad():
        block.mlp.down_proj.weight.zero_()
        block.attention.qkv_proj.weight.fill_(0.1)
        added = block(hidden + 1, attend) - 1
    assert (added == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_bf16_stays_near_fp32_and_gives_fp32_logits() -> None:
    model = decoder(small())
    tokens, labels, positions, cu_seqlens = packed(ROWS, 16)
    exact = logits(model, tokens, positions, cu_seqlens)
    loss = model.loss(tokens, labels, positions, cu_seqlens).item()
    model.bfloat16()
    rough = logits(model, tokens, positions, cu_seqlens)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.02 * exact.abs().mean()
    assert model.loss(tokens, labels, positions, cu_seqlens).item() == pytest.approx(loss, rel=0.02)


def test_positions_do_not_lose_precision_in_bf16() -> None:
    """Angles at positions 4000 and 4001 must differ, although both numbers are equal in bf16."""
    model = decoder(small()).bfloat16()
    _, _, positions, cu_seqlens = packed([[2]], 2)
    attend = model.attention(positions + 4000, cu_seqlens)
    expected = torch.tensor([4000.0, 4001.0], dtype=torch.float64).cos()
    assert attend.cos.dtype == torch.float32
    torch.testing.assert_close(attend.cos[0, :, 0, 0].double(), expected, rtol=0, atol=1e-6)


def test_tied_matrix_is_one_parameter_with_both_gradients() -> None:
    tied, untied = Decoder(small(), 1), Decoder(small(tie_word_embeddings=False), 1)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    untied.load_state_dict({**tied.state_dict(), "head.weight": tied.embedding.weight.detach()})
    batch = packed(ROWS, 16)
    tied.loss(*batch).backward()
    untied.loss(*batch).backward()
    assert tied.embedding.weight.grad is not None
    assert untied.embedding.weight.grad is not None
    assert untied.head.weight.grad is not None
    both = untied.embedding.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both, rtol=1e-5, atol=1e-5)


def test_a_document_alone_may_have_any_length() -> None:
    model = decoder(small())
    with torch.no_grad():
        for length in (1, 2, 33):
            tokens = torch.arange(length)[None] % 97
            assert torch.isfinite(logits(model, tokens, *alone(length))).all()
