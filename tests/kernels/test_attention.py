"""Attention within documents against torch's with a dense mask: values, gradients, rotation, isolation of documents."""

import pytest
import torch
from torch.nn import functional as F

from megazh.kernels.tiles import AttentionTiles, Tiles, attention_tiles
from megazh.model.rope import rotate

CASES = {
    "short and long documents": (150, 2, 2, 16, [5, 35, 1, 59, 50]),
    "grouped heads, 24 dimensions": (128, 4, 2, 24, [64, 64]),
    "one document over many blocks": (200, 2, 1, 32, [200]),
    "single tokens": (130, 2, 2, 16, [1, 1, 1, 127]),
}
"""Tokens, query heads, key and value heads, head_dim, lengths of documents."""
TILES = {"small": (32, 16, 16), "square": (64, 64, 64)}
"""Queries and keys per block of the kernels that own queries, and queries per block of the one that owns keys."""
USUAL = {
    "32 dimensions": (150, 2, 2, 32, [90, 60]),
    "48 dimensions, grouped heads": (150, 4, 2, 48, [3, 147]),
    "64 dimensions, grouped heads": (210, 4, 1, 64, [130, 80]),
    "128 dimensions": (210, 1, 1, 128, [200, 10]),
    "128 dimensions, grouped heads": (150, 2, 1, 128, [64, 1, 85]),
}
"""As `CASES`, for the block sizes that a card runs with."""


def extents(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and end of each token's document: (1, tokens)."""
    ends = torch.tensor(lengths).cumsum(0)
    sizes = torch.tensor(lengths)
    return (ends - sizes).repeat_interleave(sizes)[None].int(), ends.repeat_interleave(sizes)[None].int()


def reference(qkv: torch.Tensor, starts: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Attention in fp32 with a dense mask."""
    tokens, width = qkv.shape
    head_dim = width // (heads + 2 * kv_heads)
    query, key, value = qkv.view(tokens, -1, head_dim).split((heads, kv_heads, kv_heads), 1)
    key, value = (states.repeat_interleave(heads // kv_heads, 1) for states in (key, value))
    place = torch.arange(tokens)
    seen = (place[None, :] <= place[:, None]) & (place[None, :] >= starts[:, :, None])
    seen = seen.repeat_interleave(heads // len(starts), 0)
    states = (states.transpose(0, 1) for states in (query, key, value))
    return F.scaled_dot_product_attention(*states, attn_mask=seen).transpose(0, 1).reshape(tokens, -1)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", CASES)
def test_is_what_a_dense_mask_gives(name: str, tiles: str, split: bool) -> None:
    block, keys, queries = TILES[tiles]
    first = Tiles(block, keys, 4, 2, split)
    compare(*CASES[name], AttentionTiles(first, first, Tiles(queries, block, 4, 2, split)))


@pytest.mark.parametrize(
    ("name", "capability"), [*((name, (8, 6)) for name in USUAL), ("128 dimensions, grouped heads", (9, 0))]
)
def test_is_what_a_dense_mask_gives_with_the_blocks_of_each_card(name: str, capability: tuple[int, int]) -> None:
    compare(*USUAL[name], attention_tiles(capability, USUAL[name][3]))


HALVES = {
    "grouped heads, groups within and over blocks": (150, 4, 2, 16, [5, 35, 1, 109], [40, 60, 50]),
    "more heads than keys, blocks without keys": (200, 8, 2, 16, [64, 64, 72], [200]),
    "no grouped heads": (130, 2, 2, 32, [100, 30], [1, 129]),
}
"""As `CASES`, with lengths of the segments of each half of the heads."""


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", HALVES)
def test_halves_of_the_heads_have_segments_of_their_own(name: str, tiles: str) -> None:
    block, keys, queries = TILES[tiles]
    first = Tiles(block, keys, 4, 2)
    compare(*HALVES[name][:5], AttentionTiles(first, first, Tiles(queries, block, 4, 2)), HALVES[name][5])


def compare(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: list[int],
    tiles: AttentionTiles,
    of_second_half: list[int] | None = None,
) -> None:
    """Compare values and gradients, rotation included, with those of torch."""
    from megazh.kernels.attention import document_attention, document_attention_backward
    from megazh.kernels.rotary import rotate_

    generator = torch.Generator().manual_seed(1)
    parts = [extents(each) for each in (lengths, of_second_half) if each is not None]
    starts, ends = (torch.cat(bounds) for bounds in zip(*parts, strict=True))
    plain = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator, requires_grad=True)
    gradient = torch.randn(tokens, heads * head_dim, generator=generator)
    angles = torch.rand(tokens, head_dim // 2, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()
    rotated = heads + kv_heads
    states = plain.view(1, tokens, -1, head_dim)
    plain_rotated = rotate(states[:, :, :rotated], cos[None, :, None], sin[None, :, None])
    wanted = reference(torch.cat((plain_rotated, states[:, :, rotated:]), 2).view(tokens, -1), starts, heads, kv_heads)
    wanted.backward(gradient)

    qkv = plain.detach().clone()
    rotate_(qkv, cos, sin, rotated, head_dim)
    out, lse = document_attention(qkv, starts, heads, kv_heads, tiles.forward)
    found, summed = document_attention_backward(
        gradient, qkv, starts, ends, out, lse, heads, kv_heads, cos, sin, True, tiles.queries, tiles.keys
    )
    torch.testing.assert_close(out, wanted.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(found, plain.grad, rtol=0, atol=5e-6)
    torch.testing.assert_close(summed, plain.grad.sum(0), rtol=0, atol=5e-5)


def test_another_document_changes_no_bit_and_neither_does_the_future() -> None:
    from megazh.kernels.attention import document_attention

    starts, _ = extents([50, 60, 40])
    qkv = torch.randn(150, 6 * 16, generator=torch.Generator().manual_seed(2))
    other = qkv.clone()
    other[:50] *= 100
    other[90:] += 1
    before, after = document_attention(qkv, starts, 2, 2)[0], document_attention(other, starts, 2, 2)[0]
    assert torch.equal(before[50:90], after[50:90])
    assert not torch.equal(before[90:], after[90:])
