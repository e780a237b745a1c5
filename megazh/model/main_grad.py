"""Where the gradient of a weight is summed over micro-batches, and when.

A parameter that has an attribute `main_grad` (fp32, its own shape) gets its gradient there, added by the matrix product
that computes it; no gradient in the model's dtype exists then, and nothing is rounded before the sum. The engine gives
its parameters that attribute. Without it, autograd is handed the gradient as usual.

A parameter that has an attribute `postponed`, a list, does not get the product at once: it is noted there, with what it
needs, for `add_postponed` to do later. So the gradients of inputs, which another stage waits for, come first.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Product:
    """The gradient `left.T @ right` of a matrix, to be added to `sums`."""

    sums: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def main_grad(weight: torch.Tensor) -> torch.Tensor | None:
    """The fp32 sum of this parameter, of its shape, if it has one."""
    return getattr(weight, "main_grad", None)


def product_gradient(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """The gradient `left.T @ right` of a matrix: added to its `main_grad`, else returned in its dtype.

    Args:
        weight: (rows, columns).
        left, right: (tokens, rows) and (tokens, columns); not to be written to afterwards.
    """
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
def add_postponed(products: list[Product]) -> None:
    """Do these products, in order, and let go of each when it is done."""
    products.reverse()
    while products:
        product = products.pop()
        add_product_(product.sums, product.left, product.right)


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
