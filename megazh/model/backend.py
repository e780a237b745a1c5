"""Which implementation computes the blocks of a model: chosen from the model, the device and the dtype.

Imports torch only where a device is looked at, so that `megazh plan` starts without it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from megazh.errors import UsageError
from megazh.model.config import Mlp, ModelConfig, Norm
from megazh.model.lora_config import LoraConfig

if TYPE_CHECKING:
    import torch

_LARGEST_HEAD_DIM = 128


class Backend(StrEnum):
    """How blocks and their attention within documents are computed."""

    FUSED = "fused"
    """Triton kernels, forward and backward written out (`megazh.model.fused`); bf16 or fp16 on CUDA from sm80 on."""
    VARLEN = "varlen"
    """torch modules with `torch.nn.attention.varlen` (flash attention); bf16 or fp16 on CUDA from sm80 on."""
    MASKED = "masked"
    """torch modules with `scaled_dot_product_attention` and a boolean mask (batch, 1, seq, seq); any device."""


def unfit_for_kernels(config: ModelConfig, lora: LoraConfig | None = None) -> str | None:
    """The reason why blocks of this model run fused on no card; None where they can."""
    unfit = {
        "layernorm has no kernel": config.norm is not Norm.RMSNORM,
        "only swiglu has a kernel": config.mlp is not Mlp.SWIGLU,
        "parallel_residual has no kernel": config.parallel_residual,
        "dropout has no kernel": config.has_dropout,
        "lora.dropout has no kernel": lora is not None and lora.dropout > 0,
        f"heads of more than {_LARGEST_HEAD_DIM} dimensions have no kernel": config.head_size > _LARGEST_HEAD_DIM,
    }
    return next((reason for reason, applies in unfit.items() if applies), None)


def why_not_fused(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, lora: LoraConfig | None = None
) -> str | None:
    """The reason why blocks of this model do not run fused on this device; None where they do."""
    from megazh.kernels.support import why_not

    return unfit_for_kernels(config, lora) or why_not(device, dtype)


def choose_backend(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    kernels: bool = True,
    lora: LoraConfig | None = None,
) -> Backend:
    """The backend for a model on this device in this dtype.

    Args:
        config: the model's shape.
        device: where the blocks run.
        dtype: dtype of weights and activations.
        kernels: whether Triton kernels may be used.
        lora: LoRA, where the model is trained with it.

    Raises:
        UsageError: the model has attention dropout, which flash attention lacks.
    """
    import torch

    if kernels and device.type == "cuda" and why_not_fused(config, device, dtype, lora) is None:
        return Backend.FUSED
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0):
        if config.attention_dropout:
            raise UsageError(
                f"attention_dropout {config.attention_dropout}: flash attention on CUDA in {dtype} has no dropout; "
                "set model.attention_dropout=0 (residual_dropout works), or precision.dtype=fp32"
            )
        return Backend.VARLEN
    return Backend.MASKED
