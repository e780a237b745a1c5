"""Cross entropy of rows of logits, and its gradient written over them: two passes, the second mostly from cache."""

import torch
import triton
import triton.language as tl

_BLOCK = 8192


@triton.jit
def _cross_entropy(logits, labels, losses, scale, z_loss, vocab, stored, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    base = logits + row * stored
    offset = tl.arange(0, BLOCK)
    if label < 0:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for begin in range(0, stored, BLOCK):
                at = begin + offset
                tl.store(base + at, tl.zeros([BLOCK], dtype=logits.dtype.element_ty), mask=at < stored)
    else:
        largest = -float("inf")
        total = 0.0
        for begin in range(0, vocab, BLOCK):
            at = begin + offset
            # Masked by `stored`, a multiple of 16: with a mask by an odd `vocab`, numbers would be read one by one.
            x = tl.load(base + at, mask=at < stored, other=0.0).to(tl.float32)
            x = tl.where(at < vocab, x, -float("inf"))
            new = tl.maximum(largest, tl.max(x, 0))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
            largest = new
        lse = largest + tl.log(total)
        tl.store(losses + row, lse - tl.load(base + label).to(tl.float32) + z_loss * lse * lse)
        if GRADIENT:
            # d loss / d logits = softmax * (1 + 2 z_loss lse) - one_hot; zero for columns from `vocab` on
            factor = tl.load(scale)
            for begin in range(0, stored, BLOCK):
                at = begin + offset
                x = tl.load(base + at, mask=at < stored, other=0.0).to(tl.float32)
                x = tl.where(at < vocab, x, -float("inf"))
                gradient = tl.exp(x - lse) * (1.0 + 2.0 * z_loss * lse)
                gradient = tl.where(at == label, gradient - 1.0, gradient) * factor
                tl.store(base + at, gradient.to(logits.dtype.element_ty), mask=at < stored)


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, z_loss: float, scale: torch.Tensor | None, vocab: int
) -> torch.Tensor:
    """Cross entropy of each row; with a scale, `logits` are overwritten by that scale times their gradient.

    Args:
        logits: (rows, columns), contiguous.
        labels: (rows,) integers; rows with a negative label are ignored.
        z_loss: weight of the z-loss; see `summed_cross_entropy` in `megazh.model.loss`.
        scale: a scalar in fp32 on the same device; None leaves `logits` as they are.
        vocab: number of columns that count; those behind them are padding, and their gradient is zero.

    Returns:
        (rows,) fp32; 0 for rows that are ignored.
    """
    rows, stored = logits.shape
    losses = torch.empty(rows, device=logits.device, dtype=torch.float32)
    block = min(_BLOCK, triton.next_power_of_2(stored))
    _cross_entropy[(rows,)](
        logits, labels, losses, scale, z_loss, vocab, stored, scale is not None, block,
        num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
    return losses
