"""The dtypes of a run, and combinations that DeepSpeed gets wrong: refused by name. Starts without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from megazh.errors import UsageError

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
    """Dtype of weights, activations and their gradients; fp16 comes with a dynamic loss scale."""
    accumulation: Dtype
    """Dtype of gradient accumulation over micro-batches."""
    communication: Dtype
    """Dtype of the data-parallel gradient reduction."""

    @property
    def sums_in_place(self) -> bool:
        """Whether `megazh.pipeline.stage_engine` adds gradients to their fp32 sums; else DeepSpeed's own paths run."""
        return self.compute is Dtype.BF16 and self.accumulation is Dtype.FP32


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


def check_engine(stages: int, precision: Precision, zero_stage: int, tied: bool) -> None:
    """Refuse combinations that DeepSpeed does not support, or gets wrong without a word.

    Args:
        stages: pipeline stages.
        precision: the dtypes of the run.
        zero_stage: DeepSpeed's ZeRO stage.
        tied: whether embedding and head share one matrix.

    Raises:
        UsageError: names the combination, what is wrong with it, and what to use instead.
    """
    compute, accumulation, communication = precision.compute, precision.accumulation, precision.communication
    if zero_stage not in (0, 1):
        raise UsageError(
            f"zero_stage={zero_stage}: a pipeline works with ZeRO-1 only (2 and 3 shard gradients and weights that "
            "the pipeline needs whole); set zero_stage=1"
        )
    if zero_stage == 0 and stages > 1:
        raise UsageError(
            f"zero_stage=0 with pipe_parallel_size={stages}: DeepSpeed then clips by the gradient norm of the first "
            "stage alone; set zero_stage=1"
        )
    if accumulation not in (Dtype.FP32, compute):
        raise UsageError(
            f"grad_accum_dtype={accumulation} with precision.dtype={compute}: use fp32, or {compute} like the model"
        )
    if communication is Dtype.FP16 and compute is not Dtype.FP16:
        raise UsageError(
            f"communication_dtype=fp16 with precision.dtype={compute}: only fp16 has a loss scale, without which small "
            "gradients vanish in fp16; set communication_dtype=bf16, or fp32"
        )
    if compute is Dtype.FP16 and accumulation is Dtype.FP32 and tied and stages > 1:
        raise UsageError(
            "precision.dtype=fp16 with grad_accum_dtype=fp32 and tie_word_embeddings: DeepSpeed's ZeRO-1 then loses "
            "the gradient of the tied embedding between stages; set precision.dtype=bf16, or grad_accum_dtype=fp16"
        )
