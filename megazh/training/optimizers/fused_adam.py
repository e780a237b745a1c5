"""AdamW with NVIDIA apex's kernel, an optional package that is built from source."""

from types import ModuleType
from typing import Any

import torch

from megazh.errors import UsageError
from megazh.pipeline.update_rule import Shard
from megazh.training.optimizers.adamw import AdamW

_REMEDY = "build apex from NVIDIA's source (its README tells how), or set optimizer.name=adamw, which gives the same"


class FusedAdam(AdamW):
    """The update of `apex.optimizers.FusedAdam(adam_w_mode=True)`; its state is AdamW's."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        super().__init__(betas, eps)
        self._kernels, self._apply = apex()
        self._overflow: torch.Tensor | None = None

    def update(self, shard: Shard, learning_rate: float, number: int) -> None:
        """Update a shard; see `UpdateRule.update`."""
        if self._overflow is None:
            self._overflow = torch.zeros(1, dtype=torch.int32, device=shard.weights.device)
        tensors = [[shard.gradient], [shard.weights], [shard.state["exp_avg"]], [shard.state["exp_avg_sq"]]]
        decoupled, corrected = 1, 1
        self._apply(
            self._kernels.multi_tensor_adam, self._overflow, tensors, learning_rate, *self._betas, self._eps, number,
            decoupled, corrected, shard.weight_decay,
        )  # fmt: skip


def apex() -> tuple[ModuleType, Any]:
    """apex's kernels, and the function that applies them.

    Raises:
        UsageError: apex is not installed, was built without its CUDA extensions, or is the other project of that name.
    """
    try:
        import apex as package
    except ImportError:
        raise UsageError(f"optimizer.name=fused_adam needs apex, which is not installed; {_REMEDY}") from None
    try:
        from apex.multi_tensor_apply import multi_tensor_applier
    except ImportError:
        place = getattr(package, "__file__", None) or "apex"
        raise UsageError(
            f"optimizer.name=fused_adam: {place} is not NVIDIA's apex (another project has that name); {_REMEDY}"
        ) from None
    try:
        import amp_C
    except ImportError as error:
        raise UsageError(
            f"optimizer.name=fused_adam: apex was built without its CUDA extensions ({error}); {_REMEDY}"
        ) from None
    return amp_C, multi_tensor_applier
