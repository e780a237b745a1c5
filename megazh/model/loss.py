"""Head and cross entropy as one operation that never holds the logits of all tokens.

The gradient is taken in the forward pass, chunk by chunk, since the logits are at hand there; only the gradients
of hidden states and weight are kept. Products run in the model's dtype, logits, softmax and all sums in fp32.
"""

from typing import Any

import torch

_CHUNK_LOGITS = 1 << 27
"""Logits held at a time: 512 MiB in fp32."""


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(64, _CHUNK_LOGITS // vocab_size // 64 * 64)


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0
) -> torch.Tensor:
    """Cross entropy of `hidden @ weight.T` with `labels`, summed over the labels that are not negative.

    Args:
        hidden: (..., hidden) in fp32, bf16 or fp16.
        weight: (vocab, hidden), the same dtype.
        labels: (...) integers; a negative one (-100) counts nothing.
        z_loss: adds so much times the square of log sum exp of each counted token (PaLM, arXiv 2204.02311).

    Returns:
        A scalar in fp32.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _SummedCrossEntropy.apply(flat, weight, labels.reshape(-1), z_loss, needs_gradient)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_loss: float, needs_gradient: bool
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        size = chunk_tokens(len(weight))
        # Only CUDA multiplies bf16 into fp32; elsewhere a bf16 product would round the logits.
        wide = weight if weight.is_cuda else weight.float()
        for begin in range(0, len(hidden), size):
            rows = hidden[begin : begin + size]
            logits = _product(rows, wide)
            wanted = labels[begin : begin + size].long()[:, None]
            counted = wanted >= 0
            wanted = wanted.clamp_min(0)
            largest = logits.amax(1, keepdim=True)
            log_sum = logits.sub_(largest).exp().sum(1, keepdim=True).log_()
            at_label = logits.gather(1, wanted)
            z = log_sum + largest
            total += torch.where(counted, log_sum - at_label + z_loss * z.square(), 0.0).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # d loss / d logits = softmax * (1 + 2 z_loss z) - one_hot, nothing where the label does not count
            gradient = logits.sub_(log_sum).exp_()
            gradient.mul_(torch.where(counted, 1 + 2 * z_loss * z, 0.0))
            gradient.scatter_add_(1, wanted, -counted.float())
            gradient = gradient.to(wide.dtype)
            grad_hidden[begin : begin + size] = gradient @ wide
            grad_weight += _product(gradient.T, rows.to(wide.dtype).T)
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
        return scaled, grad_weight.mul_(scale).to(ctx.dtype), None, None, None


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right.T in fp32, the sums too."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return left.to(right.dtype) @ right.T
