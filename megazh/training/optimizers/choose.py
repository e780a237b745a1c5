"""From the optimizer of a recipe to the update rule of each parameter. Starts without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megazh.errors import UsageError
from megazh.pipeline.role import Role
from megazh.pipeline.work import StateBytes
from megazh.training.recipe import Device, OptimizerConfig, OptimizerName

if TYPE_CHECKING:
    from megazh.pipeline.parameters import NamedParameter
    from megazh.pipeline.update_rule import UpdateRule

_STATE = {
    OptimizerName.ADAMW: StateBytes(matrix=8, other=8),
    OptimizerName.MUON: StateBytes(matrix=4, other=8, update=8),
    OptimizerName.ADAMW8BIT: StateBytes(matrix=2 + 8 / 256, other=2 + 8 / 256),
    OptimizerName.FUSED_ADAM: StateBytes(matrix=8, other=8),
}


def state_bytes(name: OptimizerName) -> StateBytes:
    """Bytes of the state of an optimizer."""
    return _STATE[name]


def check_optimizer(config: OptimizerConfig, device: Device) -> None:
    """Check that the packages of an optimizer are there, and that it has a kernel for the device.

    Raises:
        UsageError: names what is missing, and the remedy.
    """
    if config.name is OptimizerName.FUSED_ADAM and device is Device.CPU:
        raise UsageError("optimizer.name=fused_adam: apex computes on CUDA only; set optimizer.name=adamw")
    if config.name is OptimizerName.ADAMW8BIT and device is Device.CPU:
        raise UsageError("optimizer.name=adamw8bit: bitsandbytes computes it on CUDA only; set optimizer.name=adamw")
    if config.name in (OptimizerName.ADAMW8BIT, OptimizerName.FUSED_ADAM):
        _elementwise(config)


def rules(config: OptimizerConfig) -> Callable[[NamedParameter], tuple[UpdateRule, float]]:
    """The update rule and the weight decay of a parameter.

    Raises:
        UsageError: a package is missing.
    """
    elementwise = _elementwise(config)
    matrices = elementwise
    if config.name is OptimizerName.MUON:
        from megazh.training.optimizers.muon import Muon

        muon = config.muon
        matrices = Muon(muon.momentum, muon.nesterov, muon.iterations, muon.match_adamw, muon.learning_rate_ratio)

    def rule_of(parameter: NamedParameter) -> tuple[UpdateRule, float]:
        decay = config.weight_decay if parameter.role in config.decayed else 0.0
        return matrices if parameter.role is Role.MATRIX else elementwise, decay

    return rule_of


def _elementwise(config: OptimizerConfig) -> UpdateRule:
    """The rule of everything but Muon's matrices."""
    betas = (config.betas[0], config.betas[1])
    if config.name is OptimizerName.ADAMW8BIT:
        from megazh.training.optimizers.adamw8bit import AdamW8bit

        return AdamW8bit(betas, config.eps)
    if config.name is OptimizerName.FUSED_ADAM:
        from megazh.training.optimizers.fused_adam import FusedAdam

        return FusedAdam(betas, config.eps)
    from megazh.training.optimizers.adamw import AdamW

    return AdamW(betas, config.eps)
