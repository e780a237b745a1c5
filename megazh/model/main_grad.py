"""Accumulation of weight gradients over micro-batches in fp32, at once or deferred.

If a parameter has an attribute `main_grad` (fp32, in the parameter's shape), the matrix product that computes the
gradient adds it there. No gradient in the model's dtype exists then, and nothing is rounded before the sum. The
pipeline engine sets this attribute. Without it, the gradient is returned to autograd as usual.

If a parameter also has an attribute `postponed`, a list, the product is not computed at once: its operands are appended
to the list, and `add_postponed` computes it later. Input gradients, for which another pipeline stage waits, come first
that way.

A frozen parameter (`requires_grad` is False) has no `main_grad`, and its gradient is not computed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Product:
    """A deferred weight gradient `left.T @ right`, to be added to `sums`."""

    sums: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def main_grad(weight: torch.Tensor) -> torch.Tensor | None:
    """The fp32 gradient buffer of a parameter, in the parameter's shape; None if it has none."""
    return getattr(weight, "main_grad", None)


def set_main_grad(weight: torch.Tensor, sums: torch.Tensor) -> None:
    """Let the gradient of a parameter be added to `sums`: fp32, in the parameter's shape."""
    weight.main_grad = sums  # type: ignore[attr-defined]


def product_gradient(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """Add the gradient `left.T @ right` of a matrix to its `main_grad`, or defer that to `postponed`.

    Args:
        weight: (rows, columns).
        left, right: (tokens, rows) and (tokens, columns); the caller must not overwrite them afterwards.

    Returns:
        The gradient in the weight's dtype if the weight is trained and has no `main_grad`, else None.
    """
    if not weight.requires_grad:
        return None
    sums = main_grad(weight)
    if sums is None:
        return left.T @ right
    postponed: list[Product] | None = getattr(weight, "postponed", None)
    if postponed is None:
        add_product_(sums, left, right)
    else:
        postponed.append(Product(sums, left, right))
    return None


@torch.no_grad()
def add_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Add the gradients that autograd has left at parameters to their `main_grad`, and remove them."""
    for parameter in parameters:
        if parameter.grad is not None:
            sums = main_grad(parameter)
            assert sums is not None
            sums.add_(parameter.grad)
            parameter.grad = None


@torch.no_grad()
def add_postponed(products: list[Product]) -> None:
    """Compute deferred products in order. Empties the list, and frees the operands of each product once it is done."""
    products.reverse()
    while products:
        product = products.pop()
        add_product_(product.sums, product.left, product.right)


def add_product_(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left.T @ right` to `sums` (fp32); on CUDA the matrix product itself accumulates in fp32 into `sums`."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(sums, left.T, right, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(left.T.to(sums.dtype), right.to(sums.dtype))


def vector_gradient(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
    """Add an fp32 gradient to the weight's `main_grad`; without one, return the gradient in the weight's dtype.

    Does nothing for a frozen weight.
    """
    if not weight.requires_grad:
        return None
    sums = main_grad(weight)
    if sums is None:
        return gradient.to(weight.dtype)
    sums.add_(gradient)
    return None
