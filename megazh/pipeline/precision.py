"""The dtypes of a run, and those that cannot work: refused by name. Starts without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from megazh.errors import Collector, UsageError

if TYPE_CHECKING:
    import torch


class Dtype(StrEnum):
    """A floating-point format."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def bytes(self) -> int:
        """Bytes per number."""
        return 4 if self is Dtype.FP32 else 2

    @property
    def torch(self) -> torch.dtype:
        """The same format as torch names it."""
        import torch

        return {Dtype.FP32: torch.float32, Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16}[self]


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run. Master weights and optimizer state are fp32 whatever these say."""

    compute: Dtype
    """Dtype of weights, activations and their gradients."""
    accumulation: Dtype
    """Dtype of gradient accumulation over micro-batches."""
    communication: Dtype
    """Dtype of the data-parallel gradient reduction."""


WRITTEN_AGAINST = "0.19.8"
"""The DeepSpeed release whose internals `megazh.pipeline.stage_engine` replaces; tests compare its source."""

_BROKEN_FROM, _BROKEN_TO = (0, 18, 3), (0, 19, 4)


def check_deepspeed_version(version: str) -> None:
    """Refuse releases whose pipeline gradients are wrong.

    Raises:
        UsageError: 0.18.3 up to 0.19.3 scale the gradients of all stages but the last wrongly (DeepSpeed pull
            requests 7665, 7787, 8154).
    """
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if found and _BROKEN_FROM <= tuple(int(part) for part in found.groups()) < _BROKEN_TO:
        raise UsageError(
            f"DeepSpeed {version} scales pipeline gradients wrongly (0.18.3 to 0.19.3 do); install 0.19.4 or later"
        )


def check_engine(precision: Precision, zero_stage: int) -> None:
    """Refuse dtypes and ZeRO stages that the engine does not have.

    Args:
        precision: the dtypes of the run.
        zero_stage: ZeRO stage of the recipe.

    Raises:
        UsageError: names the setting, the reason, and what to use instead.
    """
    compute, accumulation, communication = precision.compute, precision.accumulation, precision.communication
    found = Collector()
    if zero_stage != 1:
        reason = (
            "optimizer state that every replica holds whole costs memory and changes no result"
            if zero_stage == 0
            else "2 and 3 shard gradients and weights, which a pipeline stage needs whole for each micro-batch"
        )
        found.add(UsageError(f"zero_stage={zero_stage}: {reason}; set zero_stage=1"))
    if compute is Dtype.FP16:
        found.add(
            UsageError(
                "precision.dtype=fp16: small gradients vanish in fp16 without a loss scale, which the engine does not "
                "have, and every card from the RTX 3090 on computes as fast in bf16; set precision.dtype=bf16, or fp32"
            )
        )
    if accumulation is not Dtype.FP32:
        found.add(
            UsageError(
                f"grad_accum_dtype={accumulation}: gradients are always summed in fp32, since a sum of many "
                f"micro-batches loses small ones in {accumulation}; leave grad_accum_dtype out, or set fp32"
            )
        )
    if communication is Dtype.FP16:
        found.add(
            UsageError(
                "communication_dtype=fp16: small gradients vanish in fp16 without a loss scale; set "
                "communication_dtype=bf16, or fp32"
            )
        )
    found.raise_all()
