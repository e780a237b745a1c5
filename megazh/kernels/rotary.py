"""Rotary positions, in place on queries and keys where the product of queries, keys and values has put them."""

import torch
import triton
import triton.language as tl

from megazh.kernels.launch import programs
from megazh.kernels.sums import sum_rows


@triton.jit
def _rotate(
    states, cos, sin, partial, tokens, width, rotated, heads, head_dim, half, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr, SUMS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head, place = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (place < half)
    column = head * head_dim + place
    rest = tl.arange(0, REST)
    # What is not rotated: values, and of each head the dimensions behind the rotated ones.
    plain = (rest < width) & ((rest >= rotated) | (rest % head_dim >= 2 * half))
    if SUMS:
        sum_first = tl.zeros([HEADS, HALF], dtype=tl.float32)
        sum_second = tl.zeros([HEADS, HALF], dtype=tl.float32)
        sum_rest = tl.zeros([REST], dtype=tl.float32)
    wide = tl.cast(width, tl.int64)
    for token in range(program, tokens, tl.num_programs(0)):
        begin = token * wide
        turn = token * half + place
        c = tl.load(cos + turn, mask=place < half, other=0.0)
        s = tl.load(sin + turn, mask=place < half, other=0.0) * sign
        first = tl.load(states + begin + column, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(states + begin + column + half, mask=inside, other=0.0).to(tl.float32)
        turned_first = first * c - second * s
        turned_second = second * c + first * s
        tl.store(states + begin + column, turned_first.to(states.dtype.element_ty), mask=inside)
        tl.store(states + begin + column + half, turned_second.to(states.dtype.element_ty), mask=inside)
        if SUMS:
            sum_first += turned_first
            sum_second += turned_second
            sum_rest += tl.load(states + begin + rest, mask=plain, other=0.0).to(tl.float32)
    if SUMS:
        row = partial + program * width
        tl.store(row + column, sum_first, mask=inside)
        tl.store(row + column + half, sum_second, mask=inside)
        tl.store(row + rest, sum_rest, mask=plain)


def rotate_(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, head_dim: int) -> None:
    """Rotate (arXiv 2104.09864) the first `heads` heads of each row by the angle of its position; computed in fp32.

    Args:
        states: (tokens, width) contiguous, overwritten; queries and keys first, `heads` of them together.
        cos, sin: (tokens, rotary_dim / 2) fp32.
    """
    _launch(states, cos, sin, heads, head_dim, 1.0, None)


def rotate_back_(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, head_dim: int, with_sum: bool
) -> torch.Tensor | None:
    """The gradient of `rotate_`, in place on a gradient.

    Returns:
        With `with_sum` the sum of the result over all tokens, the gradient of a bias: (width,) fp32.
    """
    if not with_sum:
        _launch(states, cos, sin, heads, head_dim, -1.0, None)
        return None
    count = min(len(states), programs(states.device, 4))
    partial = torch.empty(count, states.shape[1], device=states.device, dtype=torch.float32)
    _launch(states, cos, sin, heads, head_dim, -1.0, partial)
    return sum_rows(partial)


def _launch(
    states: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    head_dim: int,
    sign: float,
    partial: torch.Tensor | None,
) -> None:
    tokens, width = states.shape
    half = cos.shape[1]
    grid = (tokens if partial is None else len(partial),)
    rest = triton.next_power_of_2(width) if partial is not None else 1
    _rotate[grid](
        states, cos, sin, partial, tokens, width, heads * head_dim, heads, head_dim, half, sign,
        triton.next_power_of_2(heads), triton.next_power_of_2(half), partial is not None, rest, num_warps=4,
    )  # fmt: skip
