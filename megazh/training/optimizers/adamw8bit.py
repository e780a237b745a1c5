"""AdamW with 8-bit state in blocks of 256 numbers (arXiv 2110.02861), computed by bitsandbytes, an optional package."""

from collections.abc import Mapping
from types import ModuleType
from typing import ClassVar

import torch

from megazh.errors import UsageError
from megazh.pipeline.update_rule import Shard, UpdateRule

_BLOCK = 256


class AdamW8bit(UpdateRule):
    """The update of `bitsandbytes.optim.AdamW8bit`, with all state of matrices and vectors in 8 bits."""

    blocks: ClassVar[Mapping[str, int]] = {"exp_avg_scale": _BLOCK, "exp_avg_sq_scale": _BLOCK}

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self._betas, self._eps = betas, eps
        self._functional = bitsandbytes()
        self._maps: tuple[torch.Tensor, torch.Tensor] | None = None

    def make_state(self, elements: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Indices into a table of 256 numbers, and the largest magnitude of each block, for both running averages."""
        self._maps = (
            self._functional.create_dynamic_map(signed=True).to(device),
            self._functional.create_dynamic_map(signed=False).to(device),
        )
        state: dict[str, torch.Tensor] = {}
        for kind, table in zip(("exp_avg", "exp_avg_sq"), self._maps, strict=True):
            zero = int((table == 0).nonzero()[0])
            state[kind] = torch.full((elements,), zero, dtype=torch.uint8, device=device)
            state[f"{kind}_scale"] = torch.zeros(elements // _BLOCK, device=device)
        return state

    def update(self, shard: Shard, learning_rate: float, number: int) -> None:
        """Update a shard; see `UpdateRule.update`."""
        assert self._maps is not None
        state = shard.state
        self._functional.optimizer_update_8bit_blockwise(
            "adam",
            shard.gradient,
            shard.weights,
            state["exp_avg"],
            state["exp_avg_sq"],
            self._betas[0],
            self._betas[1],
            0.0,
            0.0,
            self._eps,
            number,
            learning_rate,
            *self._maps,
            state["exp_avg_scale"],
            state["exp_avg_sq_scale"],
            weight_decay=shard.weight_decay,
            gnorm_scale=1.0,
            skip_zeros=False,
        )


def bitsandbytes() -> ModuleType:
    """The functions of bitsandbytes.

    Raises:
        UsageError: it is not installed, or has no such update.
    """
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise UsageError(
            f"optimizer.name=adamw8bit needs bitsandbytes ({error}); install it (pip install bitsandbytes), or set "
            "optimizer.name=adamw"
        ) from None
    if not hasattr(functional, "optimizer_update_8bit_blockwise"):
        raise UsageError(
            "optimizer.name=adamw8bit: this bitsandbytes has no optimizer_update_8bit_blockwise; install 0.50 or later"
        )
    return functional
