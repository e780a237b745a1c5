"""AdamW (arXiv 1711.05101) with torch's fused kernel."""

import torch

from megazh.pipeline.update_rule import Shard, UpdateRule


class AdamW(UpdateRule):
    """The update of `torch.optim.AdamW(fused=True)`.

    The kernel is called by itself: to make a `torch.optim` optimizer imports torch's compiler, which takes seconds.
    """

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self._betas, self._eps = betas, eps

    def make_state(self, elements: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Running averages of the gradient and of its square, fp32."""
        return {kind: torch.zeros(elements, device=device) for kind in ("exp_avg", "exp_avg_sq")}

    def update(self, shard: Shard, learning_rate: float, number: int) -> None:
        """Update a shard; see `UpdateRule.update`."""
        # The kernel divides by powers of the betas of this number, which it takes as a tensor.
        count = torch.tensor(float(number), device=shard.weights.device)
        torch._fused_adamw_(
            [shard.weights],
            [shard.gradient],
            [shard.state["exp_avg"]],
            [shard.state["exp_avg_sq"]],
            [],
            [count],
            lr=learning_rate,
            beta1=self._betas[0],
            beta2=self._betas[1],
            weight_decay=shard.weight_decay,
            eps=self._eps,
            amsgrad=False,
            maximize=False,
        )
