"""Gradient of an embedding, added to an fp32 buffer.

Tokens are sorted by id, so that no two programs write the same row and the order of each sum is fixed.
"""

import torch
import triton
import triton.language as tl

_TOKENS = 16
"""Tokens that a program adds up at a time."""


@triton.jit
def _embedding_gradient(gradients, order, ids, ends, sums, width, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + place)
    before = tl.load(ids + place - 1, mask=place > 0, other=-1)
    if token != before:
        end = tl.load(ends + place)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(place, end, TOKENS):
            each = first + tl.arange(0, TOKENS)
            row = tl.load(order + each, mask=each < end, other=0)
            inside = (each[:, None] < end) & (column[None, :] < width)
            tile = tl.load(gradients + row[:, None] * width + column[None, :], mask=inside, other=0.0)
            total += tl.sum(tile.to(tl.float32), 0)
        at = sums + token.to(tl.int64) * width + column
        inside = column < width
        tl.store(at, tl.load(at, mask=inside) + total, mask=inside)


def add_embedding_gradient_(sums: torch.Tensor, tokens: torch.Tensor, gradients: torch.Tensor) -> None:
    """Add the gradient of each token to the row of its id in `sums`.

    Args:
        sums: (vocab, width) fp32, contiguous.
        tokens: (count,) integer token ids.
        gradients: (count, width), contiguous.
    """
    ids, order = tokens.sort(stable=True)
    ends = torch.searchsorted(ids, ids, right=True)
    width = gradients.shape[1]
    block = min(256, triton.next_power_of_2(width))
    _embedding_gradient[(len(ids), triton.cdiv(width, block))](
        gradients, order, ids, ends, sums, width, _TOKENS, block, num_warps=2
    )
