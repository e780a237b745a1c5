"""No token attends to another document or to the future; packing does not change the logits."""

import numpy as np
import pytest
import torch
from decoders import SHAPES, alone, decoder, logits, packed, small

from megazh.model.attention import Documents, MaskedAttention, VarlenAttention
from megazh.model.backend import Backend
from megazh.model.dropout import Dropout

ROWS = [[6, 5, 5], [3, 1, 9], [16]]


@pytest.mark.parametrize("name", SHAPES)
def test_another_document_changes_no_bit(name: str) -> None:
    model = decoder(small(**SHAPES[name]))
    tokens, _, positions, cu_seqlens = packed(ROWS, 16)
    with torch.no_grad():
        before = logits(model, tokens, positions, cu_seqlens)
        for row, begin, end in ((0, 0, 6), (0, 6, 11), (0, 11, 16), (1, 3, 4), (1, 13, 16)):
            changed = tokens.clone()
            changed[row, begin:end] = (changed[row, begin:end] + 41) % 97
            after = logits(model, changed, positions, cu_seqlens)
            same = (before == after).all(-1)
            assert not same[row, begin:end].any(), "the document itself changes"
            same[row, begin:end] = True
            assert same.all()


@pytest.mark.parametrize("name", SHAPES)
def test_the_future_changes_no_bit_of_the_past(name: str) -> None:
    model = decoder(small(**SHAPES[name]))
    tokens, _, positions, cu_seqlens = packed([[16]], 16)
    with torch.no_grad():
        before = logits(model, tokens, positions, cu_seqlens)
        for at in range(16):
            changed = tokens.clone()
            changed[0, at] = (changed[0, at] + 1) % 97
            after = logits(model, changed, positions, cu_seqlens)
            assert torch.equal(before[0, :at], after[0, :at])
            assert not (before[0, at:] == after[0, at:]).all(-1).any(), "every later token attends to it"


@pytest.mark.parametrize("name", SHAPES)
def test_packed_is_as_alone(name: str) -> None:
    model = decoder(small(**SHAPES[name]))
    tokens, _, positions, cu_seqlens = packed(ROWS, 16)
    with torch.no_grad():
        together = logits(model, tokens, positions, cu_seqlens)
        for row, lengths in enumerate(ROWS):
            for begin, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
                part = slice(int(begin), int(begin) + length)
                torch.testing.assert_close(
                    together[row, part], logits(model, tokens[row, None, part], *alone(length))[0], rtol=1e-4, atol=1e-4
                )


def test_gradient_reaches_only_what_is_seen() -> None:
    config = small()
    _, _, positions, cu_seqlens = packed([[6, 5]], 16)
    attend = Documents(config, Backend.MASKED)(positions, cu_seqlens)
    query, key, value = (torch.randn(1, 16, 4, 8, requires_grad=True) for _ in range(3))
    attend(0, query, key, value)[0, 8].sum().backward()
    for states, seen in ((query, {8}), (key, {6, 7, 8}), (value, {6, 7, 8})):
        assert states.grad is not None
        assert set(states.grad[0].abs().sum((1, 2)).nonzero().flatten().tolist()) == seen


def test_a_row_full_of_documents_and_one_without_any_padding() -> None:
    """Boundaries without padding, as in a sample with the largest number of segments."""
    config = small()
    cu_seqlens = torch.tensor([[0, 1, 3, 4], [0, 4, 4, 4]], dtype=torch.int32)
    attention = Documents(config, Backend.MASKED)(torch.zeros(2, 4, dtype=torch.int32), cu_seqlens)
    assert isinstance(attention, MaskedAttention)
    query = key = torch.zeros(2, 4, 1, 4)
    value = torch.eye(4).expand(2, 4, 4)[:, :, None]
    weights = attention(0, query, key, value)[:, :, 0]
    expected = torch.tensor(
        [
            [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]],
            [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0], [0.25] * 4],
        ]
    )
    torch.testing.assert_close(weights, expected)
    assert config.head_size == 8


