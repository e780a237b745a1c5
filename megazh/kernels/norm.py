"""RMS norm, optionally of the sum of two tensors, in one pass over memory forward and one backward."""

import torch
import triton
import triton.language as tl

from megazh.kernels.reduce import programs, sum_rows, warps_for


@triton.jit
def _norm_forward(
    residual, delta, weight, total, normed, rstd, eps, width, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    x = tl.load(residual + at, mask=inside, other=0.0)
    if HAS_DELTA:
        added = x.to(tl.float32) + tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        x = added.to(x.dtype)  # the norm reads the rounded sum, as stored
        tl.store(total + at, x, mask=inside)
    x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(rstd + row, inverse)
    scaled = x * inverse * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, scaled.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    grad_normed, x, rstd, weight, grad_total, grad_x, partial, rows, width,
    HAS_TOTAL: tl.constexpr, FOR_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad_gain = tl.zeros([BLOCK], dtype=tl.float32)
    wide = tl.cast(width, tl.int64)
    for row in range(program, rows, tl.num_programs(0)):
        at = row * wide + column
        unit = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * tl.load(rstd + row)
        gradient = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
        if FOR_WEIGHT:
            grad_gain += gradient * unit
        gradient *= gain
        # dx = rstd * (g - unit * mean(g * unit)), where g is the gradient times the weight.
        inner = tl.sum(gradient * unit, 0) / width
        result = (gradient - unit * inner) * tl.load(rstd + row)
        if HAS_TOTAL:
            result += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)
    if FOR_WEIGHT:
        tl.store(partial + program * width + column, grad_gain, mask=inside)


def add_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMS norm (arXiv 1910.07467) of `residual + delta`, computed in fp32.

    Args:
        residual, delta: (tokens, width), contiguous; None as `delta` adds nothing.
        weight: (width,).
        eps: constant added to the mean square.

    Returns:
        The sum (`residual` itself without `delta`) and the normed states, (tokens, width) each in the dtype of
        `residual`; and the reciprocal root mean square of each row, (tokens,) fp32.
    """
    rows, width = residual.shape
    total = residual if delta is None else torch.empty_like(residual)
    normed = torch.empty_like(residual)
    rstd = torch.empty(rows, device=residual.device, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _norm_forward[(rows,)](
        residual, delta, weight, total, normed, rstd, eps, width, delta is not None, block, num_warps=warps_for(block)
    )
    return total, normed, rstd


def norm_backward(
    grad_normed: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    grad_total: torch.Tensor | None,
    for_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of `add_norm`.

    Args:
        grad_normed: gradient of the normed states, (tokens, width).
        x, rstd: first and third result of `add_norm`.
        weight: (width,).
        grad_total: gradient of the sum from its other uses, (tokens, width); None if it has none.
        for_weight: whether the gradient of the weight is computed.

    Returns:
        Gradient of the sum, which is also that of `residual` and of `delta`, (tokens, width); and gradient of the
        weight, (width,) fp32, or None.
    """
    rows, width = x.shape
    grad_x = torch.empty_like(x)
    count = min(rows, programs(x.device, 8))
    partial = torch.empty(count, width, device=x.device, dtype=torch.float32) if for_weight else None
    block = triton.next_power_of_2(width)
    _norm_backward[(count,)](
        grad_normed, x, rstd, weight, grad_total, grad_x, partial, rows, width, grad_total is not None, for_weight,
        block, num_warps=warps_for(block),
    )  # fmt: skip
    return grad_x, None if partial is None else sum_rows(partial)
