"""Where the gradient of a weight is summed over micro-batches.

A parameter that has an attribute `main_grad` (fp32, its own shape) gets its gradient there, added by the matrix product
that computes it; no gradient in the model's dtype exists then, and nothing is rounded before the sum. The engine gives
its parameters that attribute. Without it, autograd is handed the gradient as usual.
"""

import torch


def main_grad(weight: torch.Tensor) -> torch.Tensor | None:
    """The fp32 sum of this parameter, of its shape, if it has one."""
    return getattr(weight, "main_grad", None)


def product_gradient(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """The gradient `left.T @ right` of a matrix: added to its `main_grad`, else returned in its dtype.

    Args:
        weight: (rows, columns).
        left, right: (tokens, rows) and (tokens, columns).
    """
    sums = main_grad(weight)
    if sums is None:
        return left.T @ right
    add_product_(sums, left, right)
    return None


def add_product_(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left.T @ right` to `sums` (fp32); on CUDA within the product."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(sums, left.T, right, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(left.T.to(sums.dtype), right.to(sums.dtype))


def vector_gradient(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
    """A gradient that is at hand in fp32: added to `main_grad`, else returned in the weight's dtype."""
    sums = main_grad(weight)
    if sums is None:
        return gradient.to(weight.dtype)
    sums.add_(gradient)
    return None