def test_attention_dropout_drops_shares_of_attention() -> None:
    cos = sin = torch.zeros(1)
    dropout = Dropout(small(attention_dropout=0.5), 1, torch.tensor([0]))
    attention = MaskedAttention(cos, sin, torch.zeros(1, 1, 64, dtype=torch.int32), dropout)
    value = torch.eye(64)[None, :, None]
    weights = attention(0, torch.zeros(1, 64, 1, 64), torch.zeros(1, 64, 1, 64), value)[0, :, 0]
    seen = torch.ones(64, 64).tril().bool()
    assert (weights[~seen] == 0).all()
    assert (weights[seen] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(weights.sum(1).mean().item(), 1.0, rtol=0.15, atol=0)


@pytest.mark.parametrize("name", ["plain", "grouped", "head_dim 44", "one kv head"])
def test_attention_with_next_to_no_dropout_is_attention(name: str) -> None:
    config = small(**SHAPES[name], attention_dropout=1e-12)
    _, _, positions, cu_seqlens = packed(ROWS, 16)
    generator = torch.Generator().manual_seed(2)
    states = [
        torch.randn(3, 16, heads, config.head_size, generator=generator)
        for heads in (config.num_attention_heads, config.kv_heads, config.kv_heads)
    ]
    documents = Documents(config, Backend.MASKED)
    dropped = documents(positions, cu_seqlens, Dropout(config, 1, torch.tensor([0, 1, 2])))
    torch.testing.assert_close(dropped(0, *states), documents(positions, cu_seqlens)(0, *states), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grouped_by_kernel", [False, True], ids=["torch 2.11", "enable_gqa"])
@pytest.mark.parametrize(
    ("name", "group"),
    [*((name, None) for name in ("plain", "grouped", "head_dim 44", "one kv head")), ("plain", 4), ("grouped", 4)],
)
def test_segments_given_to_the_kernel_are_the_documents_of_the_mask(
    monkeypatch: pytest.MonkeyPatch, name: str, group: int | None, grouped_by_kernel: bool
) -> None:
    """A kernel that computes segment by segment, as flash attention does, gives the same result as the mask."""
    from torch.nn.attention import varlen

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):  # type: ignore[no-untyped-def]
        assert query.shape[1] == key.shape[1] == value.shape[1]
        return attended(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    def kernel_with_groups(  # type: ignore[no-untyped-def]
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False
    ):
        assert enable_gqa == (query.shape[1] != key.shape[1])
        return attended(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    def attended(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):  # type: ignore[no-untyped-def]
        assert (query.shape[2] % 8, window_size, cu_seq_q.dtype) == (0, (-1, 0), torch.int32)
        assert torch.equal(cu_seq_q, cu_seq_k)
        lengths = cu_seq_q.diff()
        assert (int(cu_seq_q[0]), int(cu_seq_q[-1]), lengths.min() >= 0) == (0, len(query), True)
        assert lengths.max() <= max_q == max_k
        repeated = query.shape[1] // key.shape[1]
        out = torch.zeros_like(query)
        for begin, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
            if end == begin:
                continue
            part = slice(begin, end)
            q, k, v = query[part], key[part].repeat_interleave(repeated, 1), value[part].repeat_interleave(repeated, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            future = torch.ones(end - begin, end - begin).triu(1).bool()
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            out[part] = torch.einsum("hqk,khd->qhd", weights, v)
        return out

    monkeypatch.setattr(varlen, "varlen_attn", kernel_with_groups if grouped_by_kernel else kernel)
    config = small(**SHAPES[name])
    _, _, positions, cu_seqlens = packed([[6, 5, 5], [3, 1, 9], [16], [2, 2, 2, 2, 2]], 16)
    generator = torch.Generator().manual_seed(2)
    states = [
        torch.randn(4, 16, heads, config.head_size, generator=generator)
        for heads in (config.num_attention_heads, config.kv_heads, config.kv_heads)
    ]
    segments = Documents(config, Backend.VARLEN)(positions, cu_seqlens, group=group)
    masked = Documents(config, Backend.MASKED)(positions, cu_seqlens, group=group)
    assert isinstance(segments, VarlenAttention)
    torch.testing.assert_close(segments(0, *states), masked(0, *states), rtol=1e-5, atol=1e-5)
    assert torch.equal(segments.cos, masked.cos)
