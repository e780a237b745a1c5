"""Dtypes of a run, and what DeepSpeed gets wrong: refused by name. Does not import it."""

import re
from enum import StrEnum

import torch

from megazh.errors import UsageError


class Precision(StrEnum):
    """What weights, activations and gradients are held in."""

    FP32 = "fp32"
    BF16 = "bf16"
    """With master weights, optimizer state and gradient sums in fp32."""
    FP16 = "fp16"
    """With master weights and optimizer state in fp32, and a loss scale that adapts."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


def sums_in_place(precision: Precision, accumulated: Precision) -> bool:
    """Whether `megazh.pipeline.stage_engine` adds gradients where they are summed; else all is DeepSpeed's own."""
    return precision is Precision.BF16 and accumulated is Precision.FP32


WRITTEN_AGAINST = "0.19.8"
"""The release of DeepSpeed whose inner parts `megazh.pipeline.stage_engine` replaces; tests compare its source."""

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


def check_engine(stages: int, precision: Precision, grad_accum_dtype: Precision, zero_stage: int, tied: bool) -> None:
    """Refuse what DeepSpeed does not do, or does wrongly without saying so.

    Raises:
        UsageError: names the combination, what is wrong with it, and what to take instead.
    """
    if zero_stage not in (0, 1):
        raise UsageError(
            f"zero_stage={zero_stage}: a pipeline works with ZeRO-1 only (2 and 3 split gradients and weights that "
            "the pipeline needs whole); set zero_stage=1"
        )
    if zero_stage == 0 and stages > 1:
        raise UsageError(
            f"zero_stage=0 with pipe_parallel_size={stages}: DeepSpeed then clips by the gradient norm of the first "
            "stage alone; set zero_stage=1"
        )
    if grad_accum_dtype not in (Precision.FP32, precision):
        raise UsageError(
            f"grad_accum_dtype={grad_accum_dtype} with precision={precision}: take fp32, or {precision} like the model"
        )
    if precision is Precision.FP16 and grad_accum_dtype is Precision.FP32 and tied and stages > 1:
        raise UsageError(
            "precision=fp16 with grad_accum_dtype=fp32 and tie_word_embeddings: DeepSpeed's ZeRO-1 then loses the "
            "gradient of the tied embedding between stages; set precision=bf16, or grad_accum_dtype=fp16"
        )
