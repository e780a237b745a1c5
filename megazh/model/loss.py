"""Head and cross entropy as one operation that never holds the logits of all tokens.

The forward pass computes the gradient as well, chunk by chunk, while it holds the logits; only the gradients of hidden
states and weight are kept. Softmax and all sums run in fp32. Logits are fp32 without Triton kernels. With them, logits
are accumulated in fp32 and rounded once to the model's dtype, like every other matrix product there: in bf16 by at most
one part in 256, which does not show in a bf16 gradient and hardly in the loss (numbers in docs/training.md).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megazh.model.counts import chunk_tokens
from megazh.model.main_grad import add_product_, main_grad, product_gradient

AddProduct = Callable[[torch.Tensor, torch.Tensor], object]
"""Function that adds `left.T @ right` to the gradient of the head's matrix."""


def summed_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float = 0.0,
    fused: bool = False,
    vocab: int | None = None,
) -> torch.Tensor:
    """Cross entropy of the logits `hidden @ weight.T`, summed over all labels that are not negative.

    Args:
        hidden: (..., hidden) in fp32, bf16 or fp16.
        weight: (rows, hidden) in the same dtype.
        labels: (...) integers; tokens with a negative label (-100) are ignored.
        z_loss: weight of the z-loss: this times the squared log-sum-exp of the logits is added per token that is not
            ignored (PaLM, arXiv 2204.02311).
        fused: whether to use Triton kernels.
        vocab: number of rows of the weight that count; rows behind them are padding, in no softmax, and get no
            gradient. Default: all.

    Returns:
        A scalar in fp32.
    """
    return summed_losses(hidden, weight, labels, z_loss, fused, vocab)[0]


def summed_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    fused: bool,
    vocab: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum as in `summed_cross_entropy`, and the z-loss in it, a scalar in fp32 without gradient."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    vocab = len(weight) if vocab is None else vocab
    return _SummedCrossEntropy.apply(flat, weight, labels.reshape(-1), z_loss, needs_gradient, fused, vocab)


