"""Rotary positions, applied in place to the queries and keys in the output of the fused query-key-value projection."""

import torch
import triton
import triton.language as tl

from megazh.kernels.reduce import programs, sum_rows


@triton.jit
def _rotate(
    states, cos, sin, partial, tokens, width, rotated, heads, head_dim, half, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr, SUMS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    column = head * head_dim + pair
    rest = tl.arange(0, REST)
    # Columns that are not rotated: values, and the dimensions of each head after the rotated ones.
    unrotated = (rest < width) & ((rest >= rotated) | (rest % head_dim >= 2 * half))
    if SUMS:
        sum_first = tl.zeros([HEADS, HALF], dtype=tl.float32)
        sum_second = tl.zeros([HEADS, HALF], dtype=tl.float32)
        sum_rest = tl.zeros([REST], dtype=tl.float32)
    wide = tl.cast(width, tl.int64)
    for token in range(program, tokens, tl.num_programs(0)):
        begin = token * wide
        at_angle = token * half + pair
        cosine = tl.load(cos + at_angle, mask=pair < half, other=0.0)
        sine = tl.load(sin + at_angle, mask=pair < half, other=0.0) * sign
        first = tl.load(states + begin + column, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(states + begin + column + half, mask=inside, other=0.0).to(tl.float32)
        rotated_first = first * cosine - second * sine
        rotated_second = second * cosine + first * sine
        tl.store(states + begin + column, rotated_first.to(states.dtype.element_ty), mask=inside)
        tl.store(states + begin + column + half, rotated_second.to(states.dtype.element_ty), mask=inside)
        if SUMS:
            sum_first += rotated_first
            sum_second += rotated_second
            sum_rest += tl.load(states + begin + rest, mask=unrotated, other=0.0).to(tl.float32)
    if SUMS:
        row = partial + program * width
        tl.store(row + column, sum_first, mask=inside)
        tl.store(row + column + half, sum_second, mask=inside)
        tl.store(row + rest, sum_rest, mask=unrotated)


def rotate_(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, head_dim: int) -> None:
    """Rotate (arXiv 2104.09864) the first `heads` heads of each row by the angles of its position, computed in fp32.

    Args:
        states: (tokens, width), contiguous, overwritten. Query heads come first, then key heads, then values.
        cos, sin: (tokens, rotary_dim / 2) fp32.
        heads: number of query and key heads together.
        head_dim: dimensions of each head.
    """
    _launch(states, cos, sin, heads, head_dim, 1.0, None)


def rotate_back_(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, head_dim: int, with_sum: bool
) -> torch.Tensor | None:
    """Backward pass of `rotate_`: the inverse rotation, in place on a gradient.

    Args:
        states: gradient of the output of `rotate_`, overwritten by that of its input.
        cos, sin, heads, head_dim: as in `rotate_`.
        with_sum: whether to sum the result over tokens.

    Returns:
        Sum of the result over all tokens, (width,) fp32, which is the gradient of a bias; None without `with_sum`.
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
