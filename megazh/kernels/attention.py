"""Causal attention within documents: flash attention (arXiv 2205.14135, 2307.08691) over rows laid end to end.

Instead of a list of segments, each token knows where its document begins and ends. So the shapes never change, blocks
of keys that no query of a block may see are never loaded, and blocks that all of them may see need no mask. Unlike
the usual kernels, which add to the gradient of queries from many blocks at once, this one sums in a fixed order:
queries have a pass of their own, for a quarter more products.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megazh.kernels.rotary import rotate_back_
from megazh.kernels.sums import sum_rows

_LOG2_E = 1.4426950408889634


@triton.jit
def _tile(base, rows, width, head_dim, count, DIM: tl.constexpr):
    """(rows, DIM) of a matrix `width` wide, zeros behind row `count` and behind `head_dim`."""
    place = tl.arange(0, DIM)
    inside = (rows[:, None] < count) & (place[None, :] < head_dim)
    return tl.load(base + rows.to(tl.int64)[:, None] * width + place[None, :], mask=inside, other=0.0)


@triton.jit
def _put(base, rows, width, head_dim, count, values, DIM: tl.constexpr):
    place = tl.arange(0, DIM)
    inside = (rows[:, None] < count) & (place[None, :] < head_dim)
    at = base + rows.to(tl.int64)[:, None] * width + place[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _put_turned(base, partial, rows, width, count, values, cos, sin, DIM: tl.constexpr, SUMS: tl.constexpr):
    """Like `_put`, rotated back by the angle of each row; with SUMS, the sum over the rows goes to `partial`."""
    HALF: tl.constexpr = DIM // 2
    place = tl.arange(0, HALF)
    inside = rows[:, None] < count
    halves = tl.permute(tl.reshape(values, (values.shape[0], 2, HALF)), (0, 2, 1))
    first, second = tl.split(halves)
    turn = rows.to(tl.int64)[:, None] * HALF + place[None, :]
    c = tl.load(cos + turn, mask=inside, other=0.0)
    s = tl.load(sin + turn, mask=inside, other=0.0)
    turned_first = first * c + second * s
    turned_second = second * c - first * s
    at = base + rows.to(tl.int64)[:, None] * width + place[None, :]
    tl.store(at, turned_first.to(base.dtype.element_ty), mask=inside)
    tl.store(at + HALF, turned_second.to(base.dtype.element_ty), mask=inside)
    if SUMS:
        tl.store(partial + place, tl.sum(tl.where(inside, turned_first, 0.0), 0))
        tl.store(partial + HALF + place, tl.sum(tl.where(inside, turned_second, 0.0), 0))


@triton.jit
def _attend(
    sums, total, largest, query, key, value, begin, end, rows, start, scale, width, head_dim, tokens,
    MASKED: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Go on with a block of queries over the keys from `begin` to `end`."""
    for first in range(begin, end, KEYS):
        column = first + tl.arange(0, KEYS)
        k = _tile(key, column, width, head_dim, tokens, DIM)
        scores = tl.dot(query, tl.trans(k)) * scale
        if MASKED:
            seen = (column[None, :] <= rows[:, None]) & (column[None, :] >= start[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new) if MASKED else new  # a row that has seen nothing yet
        weights = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(largest - safe)
        total = total * fade + tl.sum(weights, 1)
        v = _tile(value, column, width, head_dim, tokens, DIM)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None])
        largest = new
    return sums, total, largest


