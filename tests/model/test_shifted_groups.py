"""Attention within shifted groups: what each half of the heads sees; full in evaluation."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from decoders import SHAPES, alone, decoder, logits, packed, small

from megazh.model.attention import Documents
from megazh.model.backend import Backend
from megazh.model.counts import flops_per_token
from megazh.model.decoder import Decoder
from megazh.model.dropout import Dropout
from megazh.model.generate import cached_forward
from megazh.model.shifted_groups import group_bounds

GROUP = 4
ROWS = [[13, 4, 6], [5, 1, 17], [23]]
SEQ = 24
NAMES = ["plain", "qwen", "grouped", "neox", "yarn"]


def sees(query: int, key: int, length: int, shifted: bool, group: int = GROUP) -> bool:
    """Whether a token attends to another of its document, by their places in it: the definition."""
    if key > query:
        return False
    shift = group // 2 if shifted and length > group else 0
    return (query + shift) // group == (key + shift) // group or length <= group


def trained(name: str, group: int | None = GROUP, **options: Any) -> Decoder:
    """A model in training, with groups."""
    return decoder(small(**SHAPES[name]), attention_group=group, **options).train()


@pytest.mark.parametrize("on_weights", [False, True], ids=["sdpa", "written out"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_is_what_a_mask_for_each_head_gives(kv_heads: int, on_weights: bool) -> None:
    config = small(num_key_value_heads=kv_heads, attention_dropout=1e-12 if on_weights else 0.0)
    _, _, positions, cu_seqlens = packed(ROWS, SEQ)
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(3, SEQ, heads, 8, generator=generator) for heads in (4, kv_heads, kv_heads))
    dropout = Dropout(config, 1, torch.arange(3)) if on_weights else None
    found = Documents(config, Backend.MASKED)(positions, cu_seqlens, dropout, GROUP)(0, query, key, value)
    for row, lengths in enumerate(ROWS):
        begin = 0
        for length in [*lengths, SEQ - sum(lengths)]:
            for head in range(4):
                for at in range(length):
                    seen = [begin + other for other in range(length) if sees(at, other, length, shifted=head >= 2)]
                    own = head // (4 // kv_heads)
                    weights = (key[row, seen, own] @ query[row, begin + at, head] / math.sqrt(8)).softmax(0)
                    wanted = weights @ value[row, seen, own]
                    torch.testing.assert_close(found[row, begin + at, head], wanted, rtol=1e-5, atol=1e-5)
            begin += length


@pytest.mark.parametrize("length", [23, 16, 5, 4, 3])
@pytest.mark.parametrize("name", NAMES)
def test_no_position_sees_the_future(name: str, length: int) -> None:
    model = trained(name)
    tokens = packed([[length]], length)[0]
    with torch.no_grad():
        before = logits(model, tokens, *alone(length))
        for at in range(length):
            changed = tokens.clone()
            changed[0, at] = (changed[0, at] + 1) % 97
            after = logits(model, changed, *alone(length))
            assert torch.equal(before[0, :at], after[0, :at])
            assert not torch.equal(before[0, at], after[0, at])


@pytest.mark.parametrize("name", NAMES)
def test_a_document_computes_what_it_computes_alone_and_no_bit_of_another(name: str) -> None:
    model = trained(name)
    tokens, _, positions, cu_seqlens = packed(ROWS, SEQ)
    with torch.no_grad():
        together = logits(model, tokens, positions, cu_seqlens)
        for row, lengths in enumerate(ROWS):
            for begin, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
                part = slice(int(begin), int(begin) + length)
                by_itself = logits(model, tokens[row, None, part], *alone(length))[0]
                torch.testing.assert_close(together[row, part], by_itself, rtol=1e-4, atol=1e-4)
                changed = tokens.clone()
                changed[row, part] = (changed[row, part] + 41) % 97
                same = (logits(model, changed, positions, cu_seqlens) == together).all(-1)
                assert not same[row, part].any()
                same[row, part] = True
                assert same.all()


def test_groups_have_a_fixed_number_of_tokens() -> None:
    """A longer document has more groups, not longer ones: its beginning computes the same."""
    model = trained("grouped")
    tokens = packed([[23]], 23)[0]
    with torch.no_grad():
        whole = logits(model, tokens, *alone(23))
        for length in (5, 11, 16):
            beginning = logits(model, tokens[:, :length], *alone(length))
            # The last group of the beginning may be shorter, which changes no token in it: none sees a later one.
            torch.testing.assert_close(beginning[0], whole[0, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [24, 1000])
def test_a_document_that_fits_a_group_has_full_attention(group: int) -> None:
    tokens, _, positions, cu_seqlens = packed(ROWS, SEQ)
    with torch.no_grad():
        found = logits(trained("grouped", group), tokens, positions, cu_seqlens)
        assert torch.equal(found, logits(trained("grouped", None), tokens, positions, cu_seqlens))


def test_evaluation_and_generation_are_full_after_training() -> None:
    model, full = trained("grouped"), trained("grouped", None)
    tokens, _, positions, cu_seqlens = packed([[SEQ]], SEQ)
    with torch.no_grad():
        wanted = logits(full, tokens, positions, cu_seqlens)
        assert not torch.equal(logits(model, tokens, positions, cu_seqlens), wanted)
        model.eval()
        assert torch.equal(logits(model, tokens, positions, cu_seqlens), wanted)
        last = cached_forward(model, SEQ)(tokens[0].tolist())
    torch.testing.assert_close(last, wanted[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "grouped"])
def test_gradients_reach_all_heads_with_and_without_recomputation(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = trained(name, activation_checkpointing=checkpointing)
        tokens, labels, positions, cu_seqlens = packed([[SEQ]], SEQ)
        model.loss(tokens, labels, positions, cu_seqlens).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        for block in model.blocks:
            by_head = block.attention.qkv_proj.weight.grad.view(-1, model.config.head_size, 32)
            assert (by_head.abs().sum((1, 2)) > 0).all()
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("seq_len", "group"), [(24, 4), (23, 4), (9, 8), (8, 8), (5, 8), (100, 6)])
def test_operations_are_counted_by_the_tokens_in_groups(seq_len: int, group: int) -> None:
    config = small()
    index = torch.arange(seq_len, dtype=torch.int32)[None]
    starts, ends = group_bounds(index, torch.zeros_like(index), torch.full_like(index, seq_len), group)
    assert (starts.diff() >= 0).all()
    assert (ends.diff() >= 0).all()
    full, found = (flops_per_token(config, seq_len, each).block for each in (None, group))
    share = float((ends - starts).double().mean()) / seq_len
    assert full - found == pytest.approx(6 * config.attention_width * seq_len * (1 - share))
