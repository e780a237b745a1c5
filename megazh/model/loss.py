"""Head and cross entropy as one operation that never holds the logits of all tokens.

The gradient is taken in the forward pass, chunk by chunk, since the logits are at hand there; only the gradients
of hidden states and weight are kept. Softmax and all sums run in fp32. Logits are fp32, too; but with Triton's kernels
they are sums in fp32 that are rounded to the model's dtype once, as everything is that a product gives there: by at
most one part in 256, which no gradient in that dtype can tell, and the loss hardly (docs/training.md has the numbers).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megazh.model.main_grad import add_product_, main_grad, product_gradient

AddProduct = Callable[[torch.Tensor, torch.Tensor], object]
"""Adds `left.T @ right` to the gradient of the head's matrix."""

_CHUNK_LOGITS = 1 << 27
"""Logits held at a time: 512 MiB in fp32."""
_FUSED_CHUNK_LOGITS = 1 << 30
"""The same with Triton's kernels: 2 GiB in bf16, since the products gain by many rows."""


def chunk_tokens(vocab_size: int, fused: bool = False) -> int:
    """Tokens whose logits are held at a time."""
    if fused:
        return max(256, _FUSED_CHUNK_LOGITS // vocab_size // 256 * 256)
    return max(64, _CHUNK_LOGITS // vocab_size // 64 * 64)


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0, fused: bool = False
) -> torch.Tensor:
    """Cross entropy of `hidden @ weight.T` with `labels`, summed over the labels that are not negative.

    Args:
        hidden: (..., hidden) in fp32, bf16 or fp16.
        weight: (vocab, hidden), the same dtype.
        labels: (...) integers; a negative one (-100) counts nothing.
        z_loss: adds so much times the square of log sum exp of each counted token (PaLM, arXiv 2204.02311).
        fused: with Triton's kernels.

    Returns:
        A scalar in fp32.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _SummedCrossEntropy.apply(flat, weight, labels.reshape(-1), z_loss, needs_gradient, fused)


@torch.no_grad()
def loss_and_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    scale: torch.Tensor,
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross entropy, and at once what a backward pass from `scale` times that sum would give.

    Args:
        weight: a parameter with a `main_grad`; its gradient is added there, or `postponed` (see `main_grad`).
        scale: one number in fp32, on the device of `hidden`.

    Returns:
        The sum, not scaled: a scalar in fp32; and the gradient of `hidden`, in its shape and dtype.
    """
    assert main_grad(weight) is not None
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    gradient = torch.empty_like(flat)

    def add(left: torch.Tensor, right: torch.Tensor) -> None:
        product_gradient(weight, left, right)

    total = _sum_chunks(flat, weight.detach(), labels.reshape(-1), z_loss, scale, fused, gradient, add)
    return total, gradient.view_as(hidden)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        z_loss: float,
        needs_gradient: bool,
        fused: bool,
    ) -> torch.Tensor:
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        one = torch.ones((), device=hidden.device)
        add = functools.partial(add_product_, grad_weight) if grad_weight is not None else None
        total = _sum_chunks(hidden, weight, labels, z_loss, one, fused, grad_hidden, add)
        if needs_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = gradients
        # In fp16 the scale (that of the loss, over the number of tokens) must not make small gradients vanish.
        scaled = grad_hidden.float().mul_(scale).to(grad_hidden.dtype)
        return scaled, grad_weight.mul_(scale).to(ctx.dtype), None, None, None, None


def _sum_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    scale: torch.Tensor,
    fused: bool,
    grad_hidden: torch.Tensor | None,
    add: AddProduct | None,
) -> torch.Tensor:
    """The sum of all losses. Writes `grad_hidden` and adds to the matrix's gradient, both of `scale` times the sum."""
    # Where no gradient is taken there is little to gain by many rows, and a recorded step holds the memory for them.
    most = chunk_tokens(len(weight), fused and grad_hidden is not None)
    # Chunks of equal size, in whole tiles of the products, rather than a small one at the end.
    size = -(-len(hidden) // -(-len(hidden) // most))
    size = min(most, -(-size // 64) * 64)
    # Only CUDA multiplies bf16 into fp32; elsewhere a bf16 product would round the logits.
    wide = weight if weight.is_cuda else weight.float()
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for begin in range(0, len(hidden), size):
        rows, wanted = hidden[begin : begin + size], labels[begin : begin + size]
        factor = scale if grad_hidden is not None else None
        if fused:
            summed, gradient = _fused_chunk(rows, weight, wanted, z_loss, factor)
        else:
            summed, gradient = _chunk(_product(rows, wide), wanted, z_loss, factor)
        total += summed
        if grad_hidden is None or add is None:
            continue
        gradient = gradient.to(weight.dtype if fused else wide.dtype)
        grad_hidden[begin : begin + size] = gradient @ (weight if fused else wide)
        add(gradient, rows.to(gradient.dtype))
    return total


def _fused_chunk(
    rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_loss: float, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `_chunk`, from hidden states."""
    from megazh.kernels.cross_entropy import cross_entropy_

    logits = rows @ weight.T
    return cross_entropy_(logits, labels, z_loss, scale).sum(), logits


def _chunk(
    logits: torch.Tensor, labels: torch.Tensor, z_loss: float, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of losses, and, with a scale, the gradient of the logits (overwritten) of that scale times the sum."""
    wanted = labels.long()[:, None]
    counted = wanted >= 0
    wanted = wanted.clamp_min(0)
    largest = logits.amax(1, keepdim=True)
    log_sum = logits.sub_(largest).exp().sum(1, keepdim=True).log_()
    at_label = logits.gather(1, wanted)
    z = log_sum + largest
    summed = torch.where(counted, log_sum - at_label + z_loss * z.square(), 0.0).sum()
    if scale is None:
        return summed, logits
    # d loss / d logits = softmax * (1 + 2 z_loss z) - one_hot, nothing where the label does not count
    gradient = logits.sub_(log_sum).exp_()
    gradient.mul_(torch.where(counted, 1 + 2 * z_loss * z, 0.0).mul_(scale))
    gradient.scatter_add_(1, wanted, counted.float().mul_(-scale))
    return summed, gradient


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right.T in fp32, the sums too."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return left.to(right.dtype) @ right.T
