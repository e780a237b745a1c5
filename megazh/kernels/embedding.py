"""The gradient of an embedding, added to a sum in fp32: equal tokens are sorted together, so that no two programs write
the same row, and the order of the sum is always the same."""

import torch
import triton
import triton.language as tl

_TOGETHER = 16


@triton.jit
def _embedding_gradient(gradients, order, ids, ends, sums, width, factor, TOGETHER: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + place)
    before = tl.load(ids + place - 1, mask=place > 0, other=-1)
    if token != before:
        end = tl.load(ends + place)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(place, end, TOGETHER):
            each = first + tl.arange(0, TOGETHER)
            row = tl.load(order + each, mask=each < end, other=0)
            inside = (each[:, None] < end) & (column[None, :] < width)
            tile = tl.load(gradients + row[:, None] * width + column[None, :], mask=inside, other=0.0)
            total += tl.sum(tile.to(tl.float32), 0)
        at = sums + token.to(tl.int64) * width + column
        inside = column < width
        tl.store(at, tl.load(at, mask=inside) + total * factor, mask=inside)


def add_embedding_gradient_(sums: torch.Tensor, tokens: torch.Tensor, gradients: torch.Tensor, factor: float) -> None:
    """Add `factor` times the gradient of each token to the row of its id.

    Args:
        sums: (vocab, width) fp32, contiguous.
        tokens: (count,) integer ids.
        gradients: (count, width), contiguous.
    """
    ids, order = tokens.sort(stable=True)
    ends = torch.searchsorted(ids, ids, right=True)
    width = gradients.shape[1]
    block = min(256, triton.next_power_of_2(width))
    _embedding_gradient[(len(ids), triton.cdiv(width, block))](
        gradients, order, ids, ends, sums, width, factor, _TOGETHER, block, num_warps=2
    )