@torch.no_grad()
def loss_and_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    scale: torch.Tensor,
    fused: bool,
    vocab: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy as in `summed_cross_entropy`, and the gradients of `scale` times that sum, in one pass.

    Args:
        hidden, labels, z_loss, fused, vocab: see `summed_cross_entropy`.
        weight: a parameter with a `main_grad`; its gradient is added there, or deferred to `postponed`
            (see `megazh.model.main_grad`). For a frozen parameter no gradient is computed.
        scale: a scalar in fp32 on the device of `hidden`.

    Returns:
        The sum, not scaled, a scalar in fp32; the gradient of `hidden`, in the shape and dtype of `hidden`; and the
        z-loss in the sum, not scaled either, a scalar in fp32.
    """
    assert main_grad(weight) is not None or not weight.requires_grad
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    gradient = torch.empty_like(flat)

    def add(left: torch.Tensor, right: torch.Tensor) -> None:
        product_gradient(weight, left, right)

    vocab = len(weight) if vocab is None else vocab
    wanted = add if weight.requires_grad else None
    total, z_total = _sum_chunks(
        flat, weight.detach(), labels.reshape(-1), z_loss, scale, fused, vocab, gradient, wanted
    )
    return total, gradient.view_as(hidden), z_total


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
        vocab: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for_hidden, for_weight = (needs_gradient and wanted for wanted in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        one = torch.ones((), device=hidden.device)
        add = functools.partial(add_product_, grad_weight) if grad_weight is not None else None
        total, z_total = _sum_chunks(hidden, weight, labels, z_loss, one, fused, vocab, grad_hidden, add)
        if needs_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(z_total)
        return total, z_total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = gradients[0]
        if grad_hidden is not None:
            # Scaled in fp32: in fp16 the scale (loss scale / number of tokens) would make small gradients underflow.
            grad_hidden = grad_hidden.float().mul_(scale).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _sum_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    scale: torch.Tensor,
    fused: bool,
    vocab: int,
    grad_hidden: torch.Tensor | None,
    add: AddProduct | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the losses of all tokens; write `grad_hidden` and call `add` with the gradients of `scale` times that sum.

    Either may be None: that gradient is not computed.

    Returns the sum, and the z-loss in it.
    """
    differentiated = grad_hidden is not None or add is not None
    # Without a gradient, large chunks save little time, and a CUDA graph would hold the memory for them.
    largest_chunk = chunk_tokens(len(weight), fused and differentiated)
    # Chunks of equal size, in whole tiles of 64 tokens, rather than a small chunk at the end.
    size = -(-len(hidden) // -(-len(hidden) // largest_chunk))
    size = min(largest_chunk, -(-size // 64) * 64)
    # Only CUDA has bf16 products with fp32 output; elsewhere a bf16 product would round the logits.
    wide = weight if weight.is_cuda else weight.float()
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    z_total = torch.zeros_like(total)
    chunk_scale = scale if differentiated else None
    for begin in range(0, len(hidden), size):
        rows, targets = hidden[begin : begin + size], labels[begin : begin + size]
        if fused:
            summed, z_summed, gradient = _fused_chunk(rows, weight, targets, z_loss, chunk_scale, vocab)
        else:
            logits = _logits(rows, wide)
            logits[:, vocab:] = -torch.inf
            summed, z_summed, gradient = _chunk(logits, targets, z_loss, chunk_scale)
        total += summed
        if z_summed is not None:
            z_total += z_summed
        if not differentiated:
            continue
        gradient = gradient.to(weight.dtype if fused else wide.dtype)
        if grad_hidden is not None:
            grad_hidden[begin : begin + size] = gradient @ (weight if fused else wide)
        if add is not None:
            add(gradient, rows.to(gradient.dtype))
    return total, z_total


def _fused_chunk(
    rows: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    scale: torch.Tensor | None,
    vocab: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Like `_chunk`, but from hidden states and with a Triton kernel."""
    from megazh.kernels.cross_entropy import cross_entropy_

    logits = rows @ weight.T
    if not z_loss:
        return cross_entropy_(logits, labels, z_loss, scale, vocab).sum(), None, logits
    # The kernel gives loss = z - logit + z_loss z^2 with the log-sum-exp z, and overwrites the logits: solved for z.
    at_label = logits.gather(1, labels.long().clamp_min(0)[:, None])[:, 0].float()
    losses = cross_entropy_(logits, labels, z_loss, scale, vocab)
    known = losses + at_label
    z = 2 * known / (1 + (1 + 4 * z_loss * known).clamp_min(0).sqrt())
    return losses.sum(), torch.where(labels >= 0, z_loss * z.square(), 0.0).sum(), logits


def _chunk(
    logits: torch.Tensor, labels: torch.Tensor, z_loss: float, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Sum of losses, and the z-loss in it if there is one; the third tensor is that of `logits`.

    With a scale, the gradient of scale times the sum is written over the logits. Logits of padding are -inf.
    """
    targets = labels.long()[:, None]
    counted = targets >= 0
    targets = targets.clamp_min(0)
    largest = logits.amax(1, keepdim=True)
    log_sum = logits.sub_(largest).exp().sum(1, keepdim=True).log_()
    at_label = logits.gather(1, targets)
    z = log_sum + largest
    summed = torch.where(counted, log_sum - at_label + z_loss * z.square(), 0.0).sum()
    z_summed = torch.where(counted, z_loss * z.square(), 0.0).sum() if z_loss else None
    if scale is None:
        return summed, z_summed, logits
    # d loss / d logits = softmax * (1 + 2 z_loss z) - one_hot; zero where the token is ignored
    gradient = logits.sub_(log_sum).exp_()
    gradient.mul_(torch.where(counted, 1 + 2 * z_loss * z, 0.0).mul_(scale))
    gradient.scatter_add_(1, targets, counted.float().mul_(-scale))
    return summed, z_summed, gradient


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden @ weight.T in fp32, with fp32 accumulation."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.to(weight.dtype) @ weight.T
