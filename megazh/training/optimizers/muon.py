"""Muon: momentum whose matrices are orthogonalized (Keller Jordan, kellerjordan.github.io/posts/muon)."""

import math

import torch

from megazh.pipeline.update_rule import Shard, UpdateRule

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration, from the post."""
_EPS = 1e-7


class Muon(UpdateRule):
    """The update of `torch.optim.Muon`.

    Args:
        momentum: decay rate of the running average of gradients.
        nesterov: whether the update looks one step ahead.
        iterations: Newton-Schulz iterations.
        match_adamw: whether the update of a matrix is scaled by 0.2 sqrt(max(rows, columns)), which gives it the usual
            root mean square of AdamW's, so that both take the same learning rate (arXiv 2502.16982). If not, it is
            scaled by sqrt(max(1, rows / columns)).
        learning_rate_ratio: learning rate of the matrices relative to that of the step.
    """

    whole_matrices = True

    def __init__(
        self, momentum: float, nesterov: bool, iterations: int, match_adamw: bool, learning_rate_ratio: float = 1.0
    ) -> None:
        self._momentum, self._nesterov, self._iterations = momentum, nesterov, iterations
        self._match_adamw, self._ratio = match_adamw, learning_rate_ratio

    def make_state(self, elements: int, device: torch.device) -> dict[str, torch.Tensor]:
        """The running average of the gradient, fp32."""
        return {"momentum": torch.zeros(elements, device=device)}

    def update(self, shard: Shard, learning_rate: float, number: int) -> None:
        """Update a shard; see `UpdateRule.update`."""
        rate = learning_rate * self._ratio
        average, gradient = shard.state["momentum"], shard.gradient
        average.lerp_(gradient, 1 - self._momentum)
        wanted = gradient.lerp_(average, self._momentum) if self._nesterov else average
        shard.weights.mul_(1 - rate * shard.weight_decay)
        for begin, (rows, columns) in shard.matrices:
            place = slice(begin, begin + rows * columns)
            scale = 0.2 * math.sqrt(max(rows, columns)) if self._match_adamw else math.sqrt(max(1, rows / columns))
            direction = orthogonalized(wanted[place].view(rows, columns), self._iterations)
            shard.weights[place].view(rows, columns).add_(direction, alpha=-rate * scale)


def orthogonalized(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    """Move the singular values of a matrix to about one by Newton-Schulz iterations in bf16.

    One matrix at a time, although stacks of them would be quicker: products of a stack round otherwise, and then the
    weights would depend on which matrices a replica owns.

    Args:
        matrix: (rows, columns) fp32.
        iterations: number of iterations; five bring the singular values between 0.7 and 1.2 or so.

    Returns:
        (rows, columns) bf16.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp_min(_EPS)
    for _ in range(iterations):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if tall else x
