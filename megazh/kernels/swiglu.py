"""silu(gate) * up and its gradient, where one projection has computed gate and up side by side."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _swiglu_forward(gate_up, product, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(product + row * width + column, result.to(product.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate_up, grad_product, grad, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at_gate = row * 2 * width + column
    gate = tl.load(gate_up + at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at_gate + width, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(grad_product + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate_sigmoid = tl.sigmoid(gate)
    silu = gate * gate_sigmoid
    grad_gate = gradient * up * (gate_sigmoid + silu * (1 - gate_sigmoid))
    tl.store(grad + at_gate, grad_gate.to(grad.dtype.element_ty), mask=inside)
    tl.store(grad + at_gate + width, (gradient * silu).to(grad.dtype.element_ty), mask=inside)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU (arXiv 2002.05202) of each row, computed in fp32.

    Args:
        gate_up: (tokens, 2 * width), contiguous: gate, then up.

    Returns:
        silu(gate) * up, (tokens, width) in the dtype of `gate_up`.
    """
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    product = torch.empty(tokens, width, device=gate_up.device, dtype=gate_up.dtype)
    _swiglu_forward[(tokens, triton.cdiv(width, _BLOCK))](gate_up, product, width, _BLOCK, num_warps=4)
    return product


def swiglu_backward_(gate_up: torch.Tensor, grad_product: torch.Tensor) -> torch.Tensor:
    """Backward pass of `swiglu`.

    Args:
        gate_up: input of `swiglu`, (tokens, 2 * width), overwritten.
        grad_product: gradient of the output of `swiglu`, (tokens, width).

    Returns:
        `gate_up`, which now holds its gradient.
    """
    tokens, width = grad_product.shape
    _swiglu_backward[(tokens, triton.cdiv(width, _BLOCK))](gate_up, grad_product, gate_up, width, _BLOCK, num_warps=4)
    return gate_up