@triton.jit
def _attention_forward(
    qkv, starts, out, lse, tokens, width, head_dim, heads, kv_heads, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # The last blocks see the most keys: they go first.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    first = block * QUERIES
    rows = first + tl.arange(0, QUERIES)
    start = tl.load(starts + rows, mask=rows < tokens, other=0)
    lowest = tl.load(starts + first)
    highest = tl.load(starts + tl.minimum(first + QUERIES, tokens) - 1)
    kv_head = head // (heads // kv_heads)
    key = qkv + (heads + kv_head) * head_dim
    value = qkv + (heads + kv_heads + kv_head) * head_dim
    query = _tile(qkv + head * head_dim, rows, width, head_dim, tokens, DIM)
    sums = tl.zeros([QUERIES, DIM], dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    largest = tl.full([QUERIES], float("-inf"), dtype=tl.float32)
    # Keys before `whole` are not in the document of every query of this block; those from `first` on may be ahead.
    behind = tl.minimum(first + QUERIES, tokens)
    whole = tl.minimum(tl.cdiv(highest, KEYS) * KEYS, first) if SPLIT else behind
    sums, total, largest = _attend(
        sums, total, largest, query, key, value, lowest // KEYS * KEYS, whole, rows, start, scale, width, head_dim,
        tokens, True, KEYS, DIM,
    )  # fmt: skip
    if SPLIT:
        sums, total, largest = _attend(
            sums, total, largest, query, key, value, whole, first, rows, start, scale, width, head_dim, tokens,
            False, KEYS, DIM,
        )  # fmt: skip
        sums, total, largest = _attend(
            sums, total, largest, query, key, value, first, behind, rows, start, scale,
            width, head_dim, tokens, True, KEYS, DIM,
        )  # fmt: skip
    _put(out + head * head_dim, rows, heads * head_dim, head_dim, tokens, sums / total[:, None], DIM)
    tl.store(lse + head.to(tl.int64) * tokens + rows, largest + tl.log2(total), mask=rows < tokens)


@triton.jit
def _query_gradient(
    grad, query, grad_out, key, value, begin, end, rows, start, scale, row_lse, row_delta, width, head_dim, tokens,
    MASKED: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    for first in range(begin, end, KEYS):
        column = first + tl.arange(0, KEYS)
        k = _tile(key, column, width, head_dim, tokens, DIM)
        v = _tile(value, column, width, head_dim, tokens, DIM)
        weights = tl.exp2(tl.dot(query, tl.trans(k)) * scale - row_lse[:, None])
        if MASKED:
            seen = (column[None, :] <= rows[:, None]) & (column[None, :] >= start[:, None])
            weights = tl.where(seen, weights, 0.0)
        grad_scores = weights * (tl.dot(grad_out, tl.trans(v)) - row_delta[:, None])
        grad = tl.dot(grad_scores.to(k.dtype), k, grad)
    return grad


@triton.jit
def _attention_backward_queries(
    qkv, starts, out, grad_out, lse, delta, grad_qkv, cos, sin, partial, tokens, width, head_dim, heads, kv_heads,
    scale, factor, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr,
    TURN: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    first = block * QUERIES
    rows = first + tl.arange(0, QUERIES)
    start = tl.load(starts + rows, mask=rows < tokens, other=0)
    lowest = tl.load(starts + first)
    highest = tl.load(starts + tl.minimum(first + QUERIES, tokens) - 1)
    kv_head = head // (heads // kv_heads)
    key = qkv + (heads + kv_head) * head_dim
    value = qkv + (heads + kv_heads + kv_head) * head_dim
    query = _tile(qkv + head * head_dim, rows, width, head_dim, tokens, DIM)
    gradient = _tile(grad_out + head * head_dim, rows, heads * head_dim, head_dim, tokens, DIM)
    result = _tile(out + head * head_dim, rows, heads * head_dim, head_dim, tokens, DIM)
    at = head.to(tl.int64) * tokens + rows
    row_delta = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + at, row_delta, mask=rows < tokens)
    row_lse = tl.load(lse + at, mask=rows < tokens, other=float("inf"))
    grad = tl.zeros([QUERIES, DIM], dtype=tl.float32)
    behind = tl.minimum(first + QUERIES, tokens)
    whole = tl.minimum(tl.cdiv(highest, KEYS) * KEYS, first) if SPLIT else behind
    grad = _query_gradient(
        grad, query, gradient, key, value, lowest // KEYS * KEYS, whole, rows, start, scale, row_lse, row_delta, width,
        head_dim, tokens, True, KEYS, DIM,
    )  # fmt: skip
    if SPLIT:
        grad = _query_gradient(
            grad, query, gradient, key, value, whole, first, rows, start, scale, row_lse, row_delta, width, head_dim,
            tokens, False, KEYS, DIM,
        )  # fmt: skip
        grad = _query_gradient(
            grad, query, gradient, key, value, first, behind, rows, start, scale, row_lse,
            row_delta, width, head_dim, tokens, True, KEYS, DIM,
        )  # fmt: skip
    if TURN:
        sums = partial + block.to(tl.int64) * width + head * head_dim
        _put_turned(grad_qkv + head * head_dim, sums, rows, width, tokens, grad * factor, cos, sin, DIM, SUMS)
    else:
        _put(grad_qkv + head * head_dim, rows, width, head_dim, tokens, grad * factor, DIM)


@triton.jit
def _key_gradient(
    grad_key, grad_value, k, v, query, grad_out, begin, end, column, starts, scale, head_lse, head_delta, width,
    out_width, head_dim, tokens, MASKED: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    for first in range(begin, end, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        q = _tile(query, rows, width, head_dim, tokens, DIM)
        gradient = _tile(grad_out, rows, out_width, head_dim, tokens, DIM)
        row_lse = tl.load(head_lse + rows, mask=rows < tokens, other=float("inf"))
        weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale - row_lse[None, :])
        if MASKED:
            start = tl.load(starts + rows, mask=rows < tokens, other=0)
            seen = (column[:, None] <= rows[None, :]) & (column[:, None] >= start[None, :])
            weights = tl.where(seen, weights, 0.0)
        grad_value = tl.dot(weights.to(gradient.dtype), gradient, grad_value)
        row_delta = tl.load(head_delta + rows, mask=rows < tokens, other=0.0)
        grad_scores = weights * (tl.dot(v, tl.trans(gradient)) - row_delta[None, :])
        grad_key = tl.dot(grad_scores.to(q.dtype), q, grad_key)
    return grad_key, grad_value


@triton.jit
def _attention_backward_keys(
    qkv, starts, ends, grad_out, lse, delta, grad_qkv, cos, sin, partial, tokens, width, head_dim, heads, kv_heads,
    scale, factor, KEYS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr,
    TURN: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    block, kv_head = tl.program_id(0), tl.program_id(1)
    first = block * KEYS
    column = first + tl.arange(0, KEYS)
    behind = first + KEYS
    last = tl.load(ends + tl.minimum(behind, tokens) - 1)
    # Queries behind this block and before `common` are in the document of every key of the block.
    common = tl.maximum(tl.load(ends + first) // QUERIES * QUERIES, behind)
    at_key = (heads + kv_head) * head_dim
    at_value = (heads + kv_heads + kv_head) * head_dim
    k = _tile(qkv + at_key, column, width, head_dim, tokens, DIM)
    v = _tile(qkv + at_value, column, width, head_dim, tokens, DIM)
    grad_key = tl.zeros([KEYS, DIM], dtype=tl.float32)
    grad_value = tl.zeros([KEYS, DIM], dtype=tl.float32)
    group = heads // kv_heads
    diagonal = tl.minimum(behind, last) if SPLIT else last
    for member in range(0, group):
        head = kv_head * group + member
        query, gradient = qkv + head * head_dim, grad_out + head * head_dim
        head_lse, head_delta = lse + head.to(tl.int64) * tokens, delta + head.to(tl.int64) * tokens
        grad_key, grad_value = _key_gradient(
            grad_key, grad_value, k, v, query, gradient, first, diagonal, column, starts, scale, head_lse, head_delta,
            width, heads * head_dim, head_dim, tokens, True, QUERIES, DIM,
        )  # fmt: skip
        if SPLIT:
            grad_key, grad_value = _key_gradient(
                grad_key, grad_value, k, v, query, gradient, behind, common, column, starts, scale, head_lse,
                head_delta, width, heads * head_dim, head_dim, tokens, False, QUERIES, DIM,
            )  # fmt: skip
            grad_key, grad_value = _key_gradient(
                grad_key, grad_value, k, v, query, gradient, common, last, column, starts, scale, head_lse,
                head_delta, width, heads * head_dim, head_dim, tokens, True, QUERIES, DIM,
            )  # fmt: skip
    if TURN:
        sums = partial + block.to(tl.int64) * width
        _put_turned(grad_qkv + at_key, sums + at_key, column, width, tokens, grad_key * factor, cos, sin, DIM, SUMS)
        if SUMS:  # rows behind the last token are zero
            tl.store(sums + at_value + tl.arange(0, DIM), tl.sum(grad_value, 0))
    else:
        _put(grad_qkv + at_key, column, width, head_dim, tokens, grad_key * factor, DIM)
    _put(grad_qkv + at_value, column, width, head_dim, tokens, grad_value, DIM)


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel: the larger side divides by the smaller."""

    queries: int
    keys: int
    warps: int
    stages: int
    split: bool = True
    """Whether blocks that need no mask have a loop of their own."""


# The fastest of some tried on an H200, documents of 500 tokens. A kernel for the queries of a block takes the same
# blocks as the one for its keys, since both write a row of partial sums a block.
_FORWARD, _QUERIES, _KEYS = Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 2, split=False)
_WIDE_FORWARD, _WIDE_QUERIES = Tiles(64, 64, 4, 2, split=False), Tiles(64, 32, 4, 2, split=False)
_WIDE_KEYS = Tiles(32, 64, 4, 2, split=False)
"""For heads of more than 64 dimensions."""


def _tiles(head_dim: int, usual: Tiles, wide: Tiles) -> Tiles:
    return usual if head_dim <= 64 else wide


def document_attention(
    qkv: torch.Tensor, starts: torch.Tensor, heads: int, kv_heads: int, tiles: Tiles | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each token to its own document up to itself.

    Args:
        qkv: (tokens, (heads + 2 * kv_heads) * head_dim), contiguous: rotated queries and keys, and values.
        starts: (tokens,) int32, where the document of each token begins; never falls.

    Returns:
        (tokens, heads * head_dim) in the dtype of `qkv`, and (heads, tokens) fp32: the logarithm to base 2 of the
        sum of the exponentials of each row of scores.
    """
    tokens, width = qkv.shape
    head_dim = width // (heads + 2 * kv_heads)
    out = torch.empty(tokens, heads * head_dim, device=qkv.device, dtype=qkv.dtype)
    lse = torch.empty(heads, tokens, device=qkv.device, dtype=torch.float32)
    tiles = tiles or _tiles(head_dim, _FORWARD, _WIDE_FORWARD)
    _attention_forward[(triton.cdiv(tokens, tiles.queries), heads)](
        qkv, starts, out, lse, tokens, width, head_dim, heads, kv_heads, head_dim**-0.5 * _LOG2_E,
        tiles.queries, tiles.keys, _dim(head_dim), tiles.split, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out, lse


def document_attention_backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads: int,
    kv_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    with_sum: bool,
    query_tiles: Tiles | None = None,
    key_tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of queries, keys and values before the rotation.

    Args:
        grad_out: (tokens, heads * head_dim), contiguous.
        ends: (tokens,) int32, behind the last token of each token's document; never falls.
        out, lse: what `document_attention` returned.
        cos, sin: (tokens, rotary_dim / 2) fp32, by which queries and keys were rotated.
        with_sum: give the second result.

    Returns:
        The gradient of `qkv`, of the same shape; and its sum over all tokens, the gradient of a bias: (width,) fp32.
    """
    tokens, width = qkv.shape
    head_dim = width // (heads + 2 * kv_heads)
    grad_qkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    factor = head_dim**-0.5
    first, second = (
        query_tiles or _tiles(head_dim, _QUERIES, _WIDE_QUERIES),
        key_tiles or _tiles(head_dim, _KEYS, _WIDE_KEYS),
    )
    # Tiles of whole heads are rotated back as they are written; the rest by a kernel of its own.
    turn = 2 * cos.shape[1] == head_dim == _dim(head_dim)
    sums = turn and with_sum
    blocks = triton.cdiv(tokens, first.queries)
    partial = torch.empty(blocks if sums else 0, width, device=qkv.device, dtype=torch.float32)
    assert first.queries == second.keys
    _attention_backward_queries[(blocks, heads)](
        qkv, starts, out, grad_out, lse, delta, grad_qkv, cos, sin, partial, tokens, width, head_dim, heads, kv_heads,
        factor * _LOG2_E, factor, first.queries, first.keys, _dim(head_dim), first.split, turn, sums,
        num_warps=first.warps, num_stages=first.stages,
    )  # fmt: skip
    _attention_backward_keys[(blocks, kv_heads)](
        qkv, starts, ends, grad_out, lse, delta, grad_qkv, cos, sin, partial, tokens, width, head_dim, heads, kv_heads,
        factor * _LOG2_E, factor, second.keys, second.queries, _dim(head_dim), second.split, turn, sums,
        num_warps=second.warps, num_stages=second.stages,
    )  # fmt: skip
    if turn:
        return grad_qkv, sum_rows(partial) if sums else None
    return grad_qkv, rotate_back_(grad_qkv, cos, sin, heads + kv_heads, head_dim, with_sum)


def _dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))
